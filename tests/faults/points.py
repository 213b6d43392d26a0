"""Where a run can be killed: each is a place in Megatron or here, reached for the nth time."""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import os
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rw.resilience import writer


def kill_writer() -> None:
    """SIGKILL to the process that writes the rank's checkpoint, and to nothing else."""
    os.kill(os.getpid(), signal.SIGKILL)


def kill_rank() -> None:
    """SIGKILL to this rank; from a process that writes its checkpoint, to both."""
    if os.environ["FAULT_RANK_PID"] != str(os.getpid()):
        os.kill(int(os.environ["FAULT_RANK_PID"]), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


class Countdown:
    """Kills the rank when it is called for the nth time."""

    def __init__(self, count: int, kill: Callable[[], None] = kill_rank) -> None:
        self._left = count
        self._kill = kill
        self._lock = threading.Lock()

    def __call__(self) -> None:
        with self._lock:
            self._left -= 1
            if self._left == 0:
                self._kill()


Install = Callable[[Any, Countdown], Any]


def after(original: Any, countdown: Countdown) -> Any:
    """Counts when a call has returned."""

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        countdown()
        return result

    return wrapped


def before(original: Any, countdown: Countdown) -> Any:
    """Counts when a call begins."""

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        countdown()
        return original(*args, **kwargs)

    return wrapped


def in_backward(original: Any, countdown: Countdown) -> Any:
    """Counts when the gradient of a call's result is computed."""

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        if output.requires_grad:
            output.register_hook(lambda gradient: countdown())
        return output

    return wrapped


def around_tracker(original: Any, countdown: Countdown) -> Any:
    """Counts before and after a renaming that gives the tracker its name."""

    def replace(self: Path, target: Any) -> Any:
        is_tracker = Path(target).name == "latest_checkpointed_iteration.txt"
        if is_tracker:
            countdown()
        result = original(self, target)
        if is_tracker:
            countdown()
        return result

    return replace


def declared_by_half(original: Any, countdown: Countdown) -> Any:
    """Counts when a checkpoint's metadata.json is there and empty."""

    def opened(path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        stream = original(path, mode, *args, **kwargs)
        if str(path).endswith("metadata.json") and mode == "w":
            countdown()
        return stream

    return opened


def written_by_half(original: Any, countdown: Countdown) -> Any:
    """Counts when an array is half written."""

    def save(file: Any, array: Any, **kwargs: Any) -> None:
        whole = io.BytesIO()
        original(whole, array, **kwargs)
        data = whole.getvalue()
        with open(file, "wb") if isinstance(file, str) else contextlib.nullcontext(file) as stream:
            stream.write(data[: len(data) // 2])
            stream.flush()
            countdown()
            stream.write(data[len(data) // 2 :])

    return save


@dataclass(frozen=True)
class Point:
    function: str  # `module:function` or `module:Class.method`.
    moment: Install  # Gives what takes its place, and counts.
    # The largest count that a run of `campaign.ITERATIONS` reaches on rank 0; a run of two ranks
    # with two micro-batches each and a checkpoint every third iteration.
    most: int
    on_rank_0: bool = False  # It is reached on rank 0 alone.

    def install(self, countdown: Countdown) -> None:
        module, _, path = self.function.partition(":")
        *owners, name = path.split(".")
        owner = functools.reduce(getattr, owners, importlib.import_module(module))
        setattr(owner, name, self.moment(getattr(owner, name), countdown))


_BLOCK = "megatron.core.transformer.transformer_block:TransformerBlock.forward"
_CHECKPOINT = "megatron.core.dist_checkpointing"
_ITEM = f"{_CHECKPOINT}.strategies.filesystem_async:_write_item"
_FINISH = f"{_CHECKPOINT}.strategies.filesystem_async:FileSystemWriterAsync.finish"
_STEP = "megatron.core.optimizer.optimizer:ChainedOptimizer.step"
POINTS = {
    "forward": Point(_BLOCK, after, 24),
    "backward": Point(_BLOCK, in_backward, 24),
    # Parameters are new, the scheduler and the counters old.
    "optimizer": Point(_STEP, after, 12),
    "save": Point("megatron.training.checkpointing:generate_state_dict", after, 4),
    # Between two tensors of a shard.
    "write": Point(_ITEM, after, 60),
    "writer": Point(_ITEM, after, 60),
    # A shard is whole, the checkpoint has no index yet.
    "shard": Point(_FINISH, before, 4, on_rank_0=True),
    # The index has its name, the checkpoint is not declared complete yet.
    "renamed": Point(
        "torch.distributed.checkpoint.filesystem:FileSystem.rename", after, 4, on_rank_0=True
    ),
    "declared": Point(f"{_CHECKPOINT}.core:maybe_msc.open", declared_by_half, 4, on_rank_0=True),
    # The checkpoint is complete, the tracker names the one before.
    "complete": Point(f"{_CHECKPOINT}.serialization:save_config", after, 4, on_rank_0=True),
    "tracker": Point("pathlib:Path.replace", around_tracker, 8, on_rank_0=True),
    "data index": Point("numpy:save", written_by_half, 6, on_rank_0=True),
}
# These happen in the process that writes the rank's checkpoints where saving is asynchronous, and
# the second of them in that alone.
IN_WRITER = ("write", "writer")


def inject(fault: dict[str, Any] | None) -> None:
    """Lets this rank be killed as a `campaign.Fault` says."""
    os.environ["FAULT_RANK_PID"] = str(os.getpid())
    if fault is None or int(os.environ["RANK"]) not in fault["ranks"]:
        return
    if fault["point"] == "any time":
        kill_after(fault["count"] / 1000)
    elif fault["point"] in IN_WRITER and "asynchronous" in fault["variant"]:
        writer._main = functools.partial(_writer_main, fault)
    else:
        POINTS[fault["point"]].install(Countdown(fault["count"]))


def _writer_main(fault: dict[str, Any], device: Any, rank_pid: int, *args: Any) -> None:
    os.environ["FAULT_RANK_PID"] = str(rank_pid)
    kill = kill_writer if fault["point"] == "writer" else kill_rank
    POINTS[fault["point"]].install(Countdown(fault["count"], kill))
    writer._main(device, rank_pid, *args)


def kill_after(seconds: float) -> None:
    """Kills the rank whatever it is doing then."""
    timer = threading.Timer(seconds, kill_rank)
    timer.daemon = True
    timer.start()
