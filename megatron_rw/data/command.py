"""What the command-line tools share: how they end on bad input."""

import sys
from collections.abc import Callable


class InputError(Exception):
    """Bad input that the user can mend: a flag, a file or a line of a file.

    The message names the place and the remedy; it is all that the user sees.
    """


def exit_status(body: Callable[[], None]) -> int:
    """Runs a tool and returns the exit status of its process.

    Args:
        body: The tool after its arguments are parsed.

    Returns:
        0; 2 after an `InputError` or an operating system error, which is then printed to stderr
        as one line, `error: ...`; 130 after Ctrl-C. Any other exception is a bug and keeps its
        traceback.
    """
    try:
        body()
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0
