"""What a tool says while it works for hours."""

import sys
from time import monotonic

_SECONDS = 5.0


class Progress:
    """A line on stderr every few seconds: what is done, how fast, and the time that is left.

    Args:
        work: The tool, and what it does if that is several things; how the line begins.
        total: Bytes to read, as they are stored; 0 if nobody knows.
    """

    def __init__(self, work: str, total: int) -> None:
        self._work = work
        self._total = total
        self._before = self._done = 0
        self._documents = self._text_bytes = 0
        self._started = self._reported = monotonic()

    def skip(self, size: int) -> None:
        """Counts bytes that an earlier call has read: they are done, and tell nothing of speed."""
        self._before += size
        self._done += size

    def advance(self, size: int, documents: int = 0, text_bytes: int | None = None) -> None:
        """Counts what has been read, and prints the line if it is time to.

        Args:
            size: Bytes as they are stored.
            documents: Documents in them, where they are counted.
            text_bytes: Bytes that they stand for, if not themselves.
        """
        self._done += size
        self._documents += documents
        self._text_bytes += size if text_bytes is None else text_bytes
        now = monotonic()
        if now - self._reported >= _SECONDS:
            self._reported = now
            print(self._line(now - self._started), file=sys.stderr, flush=True)

    def _line(self, seconds: float) -> str:
        megabytes = self._text_bytes / 1e6
        parts = [f"{self._documents:,} documents"] if self._documents else []
        parts += [f"{megabytes:,.1f} MB", f"{megabytes / seconds:,.1f} MB/s"]
        if self._total and self._done > self._before:
            left = max(0, self._total - self._done)
            remaining = seconds * left / (self._done - self._before)
            parts += [f"{1 - left / self._total:.0%}", f"{duration(remaining)} left"]
        return f"{self._work}: {', '.join(parts)}"


def duration(seconds: float) -> str:
    """A time for people."""
    if seconds < 120:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    if seconds < 2 * 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
