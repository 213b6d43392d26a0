"""Command lines of the tools, made from dataclasses by tyro."""

import contextlib
import io
import os
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import tyro
from tyro import _docstrings

from megatron_rw import patching
from megatron_rw.errors import UserError
from megatron_rw.patching import Around, Patch
from megatron_rw.platform import FlagReader

_FLAG_STYLE = (tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes)

_HELP = Patch(
    _docstrings,
    "get_field_docstring",
    Around(lambda proceed, call: " ".join((proceed() or "").split()) or None),
    "tyro keeps the line breaks of a docstring that is indented, in the middle of sentences.",
    seen_in="tyro 1.0.17",
)
# Errors in tyro's terms, and in plain ones.
_PLAIN = (
    (r"Error parsing (--\S+): .*\b(?:int|INT)\b.*'(.*)'.*", r"\1 \2: give a whole number"),
    (r"Error parsing (--\S+): .*\b(?:float|FLOAT)\b.*'(.*)'.*", r"\1 \2: give a number"),
    (r"Missing value for argument '(.*)'\. Expected 1 values\.", r"\1: give a value"),
    (
        r"invalid choice '(.*)' for argument '(.*)'\. Expected one of \((.*)\)\.",
        r"\2 \1: choose one of \3",
    ),
)

_HELP_INDENT = 8  # A flag's help text is indented by this much in tyro's errors.


def parse[Config](config: type[Config], argv: Sequence[str] | None, description: str) -> Config:
    """Parses a command line into a dataclass, each field of which is a flag.

    A field's docstring is its help text, and a `UserError` of `__post_init__` its check. Fields of
    a nested dataclass are flags of the same form, without a prefix. `--help` prints the description
    and the flags, and ends the process. What is wrong is a `UserError` instead of tyro's box.
    `argv` has no program's name; None stands for that of this process.
    """
    parsed: Config = _cli(config, sys.argv[1:] if argv is None else argv, description=description)
    return parsed


def parse_known[Config](
    config: type[Config], argv: Sequence[str], description: str
) -> tuple[Config, list[str]]:
    """Parses the flags of a dataclass, as `parse` does, among the flags of a job.

    `@file` stands for the flags in that file, as it does for the job itself. Returns the dataclass,
    and the arguments that none of its fields takes, in their order.
    """
    # The flags that a reader without flags does not know are all of them, those of files included.
    given = FlagReader().parse_known_args(argv)[1]
    parsed, others = _cli(config, given, description=description, return_unknown_args=True)
    return parsed, others


def _cli(config: Any, argv: Sequence[str], **how: Any) -> Any:
    with _one_line_errors(), patching.applied([_HELP]):
        return tyro.cli(config, prog=_program(), args=list(argv), config=_FLAG_STYLE, **how)


def require(holds: bool, flag: str, value: object, what: str) -> None:
    """Refuses the value of a flag unless it `holds`; `what` is to be given, "a number above 0"."""
    if not holds:
        raise UserError(f"{flag} {value}: give {what}")


@contextlib.contextmanager
def _one_line_errors() -> Iterator[None]:
    """Raises a `UserError` with what tyro says on standard error before it exits."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), _wide_errors():
            yield
    except SystemExit as ended:
        if not ended.code:
            raise
        message = _unboxed(said.getvalue())
        for theirs, ours in _PLAIN:
            message = re.sub(theirs, ours, message)
        raise UserError(f"{message} ({_program()} --help lists all flags)") from None


@contextlib.contextmanager
def _wide_errors() -> Iterator[None]:
    """Keeps tyro from breaking an error, such as a long path in it, into several lines."""
    if {"-h", "--help"} & set(sys.argv):
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
