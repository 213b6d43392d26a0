"""Launch shapes of the Triton cross-entropy, tried on this GPU.

    python benchmarks/kernels/tune.py [--shapes 8192x128256,8192x32000]

Prints, by shape, the fastest for each pass, and the one with the best geometric mean over all
shapes; megatron_rw/kernels/triton_backend.py holds the choice.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch

from benchmarks.kernels.cross_entropy import Problem
from benchmarks.kernels.record import about, results_file
from benchmarks.kernels.timing import Clock, copy_bandwidth, interleave
from megatron_rw.kernels.options import CrossEntropyOptions, Shard
from megatron_rw.kernels.triton_backend import LAUNCH, Launch, TritonBackend

SHAPES = "8192x128256,8192x32000,4096x50304"
FORWARD = tuple(
    (block, blocks, warps)
    for block, blocks, warps in itertools.product(
        (1024, 2048, 4096, 8192, 16384), (1, 2, 4, 1024), (4, 8, 16)
    )
    # Between 8 and 64 elements a thread; more would spill.
    if 8 <= block // (32 * warps) <= 64
)
BACKWARD = tuple(
    (block, warps)
    for block, warps in itertools.product((1024, 2048, 4096, 8192, 16384), (2, 4, 8, 16))
    if 8 <= block // (32 * warps) <= 64
)


def candidates() -> dict[str, dict[str, Launch]]:
    """Launches to try by pass."""
    return {
        "forward": {
            f"{block} x {blocks}, {warps} warps": Launch(
                forward_block=block, forward_blocks=blocks, forward_warps=warps
            )
            for block, blocks, warps in FORWARD
        },
        "backward": {
            f"{block}, {warps} warps": Launch(backward_block=block, backward_warps=warps)
            for block, warps in BACKWARD
        },
    }


def measure(shape: tuple[int, int], rounds: int, clock: Clock) -> dict[str, dict[str, float]]:
    """Median milliseconds by pass and launch."""
    problem = Problem.make(*shape, clock.device)
    options, shard = CrossEntropyOptions(), Shard(0, shape[1], shape[1])
    logits, target = problem.source, problem.target
    whole = TritonBackend()
    tables = whole.statistics(logits, target, shard, options)
    lse = whole.combine(tables, target, shard, options, None).lse
    out = torch.empty_like(logits)

    def forward(backend: TritonBackend) -> None:
        made = backend.statistics(logits, target, shard, options)
        backend.combine(made, target, shard, options, None)

    def backward(backend: TritonBackend) -> None:
        backend.gradient(logits, target, lse, problem.upstream, shard, options, out)

    passes: dict[str, Callable[[TritonBackend], None]] = {"forward": forward, "backward": backward}

    def timed(run: Callable[[TritonBackend], None], backend: TritonBackend) -> Callable[[], float]:
        def once() -> float:
            _, read = clock.time(lambda: run(backend))
            clock.wait()
            return read()

        return once

    found: dict[str, dict[str, float]] = {}
    for name, launches in candidates().items():
        cases = {}
        for label, launch in launches.items():
            backend = TritonBackend(launch)
            passes[name](backend)
            cases[label] = timed(passes[name], backend)
        results = interleave(rounds, cases)
        found[name] = {label: statistics.median(times) for label, times in results.items()}
    print(f"\n{shape[0]} x {shape[1]}: a copy moves {copy_bandwidth(clock, logits) / 1e9:.0f} GB/s")
    for name, share in (("forward", 1), ("backward", 2)):
        moved = share * logits.nbytes
        for label, median in sorted(found[name].items(), key=lambda item: item[1])[:5]:
            print(f"  {name:9}{label:26}{median:8.3f} ms {moved / median / 1e6:7.0f} GB/s")
    return found


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", default=SHAPES)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    device = torch.device("cuda")
    clock = Clock(device)
    found: dict[str, Any] = {}
    for shape in arguments.shapes.split(","):
        tokens, vocab = shape.split("x")
        found[shape] = measure((int(tokens), int(vocab)), arguments.rounds, clock)
    best = {}
    for name, launches in candidates().items():
        scores = {
            label: math.exp(
                statistics.mean(
                    math.log(by_pass[name][label] / min(by_pass[name].values()))
                    for by_pass in found.values()
                )
            )
            for label in launches
        }
        label = min(scores, key=lambda key: scores[key])
        best[name] = {"label": label, "over_the_best_of_each_shape": scores[label]}
        print(f"{name}: {label}, {scores[label]:.3f} of the best of each shape")
    record = about(device) | {
        "benchmark": "launch shapes of the Triton cross-entropy",
        "in_use": asdict(LAUNCH),
        "best": best,
        "milliseconds": found,
    }
    output = arguments.output or results_file("tune", device)
    output.write_text(json.dumps(record, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
