"""`@file` on the command line: flags from a file, as a shell would split them."""

from __future__ import annotations

import shlex
from argparse import ArgumentParser


def allow_argument_files(parser: ArgumentParser) -> None:
    """Lets a parser read `@path` as the flags in that file.

    A line may hold several flags; `#` begins a comment. Flags after `@path` win over those in it.
    """
    parser.fromfile_prefix_chars = "@"
    parser.convert_arg_line_to_args = _split  # type: ignore[method-assign, assignment]


def _split(line: str) -> list[str]:
    return shlex.split(line, comments=True)
