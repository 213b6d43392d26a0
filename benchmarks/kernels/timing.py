"""Timing of short device work, interleaved between candidates, and what a device can do at most."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# More than any cache between the cores and the memory.
FLUSH_BYTES = 256 << 20
# The device sleeps for as long as the host takes to launch what is timed: about a millisecond.
SLEEP_CYCLES = 2_000_000


class Clock:
    """Times a piece of work on a device, from cold caches and without the host's launch time.

    Args:
        device: with events on CUDA, by the host's clock on the CPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._on_gpu = device.type == "cuda"
        self._flush = torch.empty(
            FLUSH_BYTES if self._on_gpu else 0, dtype=torch.int8, device=device
        )
        self._pending: list[tuple[Any, Any]] = []

    def time(self, work: Callable[[], Any]) -> tuple[Any, Callable[[], float]]:
        """Run it.

        Returns:
            Its result, and its time in milliseconds for after the next `wait`.
        """
        if not self._on_gpu:
            start = time.perf_counter()
            result = work()
            elapsed = 1000 * (time.perf_counter() - start)
            return result, lambda: elapsed
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        torch.cuda._sleep(SLEEP_CYCLES)
        begin.record()
        result = work()
        end.record()
        return result, lambda: float(begin.elapsed_time(end))

    def wait(self) -> None:
        """Until the device is done."""
        if self._on_gpu:
            torch.cuda.synchronize(self.device)


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of repeated times, milliseconds."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(times: Sequence[float]) -> Spread:
        """Of two times or more."""
        low, median, high = statistics.quantiles(times, n=4, method="inclusive")
        return Spread(median, low, high)


def interleave(rounds: int, cases: Mapping[str, Callable[[], Any]]) -> dict[str, list[Any]]:
    """Results of calling every case once a round, each round in another order."""
    results: dict[str, list[Any]] = {name: [] for name in cases}
    names = list(cases)
    for number in range(rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            results[name].append(cases[name]())
    return results


def copy_bandwidth(clock: Clock, tensor: Tensor, rounds: int = 10) -> float:
    """Bytes a second that a copy of the tensor reads and writes together, at the median."""
    target = torch.empty_like(tensor)
    times = []
    for _ in range(rounds + 2):
        _, read = clock.time(lambda: target.copy_(tensor))
        clock.wait()
        times.append(read())
    return 2 * tensor.nbytes / (statistics.median(times[2:]) / 1000)


class PeakMemory:
    """Device memory that a piece of work takes beyond what was there; None on the CPU.

    Attributes:
        bytes: after the work.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before = 0
        self.bytes: int | None = None

    def __enter__(self) -> PeakMemory:
        if self._device.type == "cuda":
            gc.collect()
            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            self.bytes = torch.cuda.max_memory_allocated(self._device) - self._before
