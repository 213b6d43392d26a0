"""Latency of the weighting by number of samples and backend.

    python benchmarks/kernels/weighting.py [--device cpu]

Called as training calls it, from the host, and on a GPU replayed from a CUDA graph besides, which
shows the kernels without the host's launches.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch

from benchmarks.kernels.record import about, results_file
from benchmarks.kernels.timing import Clock, Spread, interleave
from megatron_rw.kernels import weigh_samples

SAMPLES = (32, 512, 4096, 16384, 65536)
CALLS = 50


def captured(call: Callable[[], Any]) -> Callable[[], None]:
    """Replays of CALLS calls, which follow each other without the host."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            call()
    return graph.replay


def repeated(call: Callable[[], Any]) -> None:
    """CALLS calls from the host."""
    for _ in range(CALLS):
        call()


def measure(samples: int, rounds: int, clock: Clock) -> dict[str, Any]:
    """Microseconds a call, by how it is made."""
    losses = torch.rand(samples, device=clock.device) * 6
    on_gpu = clock.device.type == "cuda"
    backends: tuple[Any, ...] = ("torch", "triton", "cuda") if on_gpu else ("torch",)
    cases: dict[str, Callable[[], Any]] = {}
    for backend in backends:
        call = functools.partial(
            weigh_samples, losses, "linupper", 1.0, mask=losses > 0.01, backend_name=backend
        )
        call()
        cases[backend] = functools.partial(repeated, call)
        if on_gpu:
            cases[f"{backend}, graph"] = captured(call)

    def time(calls: Callable[[], Any]) -> float:
        _, read = clock.time(calls)
        clock.wait()
        return 1000 * read() / CALLS

    timed = interleave(
        rounds, {name: functools.partial(time, call) for name, call in cases.items()}
    )
    return {
        "samples": samples,
        "microseconds": {name: vars(Spread.of(times)) for name, times in timed.items()},
        "over_torch": {
            name: statistics.median(
                mine / torchs for mine, torchs in zip(times, timed["torch"], strict=True)
            )
            for name, times in timed.items()
        },
    }


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    clock = Clock(device)
    results = [measure(samples, options.rounds, clock) for samples in SAMPLES]
    names = list(results[0]["microseconds"])
    print("\nweighting, microseconds a call")
    print(f"{'samples':>10}" + "".join(f"{name:>16}" for name in names))
    for result in results:
        medians = (result["microseconds"][name]["median"] for name in names)
        print(f"{result['samples']:>10}" + "".join(f"{median:16.1f}" for median in medians))
    record = about(device) | {"benchmark": "weighting", "calls": CALLS, "sizes": results}
    output = options.output or results_file("weighting", device)
    output.write_text(json.dumps(record, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
