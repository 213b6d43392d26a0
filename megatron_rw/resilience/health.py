"""The heartbeat of a run, and the health check of a container that reads it.

    python -m megatron_rw.resilience.health

docs/cluster.md says what it finds and how it is set up. It imports neither torch nor Megatron and
touches no GPU: it runs every minute beside the training.
"""

import atexit
import contextlib
import os
import sys
import time
from pathlib import Path

PATH_VARIABLE = "MEGATRON_RW_HEARTBEAT"
LIMIT_VARIABLE = "MEGATRON_RW_HEALTH_SECONDS"
EVERY_S = 5.0  # Seconds between two touches at least.


class Heartbeat:
    """Touches the file that says when this host's part of the run last made progress.

    Only the first process of a host does, and only where the environment names a file. If the file
    cannot be written, a warning says so and the run goes on.
    """

    def __init__(self) -> None:
        self._path: Path | None = None
        self._next = 0.0
        path = os.environ.get(PATH_VARIABLE)
        if not path or os.environ.get("LOCAL_RANK", "0") != "0":
            return
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).write_text(str(os.getpid()))
        except OSError as error:
            print(f"WARNING: {PATH_VARIABLE}: no heartbeat for the health check: {error}")
            return
        self._path = Path(path)
        atexit.register(self._path.unlink, missing_ok=True)

    def beat(self) -> None:
        """Notes that the run has made progress; cheap enough for every step."""
        now = time.monotonic()
        if self._path is not None and now >= self._next:
            self._next = now + EVERY_S
            with contextlib.suppress(OSError):
                os.utime(self._path)


def main() -> int:
    """Prints how long ago the run made progress, and returns 1 if that is too long."""
    given = os.environ.get(LIMIT_VARIABLE, "1800")
    try:
        limit = float(given)
    except ValueError:
        print(f"error: {LIMIT_VARIABLE}={given}: give a number of seconds")
        return 1
    path = os.environ.get(PATH_VARIABLE, "")
    try:
        # A run that was killed leaves its file.
        is_there = bool(path) and Path("/proc", Path(path).read_text()).exists()
        age = time.time() - Path(path).stat().st_mtime
    except FileNotFoundError:
        is_there = False
    if not is_there:
        print(f"healthy: no run is here ({PATH_VARIABLE}={path})")
        return 0
    state = "healthy" if age <= limit else f"unhealthy (limit {limit:g} s, {LIMIT_VARIABLE})"
    print(f"{state}: the run made progress {age:.0f} s ago")
    return int(age > limit)


if __name__ == "__main__":
    sys.exit(main())
