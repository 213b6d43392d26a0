"""Forward and backward of the cross-entropy: ours against every other implementation there is.

    python benchmarks/kernels/cross_entropy.py [--device cpu] [--shapes 8192x128256,…]

All candidates see the same random logits, labels and per-token upstream gradients, one after the
other within a round, from cold caches, in an order that turns from round to round. Bytes are those
that the task needs, whoever moves more: the logits read forward, read and written backward. Their
time at the rate of a plain copy of the same tensor is what 100 % of the ceiling means. Memory is
the peak beyond logits, labels and upstream gradient. Errors are against fp64 on some of the rows.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.kernels.peers import LOSSES, available
from benchmarks.kernels.record import about, results_file
from benchmarks.kernels.timing import Clock, PeakMemory, Spread, copy_bandwidth, interleave
from megatron_rw.kernels import vocab_parallel_cross_entropy
from megatron_rw.kernels.selection import (
    BackendError,
    BackendName,
    check_backend,
    default_backend,
)

# Most telling first: what does not fit into --budget-s is left out and said to be.
GPU_SHAPES = [
    (8192, 128256),
    (8192, 131072),
    (8192, 32000),
    (8192, 50304),
    (32768, 128256),
    (4096, 128256),
    (8192, 262144),
    (32768, 32000),
    (4096, 32000),
    (4096, 50304),
    (32768, 50304),
    (4096, 262144),
    (32768, 262144),
]
# The quick start's micro-batch, whole and cut into two: 16 and 8 sequences of 128 tokens.
CPU_SHAPES = [(2048, 2048), (1024, 2048)]
SEQUENCE = {"cuda": 4096, "cpu": 128}
CHECKED_ROWS = 64
WARM_UP = 2


@dataclass(frozen=True)
class Problem:
    """Inputs of one shape: `[s, b, V]` logits to refill from, labels and upstream `[s, b]`."""

    source: Tensor
    target: Tensor
    upstream: Tensor

    @staticmethod
    def make(tokens: int, vocab: int, device: torch.device) -> Problem:
        """Random ones, bf16 logits on a GPU and fp32 on the CPU."""
        generator = torch.Generator(device).manual_seed(0)
        sequence = min(tokens, SEQUENCE[device.type])
        shape = (sequence, tokens // sequence)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        source = torch.empty(*shape, vocab, dtype=dtype, device=device)
        # A row block at a time: fp32 random numbers of all would not fit.
        for part in source.flatten(0, 1).split(1024):
            part.copy_(torch.randn(part.shape, generator=generator, device=device) * 2)
        target = torch.randint(0, vocab, shape, generator=generator, device=device)
        # As weights make it: another value for every sample, some 0.
        upstream = torch.rand(shape, generator=generator, device=device)
        return Problem(source, target, upstream)

    @property
    def rows(self) -> Tensor:
        """Which of the tokens, flat, the errors are taken over."""
        tokens = self.target.numel()
        return torch.arange(0, tokens, max(1, tokens // CHECKED_ROWS), device=self.target.device)

    def exact(self) -> tuple[Tensor, Tensor]:
        """Losses and gradients of `rows` in fp64."""
        leaf = self.source.flatten(0, 1)[self.rows].double().requires_grad_()
        target = self.target.flatten()[self.rows]
        losses = torch.nn.functional.cross_entropy(leaf, target, reduction="none")
        [gradient] = torch.autograd.grad(losses, leaf, self.upstream.flatten()[self.rows].double())
        return losses.detach(), gradient


class Candidate:
    """One implementation on one problem.

    Args:
        loss: `(logits, target) -> losses`.
        problem: its inputs.
        logits: like `problem.source`; filled anew before every run, as some overwrite it.
        clock: times the passes.
    """

    def __init__(
        self,
        loss: Callable[[Tensor, Tensor], Tensor],
        problem: Problem,
        logits: Tensor,
        clock: Clock,
    ) -> None:
        self._loss, self._problem, self._logits, self._clock = loss, problem, logits, clock

    def run(self) -> tuple[float, float]:
        """Milliseconds of the forward and of the backward pass."""
        losses, forward, gradient, backward = self._passes()
        del losses, gradient
        self._clock.wait()
        return forward(), backward()

    def check(self) -> dict[str, float | None]:
        """Peak memory in bytes and errors of one run."""
        self._logits.copy_(self._problem.source)
        with PeakMemory(self._clock.device) as peak:
            losses, _, gradient, _ = self._passes()
        rows = self._problem.rows
        exact_losses, exact_gradient = self._problem.exact()
        error = gradient.flatten(0, 1)[rows].double() - exact_gradient
        return {
            "extra_bytes": peak.bytes,
            "loss_error": (losses.flatten()[rows].double() - exact_losses).abs().max().item(),
            "gradient_error": (error.norm() / exact_gradient.norm()).item(),
        }

    def _passes(self) -> tuple[Tensor, Callable[[], float], Tensor, Callable[[], float]]:
        problem = self._problem
        self._logits.copy_(problem.source)
        leaf = self._logits.detach().requires_grad_()
        losses, forward = self._clock.time(lambda: self._loss(leaf.view_as(leaf), problem.target))
        upstream = problem.upstream.to(losses.dtype)
        [gradient], backward = self._clock.time(lambda: torch.autograd.grad(losses, leaf, upstream))
        return losses.detach(), forward, gradient, backward


def ours(device: torch.device) -> tuple[dict[str, Any], dict[str, str]]:
    """`ours`, which is the default backend, on a GPU the others besides, and why one is missing."""
    losses: dict[str, Any] = {"ours": vocab_parallel_cross_entropy}
    missing: dict[str, str] = {}
    backends: tuple[BackendName, ...] = ("triton", "cuda") if device.type == "cuda" else ()
    for name in backends:
        if name == default_backend(device):
            continue
        try:
            check_backend(device, name)
        except BackendError as error:
            missing[f"ours, {name}"] = str(error)
            continue
        losses[f"ours, {name}"] = functools.partial(vocab_parallel_cross_entropy, backend_name=name)
    return losses, missing


def measure(
    shape: tuple[int, int], rounds: int, clock: Clock, losses: dict[str, Any]
) -> dict[str, Any]:
    """All candidates on one shape.

    Args:
        shape: tokens and vocabulary.
        rounds: how often each is timed.
        clock: of the device.
        losses: by name.
    """
    torch.compiler.reset()
    problem = Problem.make(*shape, clock.device)
    logits = torch.empty_like(problem.source)
    size = problem.source.nbytes
    ceiling = copy_bandwidth(clock, problem.source)
    found: dict[str, Any] = {}
    ready = {}
    for name, loss in losses.items():
        candidate = Candidate(loss, problem, logits, clock)
        try:
            for _ in range(WARM_UP):
                candidate.run()
            found[name] = candidate.check()
            ready[name] = candidate.run
        except torch.OutOfMemoryError:
            found[name] = {"error": "out of memory"}
        except Exception as error:  # A peer that fails on this device is a result too.
            if name.startswith("ours"):
                raise
            found[name] = {"error": f"{type(error).__name__}: {error}"[:300]}
        if clock.device.type == "cuda":
            torch.cuda.empty_cache()
    timed = interleave(rounds, ready)
    for name, times in timed.items():
        forward, backward = zip(*times, strict=True)
        passes = {
            "forward": (forward, size),
            "backward": (backward, 2 * size),
            "both": ([sum(pair) for pair in times], 3 * size),
        }
        for what, (series, moved) in passes.items():
            spread = Spread.of(series)
            rate = moved / (spread.median / 1000)
            found[name][what] = asdict(spread) | {
                "gb_per_s": rate / 1e9,
                "share_of_copy": rate / ceiling,
            }
        found[name]["over_ours"] = statistics.median(
            sum(theirs) / sum(ours) for theirs, ours in zip(times, timed["ours"], strict=True)
        )
    return {
        "tokens": shape[0],
        "vocab": shape[1],
        "dtype": str(problem.source.dtype).removeprefix("torch."),
        "copy_gb_per_s": ceiling / 1e9,
        "implementations": found,
    }


def print_shape(result: dict[str, Any]) -> None:
    """One line an implementation, the fastest first."""
    print(
        f"\n{result['tokens']} tokens x {result['vocab']} vocabulary, {result['dtype']}; "
        f"a copy moves {result['copy_gb_per_s']:.0f} GB/s"
    )
    print(
        f"{'':28}{'forward ms':>11}{'of copy':>8}{'backward ms':>12}{'of copy':>8}{'both ms':>9}"
        f"{'over ours':>10}{'MiB extra':>10}{'loss err':>10}{'grad err':>10}"
    )
    implementations = result["implementations"]
    order = sorted(
        implementations, key=lambda name: implementations[name].get("both", {}).get("median", 1e9)
    )
    for name in order:
        found = implementations[name]
        if "error" in found:
            print(f"{name:28}{found['error']}")
            continue
        line = f"{name:28}"
        for what, width in (("forward", 11), ("backward", 12)):
            line += f"{found[what]['median']:{width}.3f}{found[what]['share_of_copy']:8.0%}"
        line += f"{found['both']['median']:9.3f}{found['over_ours']:10.2f}"
        extra = found["extra_bytes"]
        line += f"{'-':>10}" if extra is None else f"{extra / 2**20:10.1f}"
        line += f"{found['loss_error']:10.1e}{found['gradient_error']:10.1e}"
        print(line, flush=True)


def main() -> int:
    """Measure, print and write the result after every shape."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shapes", help="TOKENSxVOCAB,…; a grid that suits the device by default")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--budget-s", type=float, default=float("inf"), help="begin no shape later")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    device = torch.device(options.device)
    shapes = GPU_SHAPES if device.type == "cuda" else CPU_SHAPES
    if options.shapes:
        pairs = [shape.split("x") for shape in options.shapes.split(",")]
        shapes = [(int(tokens), int(vocab)) for tokens, vocab in pairs]

    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29577")
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, rank=0, world_size=1)
    if device.type == "cpu":
        torch.set_num_threads(1)
    losses, missing = ours(device)
    peers, missing_peers = available(device, LOSSES)
    missing |= missing_peers
    for name, reason in missing.items():
        print(f"without {name}: {reason}")
    losses |= {peer.name: peer.loss for peer in peers}

    record = about(device) | {
        "benchmark": "cross-entropy, forward and backward",
        "backend": default_backend(device),
        "rounds": options.rounds,
        "peers": {peer.name: {"version": peer.version, "note": peer.note} for peer in peers},
        "missing": missing,
        "left_out": [],
        "shapes": [],
    }
    output = options.output or results_file("cross_entropy", device)
    start = time.perf_counter()
    clock = Clock(device)
    for shape in shapes:
        if time.perf_counter() - start > options.budget_s:
            record["left_out"].append(shape)
            continue
        try:
            result = measure(shape, options.rounds, clock, losses)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            record["left_out"].append(shape)
            continue
        print_shape(result)
        record["shapes"].append(result)
        output.write_text(json.dumps(record, indent=2) + "\n")
    if record["left_out"]:
        print(f"\nleft out for time or memory: {record['left_out']}")
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
