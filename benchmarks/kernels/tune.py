"""Launch shapes of the passes over the logits, tried on this GPU.

    python benchmarks/kernels/tune.py [--backend cuda] [--shapes 8192x128256,8192x32000]

Forward and backward are the cross-entropy's, probabilities the fused output layer's. Prints, by
shape, the fastest for each pass, and the one with the best geometric mean over all shapes; the
choice is LAUNCH in triton_backend.py, triton_probabilities.py and cuda_backend.py, and THREADS in
cuda_probabilities.py, in megatron_rw/kernels.
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
from megatron_rw.kernels.cuda_backend import LAUNCH as CUDA_LAUNCH
from megatron_rw.kernels.cuda_backend import CudaBackend, CudaLaunch
from megatron_rw.kernels.cuda_probabilities import THREADS, CudaProbabilities
from megatron_rw.kernels.options import CrossEntropyBackend, CrossEntropyOptions, Shard
from megatron_rw.kernels.probabilities import ProbabilityBackend
from megatron_rw.kernels.selection import check_backend
from megatron_rw.kernels.triton_backend import LAUNCH as TRITON_LAUNCH
from megatron_rw.kernels.triton_backend import Launch, TritonBackend
from megatron_rw.kernels.triton_probabilities import LAUNCH as PROBABILITY_LAUNCH
from megatron_rw.kernels.triton_probabilities import ProbabilityLaunch, TritonProbabilities

SHAPES = "8192x128256,8192x32000,4096x50304"
# By pass and launch: a `CrossEntropyBackend`, or a `ProbabilityBackend`.
Candidates = dict[str, dict[str, Any]]


def triton_candidates() -> Candidates:
    """Blocks that leave a thread 8 to 64 elements; more would spill."""
    blocks = (1024, 2048, 4096, 8192, 16384)
    return {
        "forward": {
            f"{block} x {number}, {warps} warps": TritonBackend(
                Launch(forward_block=block, forward_blocks=number, forward_warps=warps)
            )
            for block, number, warps in itertools.product(blocks, (1, 2, 4, 1024), (4, 8, 16))
            if 8 <= block // (32 * warps) <= 64
        },
        "backward": {
            f"{block}, {warps} warps": TritonBackend(
                Launch(backward_block=block, backward_warps=warps)
            )
            for block, warps in itertools.product(blocks, (2, 4, 8, 16))
            if 8 <= block // (32 * warps) <= 64
        },
        "probabilities": {
            f"{block}, {warps} warps": TritonProbabilities(ProbabilityLaunch(block, warps))
            for block, warps in itertools.product(blocks, (4, 8, 16, 32))
            if 8 <= block // (32 * warps) <= 64
        },
    }


def cuda_candidates() -> Candidates:
    """Stretches of a row that give every thread of a block some 16-byte vectors."""
    threads = (128, 256, 512, 1024)
    return {
        "forward": {
            f"{columns} columns, {number} threads": CudaBackend(
                CudaLaunch(forward_columns=columns, forward_threads=number)
            )
            for columns, number in itertools.product((8192, 16384, 32768, 65536, 1 << 20), threads)
        },
        "backward": {
            f"{columns} columns, {number} threads": CudaBackend(
                CudaLaunch(backward_columns=columns, backward_threads=number)
            )
            for columns, number in itertools.product((4096, 8192, 16384, 32768, 1 << 20), threads)
        },
        "probabilities": {f"{number} threads": CudaProbabilities(number) for number in threads},
    }


BACKENDS: dict[str, tuple[Callable[[], Candidates], dict[str, Any]]] = {
    "triton": (
        triton_candidates,
        asdict(TRITON_LAUNCH) | {"probabilities": asdict(PROBABILITY_LAUNCH)},
    ),
    "cuda": (cuda_candidates, asdict(CUDA_LAUNCH) | {"probabilities_threads": THREADS}),
}


def measure(
    shape: tuple[int, int], rounds: int, clock: Clock, candidates: Candidates
) -> dict[str, dict[str, float]]:
    """Median milliseconds by pass and launch."""
    problem = Problem.make(*shape, clock.device)
    options, shard = CrossEntropyOptions(), Shard(0, shape[1], shape[1])
    logits, target = problem.source, problem.target
    whole = next(iter(candidates["forward"].values()))
    tables = whole.statistics(logits, target, shard, options)
    lse = whole.combine(tables, target, shard, options, None).lse
    out = torch.empty_like(logits)

    def forward(backend: CrossEntropyBackend) -> None:
        made = backend.statistics(logits, target, shard, options)
        backend.combine(made, target, shard, options, None)

    def backward(backend: CrossEntropyBackend) -> None:
        backend.gradient(logits, target, lse, problem.upstream, shard, options, out)

    def probabilities(backend: ProbabilityBackend) -> None:
        # In place: again and again of what it made.
        backend.probabilities(out, target, shard, options)

    passes: dict[str, Callable[[Any], None]] = {
        "forward": forward,
        "backward": backward,
        "probabilities": probabilities,
    }

    def timed(run: Callable[[Any], None], backend: Any) -> Callable[[], float]:
        def once() -> float:
            _, read = clock.time(lambda: run(backend))
            clock.wait()
            return read()

        return once

    found: dict[str, dict[str, float]] = {}
    for name, backends in candidates.items():
        cases = {}
        for label, backend in backends.items():
            passes[name](backend)
            cases[label] = timed(passes[name], backend)
        results = interleave(rounds, cases)
        found[name] = {label: statistics.median(times) for label, times in results.items()}
    print(f"\n{shape[0]} x {shape[1]}: a copy moves {copy_bandwidth(clock, logits) / 1e9:.0f} GB/s")
    for name, share in (("forward", 1), ("backward", 2), ("probabilities", 2)):
        moved = share * logits.nbytes
        for label, median in sorted(found[name].items(), key=lambda item: item[1])[:5]:
            print(f"  {name:14}{label:26}{median:8.3f} ms {moved / median / 1e6:7.0f} GB/s")
    return found


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backend", choices=BACKENDS, default="triton")
    parser.add_argument("--shapes", default=SHAPES)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    clock = Clock(device)
    make, in_use = BACKENDS[arguments.backend]
    candidates = make()
    check_backend(device, arguments.backend)
    found: dict[str, Any] = {}
    for shape in arguments.shapes.split(","):
        tokens, vocab = shape.split("x")
        found[shape] = measure((int(tokens), int(vocab)), arguments.rounds, clock, candidates)
    best = {}
    for name, launches in candidates.items():
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
        "benchmark": f"launch shapes of the {arguments.backend} kernels",
        "in_use": in_use,
        "best": best,
        "milliseconds": found,
    }
    output = arguments.output or results_file(f"tune_{arguments.backend}", device)
    output.write_text(json.dumps(record, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
