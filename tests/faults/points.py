"""Where a run can be killed: each is a place in Megatron or here, reached for the nth time."""

from __future__ import annotations

import functools
import os
import pkgutil
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


def kill(ranks_pid: int | None = None) -> None:
    """SIGKILL to this process, and to the rank whose checkpoints it writes, if that is given."""
    for pid in (ranks_pid, os.getpid()):
        if pid is not None:
            os.kill(pid, signal.SIGKILL)


def kill_after(seconds: float) -> None:
    """Kills the rank whatever it is doing then."""
    timer = threading.Timer(seconds, kill)
    timer.daemon = True
    timer.start()


# A moment of a call. It makes the call, and counts when the run has got to the point.
Proceed = Callable[[], Any]
Count = Callable[[], None]
Moment = Callable[[Proceed, Count, tuple[Any, ...]], Any]


def before(proceed: Proceed, count: Count, _: tuple[Any, ...]) -> Any:
    count()
    return proceed()


def after(proceed: Proceed, count: Count, _: tuple[Any, ...]) -> Any:
    result = proceed()
    count()
    return result


def in_backward(proceed: Proceed, count: Count, _: tuple[Any, ...]) -> Any:
    """Counts when the gradient of the result is computed."""
    output = proceed()
    if output.requires_grad:
        output.register_hook(lambda gradient: count())
    return output


def around_tracker(proceed: Proceed, count: Count, args: tuple[Any, ...]) -> Any:
    """Counts before and after a renaming that gives the tracker its name."""
    if Path(args[1]).name != "latest_checkpointed_iteration.txt":
        return proceed()
    count()
    return after(proceed, count, args)


def declared_by_half(proceed: Proceed, count: Count, args: tuple[Any, ...]) -> Any:
    """Counts when a checkpoint's metadata.json is there and empty."""
    stream = proceed()
    if str(args[0]).endswith("metadata.json") and args[1:] == ("w",):
        count()
    return stream


def written_by_half(proceed: Proceed, count: Count, args: tuple[Any, ...]) -> Any:
    """Counts when an array is half written."""
    proceed()
    file = args[0]
    if not isinstance(file, str):
        file.flush()
        file = file.name
    whole = Path(file).read_bytes()
    Path(file).write_bytes(whole[: len(whole) // 2])
    count()
    Path(file).write_bytes(whole)


@dataclass(frozen=True)
class Point:
    """A place.

    Attributes:
        owner: Module or class, and the name of its function.
        moment: Of a call of it.
        most: The largest count that a run of `campaign.ITERATIONS` reaches on rank 0; a run of two
            ranks with two micro-batches each and a checkpoint every third iteration.
        on_rank_0: It is reached on rank 0 alone.
    """

    owner: tuple[str, str]
    moment: Moment
    most: int
    on_rank_0: bool = False

    def install(self, number: int, ranks_pid: int | None = None) -> None:
        """Kills as `kill` does when the run gets there for the nth time, from 1."""
        owner, name = pkgutil.resolve_name(self.owner[0]), self.owner[1]
        original = getattr(owner, name)
        left, lock = number, threading.Lock()

        def count() -> None:
            nonlocal left
            with lock:
                left -= 1
                if left == 0:
                    kill(ranks_pid)

        @functools.wraps(original)
        def counted(*args: Any, **kwargs: Any) -> Any:
            return self.moment(functools.partial(original, *args, **kwargs), count, args)

        setattr(owner, name, counted)


_CHECKPOINT = "megatron.core.dist_checkpointing"
_WRITING = f"{_CHECKPOINT}.strategies.filesystem_async"
_BLOCK = ("megatron.core.transformer.transformer_block.TransformerBlock", "forward")
_RENAME = ("torch.distributed.checkpoint.filesystem.FileSystem", "rename")
POINTS = {
    "forward": Point(_BLOCK, after, 24),
    "backward": Point(_BLOCK, in_backward, 24),
    # Parameters are new, the scheduler and the counters old.
    "optimizer": Point(("megatron.core.optimizer.optimizer.ChainedOptimizer", "step"), after, 12),
    "save": Point(("megatron.training.checkpointing", "generate_state_dict"), after, 4),
    # Between two tensors of a shard.
    "write": Point((_WRITING, "_write_item"), after, 60),
    "writer": Point((_WRITING, "_write_item"), after, 60),
    # A shard is whole, the checkpoint has no index yet.
    "shard": Point((f"{_WRITING}.FileSystemWriterAsync", "finish"), before, 4, on_rank_0=True),
    # The index has its name, the checkpoint is not declared complete yet.
    "renamed": Point(_RENAME, after, 4, on_rank_0=True),
    "declared": Point((f"{_CHECKPOINT}.core.maybe_msc", "open"), declared_by_half, 4, True),
    # The checkpoint is complete, the tracker names the one before.
    "complete": Point((f"{_CHECKPOINT}.serialization", "save_config"), after, 4, on_rank_0=True),
    "tracker": Point(("pathlib.Path", "replace"), around_tracker, 8, on_rank_0=True),
    "data index": Point(("numpy", "save"), written_by_half, 6, on_rank_0=True),
}
# These happen in the process that writes the rank's checkpoints where saving is asynchronous, and
# the second of them in that alone.
IN_WRITER = ("write", "writer")
