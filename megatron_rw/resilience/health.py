"""Whether the training run of a container makes progress: its health check.

    python -m megatron_rw.resilience.health [PID ...]

A container engine sees by itself that a process ends. What it cannot see is a run that is there
and stands still: in a collective, in a file system that hangs, in a loop of restarts. A run that
moves writes `metrics.jsonl` in its --log-dir at every logged step, so this looks up that flag in
the command lines of the container's processes and asks how old the file is. Unhealthy, exit status
1, is a run whose file has not grown for MEGATRON_RW_HEALTH_SECONDS (1800), counted from its start
where it has written nothing since. The limit must be longer than a start, a validation or the
writing of a checkpoint takes.

A container without a run, or with one that has no --log-dir, is healthy: nothing is known against
it. Imports neither torch nor Megatron and touches no GPU: it runs every minute beside the training.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NoReturn

from megatron_rw.platform.argfile import allow_argument_files

LIMIT_VARIABLE = "MEGATRON_RW_HEALTH_SECONDS"
DEFAULT_LIMIT_S = 1800.0
# The file, and the command that pip makes of it.
PROGRAMS = ("pretrain_gpt_rw.py", "pretrain-gpt-rw")
PROC = Path("/proc")


class _NotReadableError(ValueError):
    """A command line that cannot be understood; the message says why."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise _NotReadableError(message)


def main(argv: Sequence[str] | None = None) -> int:
    """Print a line for every run, and return 1 when one of them stands still."""
    parser = argparse.ArgumentParser(description="Does the training run here make progress?")
    parser.add_argument(
        "pids", nargs="*", type=int, metavar="PID", help="look at these processes alone"
    )
    pids = parser.parse_args(argv).pids or [int(p.name) for p in PROC.iterdir() if p.name.isdigit()]
    given = os.environ.get(LIMIT_VARIABLE, str(DEFAULT_LIMIT_S))
    try:
        limit = float(given)
    except ValueError:
        print(f"error: {LIMIT_VARIABLE}={given}: give a number of seconds")
        return 1
    found = runs(pids)
    if not found:
        print("healthy: no run with --log-dir here")
    ages = {log_dir: seconds_since_progress(log_dir, age) for log_dir, age in found.items()}
    for log_dir, age in ages.items():
        state = "healthy" if age <= limit else f"unhealthy (limit {limit:g} s, {LIMIT_VARIABLE})"
        print(f"{state}: {log_dir}/metrics.jsonl has had no new line for {age:.0f} s")
    return int(any(age > limit for age in ages.values()))


def runs(pids: Iterable[int]) -> dict[Path, float]:
    """The runs among some processes.

    Args:
        pids: processes; those that end meanwhile are passed over.

    Returns:
        --log-dir to the age in seconds of the oldest process that has it. The oldest: a launcher
        that restarts its ranks again and again is no progress.
    """
    found: dict[Path, float] = {}
    for pid in pids:
        try:
            words = (PROC / str(pid) / "cmdline").read_text(errors="replace").split("\0")[:-1]
            flags = _flags(words)
            if flags is None:
                continue
            log_dir = _log_dir(flags, PROC / str(pid) / "cwd")
            if log_dir is not None:
                found[log_dir] = max(found.get(log_dir, 0.0), _age(pid))
        except (FileNotFoundError, ProcessLookupError):
            continue
        except (_NotReadableError, PermissionError) as error:
            print(f"process {pid} is not looked at: {error}")
    return found


def seconds_since_progress(log_dir: Path, age: float) -> float:
    """Seconds since a run wrote a line.

    Args:
        log_dir: its --log-dir.
        age: of the run, in seconds: what a run before it wrote does not count.
    """
    try:
        return min(age, time.time() - (log_dir / "metrics.jsonl").stat().st_mtime)
    except FileNotFoundError:
        return age


def _flags(words: Sequence[str]) -> Sequence[str] | None:
    """What follows the program in a command line; None where it is another program's."""
    for index, word in enumerate(words):
        if os.path.basename(word) in PROGRAMS:
            return words[index + 1 :]
    return None


def _log_dir(flags: Sequence[str], cwd: Path) -> Path | None:
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--log-dir")
    allow_argument_files(parser)
    # A relative path is relative to where that process is.
    flags = [f"@{cwd / flag[1:]}" if flag.startswith("@") else flag for flag in flags]
    log_dir: str | None = parser.parse_known_args(flags)[0].log_dir
    return None if log_dir is None else (cwd.resolve() / log_dir)


def _age(pid: int) -> float:
    """Seconds since a process started."""
    # The second field is the name in brackets, which may hold anything.
    fields = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    started = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return float((PROC / "uptime").read_text().split()[0]) - started


if __name__ == "__main__":
    sys.exit(main())
