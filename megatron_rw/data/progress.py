"""What a tool prints about its own work: progress, messages and durations."""

import sys
from time import monotonic

_SECONDS = 5.0


class Progress:
    """Prints a line every few seconds: what is done, how fast, and the time that is left.

    The line begins with `work`: the tool, and what it is doing if it does several things. `total`
    are the bytes to read, as they are stored; 0 if unknown.
    """

    def __init__(self, work: str, total: int) -> None:
        self._work = work
        self._total = total
        self._before = self._done = 0
        self._documents = self._text_bytes = 0
        self._started = self._reported = monotonic()

    def skip(self, size: int) -> None:
        """Counts bytes that an earlier call has read; they do not count for the speed."""
        self._before += size
        self._done += size

    def advance(self, size: int, documents: int = 0, text_bytes: int | None = None) -> None:
        """Counts what has been read, and prints the line if it is time to.

        `size` are bytes as they are stored, and `text_bytes` those of the text in them, if that is
        another number.
        """
        self._done += size
        self._documents += documents
        self._text_bytes += size if text_bytes is None else text_bytes
        now = monotonic()
        if now - self._reported >= _SECONDS:
            self._reported = now
            say(self._work, self._line(now - self._started))

    def _line(self, seconds: float) -> str:
        megabytes = self._text_bytes / 1e6
        parts = [f"{self._documents:,} documents"] if self._documents else []
        parts += [f"{megabytes:,.1f} MB", f"{megabytes / seconds:,.1f} MB/s"]
        if self._total and self._done > self._before:
            left = max(0, self._total - self._done)
            remaining = seconds * left / (self._done - self._before)
            parts += [f"{1 - left / self._total:.0%}", f"{duration(remaining)} left"]
        return ", ".join(parts)


def say(work: str, message: str) -> None:
    """Prints a message about the work of a tool to standard error."""
    print(f"{work}: {message}", file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """Returns a time for people to read."""
    if seconds < 120:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    if seconds < 2 * 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
