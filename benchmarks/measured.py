"""Runs a command and says how long it took and how much memory its processes had."""

from __future__ import annotations

import shlex
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

SAMPLE_SECONDS = 0.05
TIMEOUT_SECONDS = 3600


@dataclass(frozen=True)
class Measured:
    """One run.

    Attributes:
        seconds: from its start to its end.
        peak_bytes: largest sum of its processes' PSS; 0 where it is not looked at.
    """

    seconds: float
    peak_bytes: int


def run(
    command: list[str],
    environment: Mapping[str, str],
    folder: Path,
    watch_memory: bool = True,
) -> Measured:
    """Runs a command to its end, in a folder that gets its output as `log`.

    Args:
        command: The program by an absolute path, and its arguments.
        environment: All its variables.
        folder: Where it runs.
        watch_memory: Look at its memory, which holds its processes up for a moment each time.

    Raises:
        SystemExit: if it fails, with the end of its output, or takes an hour.
    """
    log = folder / "log"
    peak = 0
    with log.open("wb") as output:
        start = time.monotonic()
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=dict(environment), cwd=folder
        )
        while process.returncode is None:
            if time.monotonic() - start > TIMEOUT_SECONDS:
                process.kill()
            try:
                process.wait(SAMPLE_SECONDS)
            except subprocess.TimeoutExpired:
                if watch_memory:
                    peak = max(peak, proportional_set_size(process.pid))
        seconds = time.monotonic() - start
    if process.returncode != 0:
        text = log.read_text(errors="replace")[-3000:]
        raise SystemExit(f"error: {shlex.join(command)} ended with {process.returncode}:\n{text}")
    return Measured(seconds, peak)


def proportional_set_size(pid: int) -> int:
    """Of a process and all below it."""
    try:
        parent = psutil.Process(pid)
        family = [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    total = 0
    for process in family:
        try:
            total += process.memory_full_info().pss
        except psutil.NoSuchProcess:
            continue
    return total
