"""The process that writes a rank's checkpoints in the background: --use-persistent-ckpt-worker."""

from __future__ import annotations

import functools
import os
import select
import signal
import sys
import threading
import time
from multiprocessing.util import Finalize
from typing import Any

from megatron.core.dist_checkpointing.strategies.async_utils import (
    AsyncCallsQueue,
    PersistentAsyncCaller,
)
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

from megatron_rw.platform import Device

_original_loop = PersistentAsyncCaller.async_loop
_original_done = PersistentAsyncCaller.is_current_async_call_done

# Between two looks at a writer that all ranks wait for.
_PAUSE_S = 0.05


def install(device: Device) -> None:
    """Have Megatron's writers end with their rank, keep their errors' words, and be missed.

    Megatron's own outlives a rank that is killed, and may then write into a checkpoint that the
    next attempt writes as well; and a rank whose writer has died polls for it for ever.

    Args:
        device: in use.
    """
    keep_words()
    main = functools.partial(_main, device, os.getpid())
    PersistentAsyncCaller.async_loop = staticmethod(main)
    PersistentAsyncCaller.is_current_async_call_done = _done
    # Also when the rank fails.
    Finalize(None, stop, exitpriority=100)


def stop() -> None:
    """End the writer, whatever it is writing. Megatron's own end would wait for it for ever."""
    process = PersistentAsyncCaller._persistent_process
    if process is not None:
        process.kill()
    if AsyncCallsQueue._persistent_caller is not None:
        AsyncCallsQueue._persistent_caller.process = None


def keep_words() -> None:
    """Have an error in writing keep its words: of one that is returned Megatron reports the class.

    In the rank for synchronous saves, in its writer for asynchronous ones.
    """
    write = FileSystemWriterAsync.write_preloaded_data

    @functools.wraps(write)
    def writing(*args: Any, **kwargs: Any) -> Any:
        result = write(*args, **kwargs)
        # A thread of several hands its error over by a queue, and must not raise.
        if kwargs.get("results_queue") is None and isinstance(result[1], Exception):
            raise root(result[1])
        return result

    FileSystemWriterAsync.write_preloaded_data = staticmethod(writing)


def root(error: BaseException) -> BaseException:
    """What the operating system said, where it did, otherwise the error itself."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    return cause or error


def _main(device: Device, rank_pid: int, *args: Any) -> None:
    """What runs in the writer."""
    threading.Thread(target=_end_with, args=(rank_pid,), daemon=True).start()
    if device == "cpu":
        from megatron_rw.platform import cpu

        cpu.redirect_torch()
    keep_words()
    _original_loop(*args)


def _end_with(pid: int) -> None:
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        pass
    else:
        select.select([process], [], [])
    os.kill(os.getpid(), signal.SIGKILL)


def _done(caller: Any, blocking: bool = False, no_dist: bool = False) -> bool:
    """As Megatron's, whether all ranks' writers are done, and notices that this one's has died."""
    while True:
        writer = caller.process
        if writer is not None and not writer.is_alive():
            print(
                f"error: the process that writes this rank's checkpoints has died, exit code "
                f"{writer.exitcode}. -9 is most often a lack of memory on the host: async saving "
                "holds a copy of the rank's shard there. The newest complete checkpoint is "
                "untouched; start again, or without --async-save.",
                file=sys.stderr,
                flush=True,
            )
            # Megatron's own end would wait for the writer.
            os._exit(1)
        if _original_done(caller, False, no_dist):
            return True
        if not blocking:
            return False
        # The answer is the same on all ranks, so that they ask equally often.
        time.sleep(_PAUSE_S)
