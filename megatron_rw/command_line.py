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

    A field's docstring is its help text, and `__post_init__` checks the values. `--help` prints the
    description and the flags, and ends the process. A wrong command line raises a `UserError` of
    one line, instead of tyro's box. `argv` lacks the program's name; None means this process's.
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
        program = os.path.basename(sys.argv[0])
        text = f"{_unboxed(said.getvalue())} ({program} --help lists all flags)"
        raise UserError(text) from None


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
