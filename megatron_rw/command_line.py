"""Command lines of the tools, made from dataclasses by tyro."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator, Sequence

import tyro

from megatron_rw.errors import UserError

# A flag's help text is indented by this much in tyro's errors.
_HELP_INDENT = 8


def parse[Config](config: type[Config], argv: Sequence[str] | None, description: str) -> Config:
    """Parses a command line into a dataclass, each field of which is a flag.

    A field's docstring is its help text, and a `UserError` of `__post_init__` its check. Fields of
    a nested dataclass are flags of the same form, without a prefix. `--help` prints the flags and
    ends the process.

    Args:
        config: The dataclass.
        argv: The arguments without the program's name; None for those of this process.
        description: What `--help` says first.

    Raises:
        UserError: If the command line is wrong, in one line instead of tyro's box.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), _one_line(arguments):
            return tyro.cli(
                config,
                prog=_program(),
                args=arguments,
                description=description,
                config=(tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes),
            )
    except SystemExit as ended:
        if not ended.code:
            raise
        raise UserError(
            f"{_unboxed(said.getvalue())} ({_program()} --help lists all flags)"
        ) from None


def require(holds: bool, flag: str, value: object, what: str) -> None:
    """Checks the value of a flag.

    Args:
        holds: Whether the value is allowed.
        flag: The flag, for the message.
        value: Its value.
        what: What the flag takes, for the message, such as "a number of at least 1".

    Raises:
        UserError: If the value is not allowed.
    """
    if not holds:
        raise UserError(f"{flag} {value}: give {what}")


@contextlib.contextmanager
def _one_line(arguments: Sequence[str]) -> Iterator[None]:
    """Keeps tyro from breaking an error, such as a long path in it, into several lines."""
    if {"-h", "--help"} & set(arguments):
        yield
        return
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "10000"
    try:
        yield
    finally:
        del os.environ["COLUMNS"]
        if before is not None:
            os.environ["COLUMNS"] = before


def _unboxed(text: str) -> str:
    """Returns what tyro's box says in one line, without its frame, title and the flags' help."""
    words: list[str] = []
    for number, line in enumerate(text.splitlines()):
        content = line.strip("│╭╮╰╯─ ")
        if content.startswith(("For full helptext", "Argument helptext", "Got errors")):
            break
        title, of_a_flag = number == 0, line[1:].startswith(" " * _HELP_INDENT)
        if content.strip("-") and not title and not of_a_flag:
            words.append(content)
    return " ".join(words)


def _program() -> str:
    return os.path.basename(sys.argv[0])
