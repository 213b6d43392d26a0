"""Where a run can be killed: each is a place in Megatron or here, reached for the nth time."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any


def kill_writer() -> None:
    """SIGKILL to the process that writes the rank's checkpoint, and to nothing else."""
    os.kill(os.getpid(), signal.SIGKILL)


def kill_rank() -> None:
    """SIGKILL to this rank; from a process that writes its checkpoint, to both."""
    if os.environ["FAULT_RANK_PID"] != str(os.getpid()):
        os.kill(int(os.environ["FAULT_RANK_PID"]), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


class Countdown:
    """Kills the rank when it is called for the nth time.

    Args:
        count: n, from 1.
        kill: how.
    """

    def __init__(self, count: int, kill: Callable[[], None] = kill_rank) -> None:
        self._left = count
        self._kill = kill
        self._lock = threading.Lock()

    def __call__(self) -> None:
        """Count."""
        with self._lock:
            self._left -= 1
            if self._left == 0:
                self._kill()


def _before(owner: Any, name: str, countdown: Countdown) -> None:
    original = getattr(owner, name)

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        countdown()
        return original(*args, **kwargs)

    setattr(owner, name, wrapped)


def _after(owner: Any, name: str, countdown: Countdown) -> None:
    original = getattr(owner, name)

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        countdown()
        return result

    setattr(owner, name, wrapped)


def _forward(countdown: Countdown) -> None:
    from megatron.core.transformer.transformer_block import TransformerBlock

    _after(TransformerBlock, "forward", countdown)


def _backward(countdown: Countdown) -> None:
    from megatron.core.transformer.transformer_block import TransformerBlock

    original = TransformerBlock.forward

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        if output.requires_grad:
            output.register_hook(lambda gradient: countdown())
        return output

    TransformerBlock.forward = forward


def _optimizer(countdown: Countdown) -> None:
    """Parameters are new, the scheduler and the counters old."""
    from megatron.core.optimizer.optimizer import ChainedOptimizer

    _after(ChainedOptimizer, "step", countdown)


def _save(countdown: Countdown) -> None:
    from megatron.training import checkpointing

    _after(checkpointing, "generate_state_dict", countdown)


def _write(countdown: Countdown) -> None:
    """Between two tensors of a shard."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    _after(filesystem_async, "_write_item", countdown)


def _shard(countdown: Countdown) -> None:
    """A shard is whole, the checkpoint has no index yet."""
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    _before(FileSystemWriterAsync, "finish", countdown)


def _renamed(countdown: Countdown) -> None:
    """The index has its name, the checkpoint is not declared complete yet."""
    from torch.distributed.checkpoint.filesystem import FileSystem

    _after(FileSystem, "rename", countdown)


def _complete(countdown: Countdown) -> None:
    """The checkpoint is complete, the tracker names the one before."""
    from megatron.core.dist_checkpointing import serialization

    _after(serialization, "save_config", countdown)


def _tracker(countdown: Countdown) -> None:
    """The tracker is written under another name, and then has its own."""
    original = Path.replace

    def replace(self: Path, target: Any) -> Any:
        is_tracker = Path(target).name == "latest_checkpointed_iteration.txt"
        if is_tracker:
            countdown()
        result = original(self, target)
        if is_tracker:
            countdown()
        return result

    Path.replace = replace  # type: ignore[method-assign]


def _declared(countdown: Countdown) -> None:
    """A checkpoint is half declared complete: its file is there and empty."""
    from megatron.core.dist_checkpointing import core

    original = core.maybe_msc.open

    def opened(path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        stream = original(path, mode, *args, **kwargs)
        if str(path).endswith("metadata.json") and mode == "w":
            countdown()
        return stream

    core.maybe_msc.open = opened


def _data_index(countdown: Countdown) -> None:
    """An index of the data set is half written."""
    import numpy

    original = numpy.save

    def save(file: Any, array: Any, **kwargs: Any) -> None:
        whole = io.BytesIO()
        original(whole, array, **kwargs)
        data = whole.getvalue()
        with open(file, "wb") if isinstance(file, str) else contextlib.nullcontext(file) as stream:
            stream.write(data[: len(data) // 2])
            stream.flush()
            countdown()
            stream.write(data[len(data) // 2 :])

    numpy.save = save  # type: ignore[assignment]


# By name: how it is put in, and the largest count that a run of `campaign.ITERATIONS` reaches on
# rank 0; a run of two ranks with two micro-batches each and a checkpoint every third iteration.
POINTS: dict[str, tuple[Callable[[Countdown], None], int]] = {
    "forward": (_forward, 24),
    "backward": (_backward, 24),
    "optimizer": (_optimizer, 12),
    "save": (_save, 4),
    "write": (_write, 60),
    "writer": (_write, 60),
    "shard": (_shard, 4),
    "renamed": (_renamed, 4),
    "declared": (_declared, 4),
    "complete": (_complete, 4),
    "tracker": (_tracker, 8),
    "data index": (_data_index, 6),
}
# These happen in the process that writes the rank's checkpoints where saving is asynchronous, and
# the second of them in that alone.
IN_WRITER = ("write", "writer")
# These happen on rank 0 alone.
ON_RANK_0 = ("shard", "renamed", "declared", "complete", "tracker", "data index")


def kill_after(seconds: float) -> None:
    """Kill the rank whatever it is doing then."""
    timer = threading.Timer(seconds, kill_rank)
    timer.daemon = True
    timer.start()
