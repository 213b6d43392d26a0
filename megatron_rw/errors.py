"""Ends a program on an error: a user's mistake in one line, a bug with its traceback."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator

USER_ERROR_STATUS = 2
# What a shell reports of a process that Ctrl-C ended.
INTERRUPTED_STATUS = 130


class UserError(Exception):
    """A mistake that the user can correct, told in one line.

    The message names the flag, the file or the line of the file, and the remedy. It is all that the
    user sees. Rank 0 prints it for all, unless `known_to_all` is False because other ranks cannot
    know of the mistake; then the rank that raises the error prints it.
    """

    def __init__(self, message: str, known_to_all: bool = True) -> None:
        super().__init__(message)
        self.known_to_all = known_to_all


@contextlib.contextmanager
def reported(doing: str | Callable[[], str]) -> Iterator[None]:
    """Ends the process on an error of the body, with the exit status for that kind of error.

    A `UserError`, or an error of the operating system, becomes one line on standard error and
    status 2; Ctrl-C becomes status 130. Any other exception is a bug. It passes through with its
    traceback, so that Python ends the process with status 1, after one line that says what was
    being done: `doing`, which follows the word "while".
    """
    try:
        yield
    except (UserError, OSError) as error:
        if _rank() == 0 or not getattr(error, "known_to_all", False):
            print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(USER_ERROR_STATUS) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        raise SystemExit(INTERRUPTED_STATUS) from None
    except Exception:
        what = doing if isinstance(doing, str) else doing()
        where = f"rank {_rank()}: " if "RANK" in os.environ else ""
        print(f"error: {where}unexpected failure while {what}:", file=sys.stderr, flush=True)
        raise


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))
