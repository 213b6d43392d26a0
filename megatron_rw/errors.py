"""How an error ends a program: a user's mistake in one line, a bug with its traceback."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator

USER_ERROR_STATUS = 2
INTERRUPTED_STATUS = 130  # What a shell reports of a process that Ctrl-C ended.
BROKEN_PIPE_STATUS = 141  # What a shell reports of a process that wrote to a closed pipe.


class UserError(Exception):
    """A mistake that the user can correct, told in one line.

    The message names the flag, the file or the line of the file, and the remedy. It is all that the
    user sees. `known_to_all` is False if other ranks cannot know of the mistake; see `reported`.
    """

    def __init__(self, message: str, known_to_all: bool = True) -> None:
        super().__init__(message)
        self.known_to_all = known_to_all


@contextlib.contextmanager
def reported(
    doing: str | Callable[[], str], *, alike: bool = False, training: bool = False
) -> Iterator[None]:
    """Ends the process on an error of the body, with the status that its kind has.

    A `UserError`, or an error of the operating system, becomes one line on standard error and
    status 2; Ctrl-C becomes status 130. Any other exception is a bug. It passes through with its
    traceback, so that Python ends the process with status 1, after one line that says what was
    being done: `doing`, which follows the word "while".

    `alike` means that all ranks make the same mistakes, such as those in flags. Rank 0 alone then
    prints a mistake that is known to all. `training` means that an error of the operating system
    is treated as a bug is: the user did not cause it, and the job may be started again.
    """
    try:
        yield
    except (UserError, OSError) as error:
        if training and isinstance(error, OSError):
            _announce(doing)
            raise
        if isinstance(error, BrokenPipeError):
            # Whoever read the output has closed it, as `head` does.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(BROKEN_PIPE_STATUS) from None
        known_to_all = alike and getattr(error, "known_to_all", False)
        if not (known_to_all and _another_rank_prints()):
            print_error(str(error))
        raise SystemExit(USER_ERROR_STATUS) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        raise SystemExit(INTERRUPTED_STATUS) from None
    except Exception:
        _announce(doing)
        raise


def print_error(message: str) -> None:
    """Prints an error in one line at once, for a caller that then ends the process itself."""
    print(f"error: {message}", file=sys.stderr, flush=True)


def _announce(doing: str | Callable[[], str]) -> None:
    what = doing if isinstance(doing, str) else doing()
    where = f"rank {os.environ['RANK']}: " if "RANK" in os.environ else ""
    print_error(f"{where}unexpected failure while {what}:")


def _another_rank_prints() -> bool:
    """Whether this is a rank other than 0. A RANK that is no number may be the mistake itself."""
    rank = os.environ.get("RANK", "0")
    return rank.isdecimal() and int(rank) > 0
