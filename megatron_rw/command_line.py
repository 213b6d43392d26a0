"""Command lines of the tools, made from dataclasses by tyro."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Sequence

import tyro

from megatron_rw.errors import UserError


def parse[Config](config: type[Config], argv: Sequence[str] | None, description: str) -> Config:
    """Parses a command line into a dataclass, each field of which is a flag.

    A field's docstring is its help text, and a `UserError` of `__post_init__` its check. `--help`
    prints the flags and ends the process.

    Args:
        config: The dataclass.
        argv: The arguments without the program's name; None for those of this process.
        description: What `--help` says first.

    Raises:
        UserError: If the command line is wrong, in one line instead of tyro's box.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(
                config,
                args=argv,
                description=description,
                config=(tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes),
            )
    except SystemExit as ended:
        if not ended.code:
            raise
        raise UserError(
            f"{_unboxed(said.getvalue())} ({_program()} --help lists all flags)"
        ) from None


def _unboxed(text: str) -> str:
    """Returns what tyro's box says in one line, without its frame and the flag's help text."""
    words: list[str] = []
    for line in text.splitlines():
        content = line.strip("│╭╮╰╯─ ")
        if content.startswith(("For full helptext", "Argument helptext", "Got errors")):
            break
        if content and not line.startswith("╭"):
            words.append(content)
    return " ".join(words)


def _program() -> str:
    return os.path.basename(sys.argv[0])
