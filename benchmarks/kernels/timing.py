"""Time and peak memory of short device work."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

# More than any cache between the cores and the memory.
FLUSH_BYTES = 256 << 20
# The device sleeps for as long as the host takes to launch what is timed: about a millisecond.
SLEEP_CYCLES = 2_000_000


class Clock:
    """Times work on a device from cold caches, without the host's launches; the CPU's by the host.

    Args:
        device: where the work runs.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self._flush = torch.zeros(FLUSH_BYTES // 4 if self.on_gpu else 0, device=device)

    def time(self, work: Callable[[], Any]) -> tuple[Any, float]:
        """Run it and wait for it: its result, and milliseconds."""
        if not self.on_gpu:
            start = time.perf_counter()
            result = work()
            return result, 1000 * (time.perf_counter() - start)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # Read, not written: what a write leaves in the cache, the timed work would write back.
        self._flush.sum()
        torch.cuda._sleep(SLEEP_CYCLES)
        begin.record()
        result = work()
        end.record()
        end.synchronize()
        return result, float(begin.elapsed_time(end))

    def peak(self, work: Callable[[], Any]) -> tuple[Any, int | None]:
        """Run it: its result, and bytes at the most beyond what was there, None on the CPU."""
        if not self.on_gpu:
            return work(), None
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        before, result = torch.cuda.memory_allocated(), work()
        return result, torch.cuda.max_memory_allocated() - before


def spread(times: Sequence[float]) -> dict[str, float]:
    """Median and quartiles of two times or more."""
    low, median, high = statistics.quantiles(times, n=4, method="inclusive")
    return {"median": median, "low": low, "high": high}


def interleave(rounds: int, cases: Mapping[str, Callable[[], Any]]) -> dict[str, list[Any]]:
    """Results of calling every case once a round, each round in another order."""
    results: dict[str, list[Any]] = {name: [] for name in cases}
    names = list(cases)
    for turn in range(rounds):
        for place in range(len(names)):
            name = names[(turn + place) % len(names)]
            results[name].append(cases[name]())
    return results
