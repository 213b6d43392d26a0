"""Ends a run on signals, and with an exit status that says whether there is more to do.

SLURM sends a signal to every process of a step, and a terminal sends Ctrl-C to every process of a
job. Processes that load data or write checkpoints would end, and the rank could not save. They are
therefore started with the signals blocked on which a run saves and ends.
"""

import os
import signal
import sys
from argparse import Namespace
from collections.abc import Callable
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any

import torch.distributed as dist
from megatron.training.dist_signal_handler import DistributedSignalHandler

from megatron_rw.errors import INTERRUPTED_STATUS
from megatron_rw.patching import Around, Patch

# The signals that are blocked in processes started from now on.
_blocked: set[signal.Signals] = set()


def patches() -> list[Patch]:
    """Returns what lets several signals end the run after its step (--exit-signal-handler)."""
    why = (
        "Megatron waits for one signal, --exit-signal. A cluster sends SIGTERM when it takes nodes "
        "back and another signal (SLURM's --signal) some time before, and a user sends Ctrl-C. All "
        "of them have the run finish its step, save and leave; a second Ctrl-C stops it at once."
    )
    blocked = (
        "A new program inherits blocked signals, but no handlers. `terminate()` kills the process "
        "instead, because SIGTERM may be one of the signals."
    )
    return [
        Patch(DistributedSignalHandler, "__enter__", _enter, why),
        Patch(DistributedSignalHandler, "release", _release, why),
        Patch(BaseProcess, "start", Around(_start_process), blocked, seen_in="Python 3.12"),
    ]


def _enter(self: Any) -> Any:
    self._signal_received = False
    self.released = False

    def handler(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._signal_received:
            os._exit(INTERRUPTED_STATUS)
        self._signal_received = True

    signals = {signal.Signals(self.sig), signal.SIGTERM, signal.SIGUSR1, signal.SIGINT}
    self.original_handlers = {number: signal.signal(number, handler) for number in signals}
    _blocked.update(signals)
    return self


def _release(self: Any) -> bool:
    if self.released:
        return False
    for number, original in self.original_handlers.items():
        signal.signal(number, original)
    self.released = True
    return True


def _start_process(proceed: Callable[..., Any], call: dict[str, Any]) -> None:
    if not _blocked:
        proceed()
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _blocked)
    try:
        # The resource tracker unblocks SIGTERM and SIGINT when it has to start its own process.
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, _blocked)
        proceed()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    process: Any = call["self"]._popen
    process.terminate = process.kill


def run_to_its_end(args: Namespace, when_unfinished: int, train: Callable[[], Any]) -> None:
    """Trains, and ends the process with a status that tells whether there is more to do.

    The status is `when_unfinished` if the run ends in good order before its last iteration, on a
    signal or by one of Megatron's --exit-* flags. A run that fails keeps its own status, and its
    process groups: destroying them could wait for ranks that are gone. `train` returns, or raises
    SystemExit, at the end of the run.
    """
    status: Any = 0
    try:
        train()
    except SystemExit as left:
        status = left.code or 0
    if status == 0:
        # When the interpreter ends them, threads of gloo have been seen to abort the process.
        if dist.is_initialized():
            dist.destroy_process_group()
        # The index of the last step that ran; a run that has nothing left to do has none.
        last = getattr(args, "curr_iteration", None)
        trains = args.train_iters and not args.skip_train
        if trains and last is not None and last + 1 < args.train_iters:
            status = when_unfinished
    if status != 0:
        sys.exit(status)
