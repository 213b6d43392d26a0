"""Helper processes that outlive the signal on which the run saves.

SLURM sends it to every process of a step, and a terminal sends Ctrl-C to every process of a job.
Those that load data and write checkpoints have no handler: they would end, and the save fail.
"""

from __future__ import annotations

import functools
import signal
from collections.abc import Iterable
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess
from typing import Any


def shield(signals: Iterable[signal.Signals]) -> None:
    """Have processes that `multiprocessing` starts from now on never see some signals.

    They are started with the signals blocked, which a new program inherits, as it does not a
    handler. `terminate()` kills them, as SIGTERM may be one.

    Args:
        signals: that end the run.
    """
    blocked = set(signals)
    start = BaseProcess.start

    @functools.wraps(start)
    def shielded(self: Any) -> None:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
        try:
            # It unblocks SIGTERM and SIGINT when it has to start its own process.
            resource_tracker.ensure_running()
            signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
            start(self)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self._popen.terminate = self._popen.kill

    BaseProcess.start = shielded  # type: ignore[method-assign]
