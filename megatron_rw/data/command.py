"""What the command-line tools share: how they end on bad input."""

import sys
from collections.abc import Callable

from megatron_rw.errors import UserError


def exit_status(body: Callable[[], None]) -> int:
    """Runs a tool and returns the exit status of its process.

    Args:
        body: The tool after its arguments are parsed.

    Returns:
        0; 2 after an `UserError` or an operating system error, which is then printed to stderr
        as one line, `error: ...`; 130 after Ctrl-C. Any other exception is a bug and keeps its
        traceback.
    """
    try:
        body()
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0
