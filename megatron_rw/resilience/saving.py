"""Saves checkpoints so that a failure leaves the older ones intact and all ranks in step.

Megatron's own saving is wrapped. A checkpoint that is written over is marked incomplete first. The
tracker is renamed into place. When a rank cannot write, all ranks learn of it, and what was written
of the checkpoint is deleted.
"""

import contextlib
import io
import os
import shutil
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch.distributed as dist
from megatron.core.dist_checkpointing import serialization
from megatron.core.msc_utils import maybe_msc
from megatron.training import async_utils, checkpointing, training
from megatron.training.utils import print_rank_0
from torch.distributed.checkpoint.api import CheckpointException

from megatron_rw.errors import print_error
from megatron_rw.patching import Around, Patch, StandIn
from megatron_rw.platform.files import write_complete
from megatron_rw.resilience import writer
from megatron_rw.resilience.folder import TRACKER, CheckpointFolder, superfluous

_CANNOT_SAVE = 1  # Exit status of a run that stops because it cannot save.


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Which checkpoints to keep, and how a run ends that cannot save or is not finished."""

    keep_last: int | None = None
    """How many of the newest checkpoints in --save to keep; older ones are deleted once a newer one
    is complete. All by default."""

    keep_every: int | None = None
    """Keep, beside those of --keep-last, the checkpoints whose iteration is a multiple of this."""

    on_save_error: Literal["stop", "continue"] = "stop"
    """What to do when a checkpoint cannot be written (disk full, no permission, quota). The
    checkpoint before it is untouched in either case."""

    exit_code_when_unfinished: int = 0
    """Exit status of a run that ends in good order before its last iteration: on a signal
    (--exit-signal-handler), --exit-duration-in-mins or --exit-interval. A batch script can tell by
    it whether to put the job into the queue again. 0 by default, as in Megatron."""

    allow_changed_data: bool = False
    """Resume although a dataset is no longer the one that the checkpoint was trained on."""


class SaveGuard:
    """Runs Megatron's saving of distributed checkpoints to the folder of --save, on every rank.

    With --async-save Megatron writes in the background. `saved` is called, on every rank, with the
    iteration of each checkpoint that is complete.
    """

    def __init__(
        self, folder: str, config: CheckpointConfig, is_async: bool, saved: Callable[[int], None]
    ) -> None:
        self._config = config
        self._is_async = is_async
        self._saved = saved
        self._folder = CheckpointFolder(folder)
        # An error that only this rank knows of; Megatron would leave the other ranks waiting.
        self._problem: str | None = None
        # Iterations whose checkpoints are being written, the oldest first.
        self._unfinished: deque[int] = deque()

    def patches(self) -> list[Patch]:
        """Returns the patches that put the guard around Megatron's functions."""
        ranks = "An error on one rank leaves the others waiting in a collective."
        tracker = "Megatron does not rename the tracker into place; a killed run leaves it empty."
        return [
            Patch(training, "save_checkpoint", Around(self._save), ranks),
            Patch(training, "maybe_finalize_async_save", Around(self._finalize), ranks),
            Patch(serialization, "save_config", Around(self._declare), ranks),
            Patch(checkpointing, "maybe_msc", StandIn(maybe_msc, open=self._open), tracker),
        ]

    def _save(self, proceed: Callable[..., Any], call: dict[str, Any]) -> None:
        iteration = call["iteration"]
        if dist.get_rank() == 0:
            self._problem = self._prepare(iteration)
        if self._failed(iteration):
            return
        self._unfinished.append(iteration)
        if self._guarded(proceed) and not self._is_async:
            self._end(self._unfinished.popleft())

    def _finalize(self, proceed: Callable[..., Any], call: dict[str, Any]) -> None:
        if not self._is_async:
            proceed()
            return
        before = _pending()
        if self._guarded(proceed):
            # All ranks complete the same number.
            for _ in range(before - _pending()):
                self._end(self._unfinished.popleft())

    def _end(self, iteration: int) -> None:
        if not self._failed(iteration):
            self._saved(iteration)

    def _guarded(self, proceed: Callable[..., Any]) -> bool:
        """Calls Megatron; False on an error that Megatron has told all ranks of."""
        try:
            proceed()
        except (CheckpointException, OSError) as error:
            self._give_up(self._unfinished.popleft(), _reason(error))
            return False
        return True

    def _prepare(self, iteration: int) -> str | None:
        """Returns what keeps rank 0 from writing there; Megatron would tell no other rank."""
        path = self._folder.path / f"iter_{iteration:07d}"
        try:
            path.mkdir(parents=True, exist_ok=True)
            if self._folder.undeclare(iteration):
                print_rank_0(f"> the checkpoint of iteration {iteration} is written over")
            probe = path / ".writable"
            probe.write_text("")
            probe.unlink()
        except OSError as error:
            return str(error)
        return None

    def _declare(self, proceed: Callable[..., Any], call: dict[str, Any]) -> None:
        """Declares a checkpoint complete. Only rank 0 does so, and the others wait for it."""
        try:
            proceed()
        except OSError as error:
            self._problem = str(error)

    def _open(self, path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        """Opens a file for Megatron."""
        if "w" in mode and os.path.basename(str(path)) == TRACKER:
            return self._tracker()
        return maybe_msc.open(path, mode, *args, **kwargs)

    @contextlib.contextmanager
    def _tracker(self) -> Iterator[io.StringIO]:
        """Writes the tracker, on rank 0 when all is written, and then deletes old checkpoints."""
        stream = io.StringIO()
        yield stream
        if self._problem is not None:
            return
        try:
            write_complete(self._folder.path / TRACKER, stream.getvalue())
        except OSError as error:
            self._problem = str(error)
            return
        self._retain()

    def _retain(self) -> None:
        complete = {c.iteration: c for c in self._folder.checkpoints() if c.defect() is None}
        old = superfluous(list(complete), self._config.keep_last, self._config.keep_every)

        def delete() -> None:
            for iteration in old:
                self._folder.delete(complete[iteration])

        if old:
            print_rank_0(f"> deleting the checkpoints of iterations {', '.join(map(str, old))}")
            # If the run ends before that is done, the next run deletes the rest at its start.
            threading.Thread(target=delete, daemon=True).start()

    def _failed(self, iteration: int) -> bool:
        """Shares rank 0's problem with a checkpoint, if there is one. Collective."""
        shared = [self._problem]
        dist.broadcast_object_list(shared, src=0)
        if shared[0] is None:
            return False
        self._give_up(iteration, shared[0])
        return True

    def _give_up(self, iteration: int, reason: str) -> None:
        self._problem = None
        abandoned = [iteration]
        if self._config.on_save_error == "stop":
            # A later checkpoint may be being written already.
            writer.stop()
            dist.barrier()
            abandoned += self._unfinished
        if dist.get_rank() == 0:
            self._tell(iteration, reason, abandoned)
        if self._config.on_save_error == "stop":
            # Rank 0 has printed the reason, so no traceback is needed.
            dist.barrier()
            sys.exit(_CANNOT_SAVE)

    def _tell(self, iteration: int, reason: str, abandoned: Iterable[int]) -> None:
        for other in abandoned:
            shutil.rmtree(self._folder.path / f"iter_{other:07d}", ignore_errors=True)
        last = self._folder.tracked()
        before = "there is none before it" if last is None else f"that of iteration {last} is there"
        free = ""
        with contextlib.suppress(OSError):
            megabytes = shutil.disk_usage(self._folder.path).free / 2**20
            free = f"{megabytes:,.0f} MiB are free there. "
        then = "The run goes on."
        if self._config.on_save_error == "stop":
            then = (
                "The run stops: make room or mend the folder, then start it again "
                "(--on-save-error continue would go on)."
            )
        print_error(
            f"the checkpoint of iteration {iteration} could not be saved to {self._folder.path}: "
            f"{reason}. {free}What was written of it is deleted; {before}. {then}"
        )


def _pending() -> int:
    """Returns how many checkpoints are being written in the background."""
    queue = async_utils._async_calls_queue
    return 0 if queue is None else int(queue.get_num_unfinalized_calls())


def _reason(error: BaseException) -> str:
    """Returns the root of an error that other ranks and processes have wrapped."""
    if not isinstance(error, CheckpointException):
        return str(error)
    failures = sorted(error.failures.items())
    roots = [f"rank {rank}: {writer.root(wrapped[0])}" for rank, wrapped in failures]
    return "; ".join(roots) or "a rank failed to write, see its output"
