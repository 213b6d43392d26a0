"""Command lines of the tools, made from dataclasses by tyro."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
from collections.abc import Iterator, Sequence
from typing import NoReturn

import tyro

from megatron_rw.errors import UserError
from megatron_rw.platform.argfile import allow_argument_files

_FLAG_STYLE = (tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes)


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
    with _one_line_errors():
        return tyro.cli(config, args=argv, description=description, config=_FLAG_STYLE)


def parse_known[Config](
    config: type[Config], argv: Sequence[str], description: str
) -> tuple[Config, list[str]]:
    """Parses the flags of a dataclass out of a command line that also has the flags of a job.

    `@file` stands for the flags in that file, as it does for the job itself.

    Args:
        config: As for `parse`.
        argv: The arguments without the program's name.
        description: As for `parse`.

    Returns:
        The dataclass, and the arguments that none of its fields takes, in their order.

    Raises:
        UserError: As of `parse`, and if an argument file cannot be read.
    """
    own_and_others = _without_argument_files(argv)
    with _one_line_errors():
        return tyro.cli(
            config,
            args=own_and_others,
            description=description,
            config=_FLAG_STYLE,
            return_unknown_args=True,
        )


class _ArgumentFileReader(argparse.ArgumentParser):
    """A parser without flags, which reads the files that `@file` arguments name."""

    def error(self, message: str) -> NoReturn:
        """Raises a `UserError` where argparse would print the usage and exit."""
        raise UserError(message)


def _without_argument_files(argv: Sequence[str]) -> list[str]:
    """Returns the arguments with the flags of each `@file` in its place."""
    reader = _ArgumentFileReader(add_help=False)
    allow_argument_files(reader)
    return reader.parse_known_args(argv)[1]


@contextlib.contextmanager
def _one_line_errors() -> Iterator[None]:
    """Raises a `UserError` with what tyro says on standard error before it exits."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            yield
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
