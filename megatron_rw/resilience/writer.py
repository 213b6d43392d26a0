"""Ends the process that writes a rank's checkpoints in the background, and tells its errors.

Megatron starts one for each rank with --use-persistent-ckpt-worker.
"""

import functools
import os
import select
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing.util import Finalize
from typing import Any

from megatron.core.dist_checkpointing.strategies.async_utils import (
    AsyncCallsQueue,
    PersistentAsyncCaller,
)
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

from megatron_rw import patching
from megatron_rw.errors import print_error
from megatron_rw.patching import Around, Patch
from megatron_rw.platform import Device

_original_loop = PersistentAsyncCaller.async_loop

_POLL_SECONDS = 0.05  # Poll interval while all ranks wait for their writers.


def patches(device: Device) -> list[Patch]:
    """Returns what makes writer processes end with their rank, and tell what went wrong."""
    caller, main = PersistentAsyncCaller, functools.partial(_main, device, os.getpid())
    outlives = (
        "Megatron's writer outlives a rank that is killed, and may then write into the same "
        "checkpoint as the next attempt."
    )
    polls = "A rank whose writer has died polls it for ever."
    waits = "A rank waits for ever for a writer that dies before it has copied the tensors."
    return [
        *_writing_patches(),
        Patch(caller, "async_loop", staticmethod(main), outlives),
        Patch(caller, "is_current_async_call_done", Around(_done), polls),
        Patch(caller, "schedule_async_call", Around(_schedule), waits),
    ]


def end_with_this_process() -> None:
    """Ends the writer at the end of this process, even if the process fails."""
    Finalize(None, stop, exitpriority=100)


def stop() -> None:
    """Kills the writer, whatever it is writing. Megatron's own end would wait for it for ever."""
    process = PersistentAsyncCaller._persistent_process
    if process is not None:
        process.kill()
    if AsyncCallsQueue._persistent_caller is not None:
        AsyncCallsQueue._persistent_caller.process = None


def _writing_patches() -> list[Patch]:
    """Returns what tells errors of writing, in a rank (synchronous saving) or in its writer."""
    why = "Of an error that is returned, Megatron reports the class and not the message."
    return [Patch(FileSystemWriterAsync, "write_preloaded_data", Around(_write), why)]


def _write(proceed: Callable[..., Any], call: dict[str, Any]) -> Any:
    result = proceed()
    # With several threads an error travels in a queue, and must not be raised here.
    if call["results_queue"] is None and isinstance(result[1], Exception):
        raise root(result[1])
    return result


def root(error: BaseException) -> BaseException:
    """Returns the error of the operating system behind an error, otherwise the error itself."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    return cause or error


def _main(device: Device, rank_pid: int, *args: Any) -> None:
    """Runs the writer's process."""
    threading.Thread(target=_end_with, args=(rank_pid,), daemon=True).start()
    if device == "cpu":
        from megatron_rw.platform import cpu

        cpu.redirect_torch()
    patching.apply(_writing_patches())
    _original_loop(*args)


def _end_with(pid: int) -> None:
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        pass
    else:
        select.select([process], [], [])
    os.kill(os.getpid(), signal.SIGKILL)


def _done(proceed: Callable[..., bool], call: dict[str, Any]) -> bool:
    """Returns whether all ranks' writers are done; ends the process if this rank's has died."""
    while True:
        _end_if_dead(call["self"].process)
        if proceed(blocking=False):
            return True
        if not call["blocking"]:
            return False
        # The answer is the same on all ranks, so they make the same number of collective calls.
        time.sleep(_POLL_SECONDS)


def _schedule(proceed: Callable[..., None], call: dict[str, Any]) -> None:
    """Gives a checkpoint to the writer, and ends the process if the writer dies meanwhile."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(_POLL_SECONDS):
            _end_if_dead(call["self"].process)

    threading.Thread(target=watch, daemon=True).start()
    try:
        proceed()
    finally:
        over.set()


def _end_if_dead(writer: Any) -> None:
    if writer is None or writer.is_alive():
        return
    print_error(
        f"the process that writes this rank's checkpoints has died, exit code {writer.exitcode}. "
        "-9 is most often a lack of memory on the host: async saving holds a copy of the rank's "
        "shard there. The newest complete checkpoint is untouched; start again, or without "
        "--async-save."
    )
    # Megatron's own end would wait for the writer.
    os._exit(1)
