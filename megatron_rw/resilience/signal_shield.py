"""Shields helper processes from the signals on which a run saves and ends.

SLURM sends a signal to every process of a step, and a terminal sends Ctrl-C to every process of a
job. Processes that load data or write checkpoints have no handler for it: they would end, and the
rank could not save.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess
from typing import Any

from megatron_rw.patching import Around, Patch

# The signals that processes started from now on are shielded from.
blocked: set[signal.Signals] = set()


def patches() -> list[Patch]:
    """Returns what starts the processes of `multiprocessing` with the signals blocked."""
    why = (
        "A new program inherits blocked signals, but no handlers. `terminate()` kills the process "
        "instead, because SIGTERM may be one of the signals."
    )
    return [Patch(BaseProcess, "start", Around(_start), why, seen_in="Python 3.12")]


def _start(proceed: Callable[..., Any], call: dict[str, Any]) -> None:
    if not blocked:
        proceed()
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
    try:
        # The resource tracker unblocks SIGTERM and SIGINT when it has to start its own process.
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
        proceed()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    process: Any = call["self"]._popen
    process.terminate = process.kill
