"""The slowest rank of a logging interval (`--log-slowest-rank`).

A slow GPU, a host with something else to do or a slow disk holds up every rank, since all meet in
each step, and the step time does not tell whose it is. What can tell is the time of the forward
passes, reading their micro-batches included: pipeline sends, the gradients' reduction and the
loss's collectives lie outside. Tensor- and expert-parallel collectives lie inside: the ranks of
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
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rw.platform import Device


class Event(Protocol):
    """A moment, on the device or the host."""

    def record(self) -> None:
        """Now; on a device, when its stream gets there."""

    def elapsed_time(self, end_event: Any, /) -> float:
        """Milliseconds from this one to another."""


class HostEvent:
    """What `torch.cuda.Event` is on a device, for the CPU."""

    def record(self) -> None:
        """Now."""
        self._seconds = time.perf_counter()

    def elapsed_time(self, end_event: HostEvent, /) -> float:
        """Milliseconds from this one to another."""
        return (end_event._seconds - self._seconds) * 1e3


def event_maker(device: Device) -> Callable[[], Event]:
    """What makes the events of a device."""
    return (
        functools.partial(torch.cuda.Event, enable_timing=True) if device == "cuda" else HostEvent
    )


@dataclass(frozen=True)
class SlowestRank:
    """Of an interval.

    Attributes:
        rank: global.
        host: where it runs.
        ratio: its forward time over the median of its pipeline stage's ranks; the lower one of two.
        seconds: its forward time, over the interval.
    """

    rank: int
    host: str
    ratio: float
    seconds: float

    def __str__(self) -> str:
        """For the log."""
        return (
            f"slowest rank: {self.rank} on {self.host}, {self.ratio:.2f} of the median forward "
            f"time ({self.seconds:.3f} s)"
        )


class ForwardTimes:
    """Times this rank's forward passes, and finds the slowest rank.

    Args:
        make_event: see `event_maker`.
    """

    def __init__(self, make_event: Callable[[], Event]) -> None:
        self._make_event = make_event
        self._pairs: list[tuple[Event, Event]] = []
        # Used again, so that an interval of thousands of passes makes no new events.
        self._free: list[tuple[Event, Event]] = []
        self._hosts: list[str] | None = None

    def begin(self) -> None:
        """Begins to time a forward pass; it does not wait for the device."""
        pair = self._free.pop() if self._free else (self._make_event(), self._make_event())
        pair[0].record()
        self._pairs.append(pair)

    def end(self) -> None:
        """Ends the time of the pass that was begun last."""
        self._pairs[-1][1].record()

    def read(self, stage: int) -> SlowestRank | None:
        """Compare the interval's times, and begin a new interval. All ranks together.

        Call it where the device is done with the passes. One all-gather of 16 bytes a rank, and the
        first time the hosts' names.

        Args:
            stage: this rank's pipeline stage; only ranks of one stage have the same work.

        Returns:
            See `slowest`.
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
    """The rank that is furthest above the median of its stage.

    Args:
        table: `[ranks, 2]` pipeline stage and seconds.
        hosts: by rank.

    Returns:
        It; None where no rank has run a forward pass.
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
