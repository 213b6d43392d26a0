"""What a tool says while it reads for hours."""

import sys
import time

_SECONDS = 5.0


class Progress:
    """A line on stderr every few seconds.

    Args:
        work: The tool and what it does, as the line begins.
        total: Bytes to read.
    """

    def __init__(self, work: str, total: int) -> None:
        self._work = work
        self._total = total
        self._done = 0
        self._started = self._reported = time.monotonic()

    def advance(self, size: int) -> None:
        """Counts bytes that have been read, and prints the line if it is time to."""
        self._done += size
        now = time.monotonic()
        if now - self._reported < _SECONDS:
            return
        self._reported = now
        print(
            f"{self._work}: {self._done / 1e9:,.1f} of {self._total / 1e9:,.1f} GB, "
            f"{self._done / 1e6 / (now - self._started):,.0f} MB/s",
            file=sys.stderr,
            flush=True,
        )
