"""The slowest rank of each logging interval (`--log-slowest-rank`).

All ranks wait for the slowest in each step, so the step time does not tell which one it is. The
time of the forward passes does, with the reading of their micro-batches: it holds no pipeline
sends, no reduction of gradients and no collectives of the loss. It does hold tensor- and
expert-parallel collectives: the ranks of such a group are slow together, and any may be named.

Megatron's `--log-straggler` is for CUDA alone, names no host, needs nvidia-ml-py and opens port
65535 of rank 0 to everybody.
"""

import dataclasses
import socket
import time
from dataclasses import dataclass
from statistics import median_low
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import mpu
from megatron.training import print_rank_last
from torch import Tensor

from megatron_rw.platform import Device
from megatron_rw.resilience.step_samples import gather
from megatron_rw.training.callbacks.base import Callback, LogEvent


@dataclass(frozen=True)
class SlowestRank:
    """The slowest rank of a logging interval."""

    rank: int
    host: str
    ratio: float  # Its forward time over the lower median of its pipeline stage's ranks.
    seconds: float  # Its forward time, over the interval.


class StragglerCallback(Callback):
    """Times the forward passes of training, and names the slowest rank."""

    def __init__(self, device: Device) -> None:
        self._device = device
        # Begin and end of each pass, as `_now` gives them.
        self._passes: list[tuple[Any, Any]] = []
        self._hosts: list[str] | None = None

    def before_batch(self, training: bool) -> None:
        """Begins to time a pass, reading its micro-batch included."""
        if training:
            self._begin = self._now()

    def after_forward(self, training: bool) -> None:
        """Ends the time of the pass. One that fails is not ended, and does not count."""
        if training:
            self._passes.append((self._begin, self._now()))

    def _now(self) -> Any:
        """Returns an event where the device is in its work, without waiting; seconds on the CPU."""
        if self._device == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def on_log(self, log: LogEvent) -> None:
        """Compares the ranks at the end of an interval, where the device has finished the passes.

        It costs one all-gather of 16 bytes a rank, and the first time one of the hosts' names.
        """
        if not log.ends_interval:
            return
        seconds = sum(
            end - begin if self._device == "cpu" else begin.elapsed_time(end) / 1e3
            for begin, end in self._passes
        )
        self._passes = []
        if self._hosts is None:
            self._hosts = gather(socket.gethostname())
        stage = mpu.get_pipeline_model_parallel_rank()
        mine = torch.tensor([[stage, seconds]], device=torch.cuda.current_device()).double()
        table = mine.new_empty(dist.get_world_size(), 2)
        dist.all_gather_into_tensor(table, mine)
        found = slowest(table, self._hosts)
        if found is None:
            return
        print_rank_last(
            f" slowest rank: {found.rank} on {found.host}, {found.ratio:.2f} of the median forward "
            f"time ({found.seconds:.3f} s), up to iteration {log.iteration}"
        )
        log.record["slowest_rank"] = dataclasses.asdict(found)
        log.scalars["slowest rank/rank"] = found.rank
        log.scalars["slowest rank/ratio"] = found.ratio


def slowest(table: Tensor, hosts: list[str]) -> SlowestRank | None:
    """Returns the rank that is furthest above the median of its pipeline stage.

    `table` has the pipeline stage and seconds of each rank, `[ranks, 2]`. The ranks of a stage have
    the same work. Returns None if no rank has run a forward pass.
    """
    rows = table.tolist()
    medians = {
        stage: median_low(seconds for other, seconds in rows if other == stage)
        for stage in {stage for stage, _ in rows}
    }
    ratios = [seconds / medians[stage] if medians[stage] else 0.0 for stage, seconds in rows]
    rank = max(range(len(rows)), key=ratios.__getitem__)
    if not ratios[rank]:
        return None
    return SlowestRank(rank, hosts[rank], ratios[rank], rows[rank][1])
