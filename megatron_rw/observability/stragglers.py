"""Finds the slowest rank of a logging interval (`--log-slowest-rank`).

A slow GPU, a busy host or a slow disk holds up every rank, since all ranks wait for each other in
each step. The step time therefore does not tell which rank is slow. The time of the forward passes
does, with the reading of their micro-batches: it holds no pipeline sends, no reduction of gradients
and no collectives of the loss. It does hold tensor- and expert-parallel collectives: the ranks of
such a group are slow together, and any of them may be named.

Megatron's `--log-straggler` is for CUDA alone, names no host, needs nvidia-ml-py and opens port
65535 of rank 0 to everybody.
"""

from __future__ import annotations

import functools
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median_low
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rw.platform import Device


class HostEvent:
    """The counterpart of `torch.cuda.Event` on the CPU."""

    def record(self) -> None:
        """Records the current time."""
        self._seconds = time.perf_counter()

    def elapsed_time(self, end_event: HostEvent, /) -> float:
        """Returns the milliseconds from this event to another."""
        return (end_event._seconds - self._seconds) * 1e3


def event_maker(device: Device) -> Callable[[], Any]:
    """Returns the function that makes the events of a device."""
    return (
        functools.partial(torch.cuda.Event, enable_timing=True) if device == "cuda" else HostEvent
    )


@dataclass(frozen=True)
class SlowestRank:
    """The slowest rank of a logging interval."""

    rank: int
    host: str
    ratio: float  # Its forward time over the lower median of its pipeline stage's ranks.
    seconds: float  # Its forward time, over the interval.

    def __str__(self) -> str:
        return (
            f"slowest rank: {self.rank} on {self.host}, {self.ratio:.2f} of the median forward "
            f"time ({self.seconds:.3f} s)"
        )


class ForwardTimes:
    """Times this rank's forward passes with events of `event_maker`; finds the slowest rank."""

    def __init__(self, make_event: Callable[[], Any]) -> None:
        self._make_event = make_event
        self._pairs: list[tuple[Any, Any]] = []
        # Events are reused, so that an interval of thousands of passes makes no new ones.
        self._free: list[tuple[Any, Any]] = []
        self._hosts: list[str] | None = None

    def begin(self) -> None:
        """Begins to time a forward pass, without waiting for the device."""
        self._open = self._free.pop() if self._free else (self._make_event(), self._make_event())
        self._open[0].record()

    def end(self) -> None:
        """Ends the time of the pass. One that fails is not ended, and does not count."""
        self._open[1].record()
        self._pairs.append(self._open)

    def read(self, stage: int) -> SlowestRank | None:
        """Compares the interval's times and begins a new interval. Collective over all ranks.

        Call it where the device has finished the passes. It costs one all-gather of 16 bytes a
        rank, and the first time one of the hosts' names. Ranks are compared with those of their
        pipeline stage, which have the same work.
        """
        seconds = sum(begin.elapsed_time(end) for begin, end in self._pairs) / 1e3
        self._free += self._pairs
        self._pairs = []
        if self._hosts is None:
            self._hosts = [""] * dist.get_world_size()
            dist.all_gather_object(self._hosts, socket.gethostname())
        mine = torch.tensor([[stage, seconds]], device=torch.cuda.current_device()).double()
        table = mine.new_empty(dist.get_world_size(), 2)
        dist.all_gather_into_tensor(table, mine)
        return slowest(table, self._hosts)


def slowest(table: Tensor, hosts: list[str]) -> SlowestRank | None:
    """Returns the rank that is furthest above the median of its stage.

    Args:
        table: Pipeline stage and seconds of each rank, `[ranks, 2]`.
        hosts: Name of each rank's host.

    Returns:
        The rank; None if no rank has run a forward pass.
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
