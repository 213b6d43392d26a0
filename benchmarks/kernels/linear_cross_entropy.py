"""The output layer with its cross-entropy, forward and backward: ours against the others.

    python benchmarks/kernels/linear_cross_entropy.py [--device cpu] [--shapes 8192x4096x128256,…]

Shapes are tokens x hidden size x vocabulary. All candidates see the same random hidden states,
weight, labels and per-token upstream gradients, one after the other within a round, from cold
caches, in an order that turns from round to round. TFLOP/s count 6·N·H·V operations, whoever does
more. The floor is three bare matrix products and one copy of the logits. Memory is the peak beyond
hidden states, weight and their gradients. Errors are against fp64, of the losses and of the
gradients at some tokens and some rows of the weight.
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

from benchmarks.kernels.memory import PeakTensors
from benchmarks.kernels.peers import LAYERS, available
from benchmarks.kernels.record import about, results_file
from benchmarks.kernels.timing import Clock, PeakMemory, Spread, interleave
from megatron_rw.kernels import linear_weighted_cross_entropy
from megatron_rw.kernels.logits_plan import least_budget
from megatron_rw.kernels.selection import BackendError, BackendName, check_backend, default_backend

Shape = tuple[int, int, int]

# Most telling first: what does not fit into --budget-s is left out and said to be.
GPU_SHAPES: list[Shape] = [
    (8192, 4096, 128256),
    (8192, 2048, 128256),
    (8192, 4096, 32000),
    (32768, 4096, 128256),
    (8192, 2048, 32000),
    (8192, 4096, 262144),
    (8192, 2048, 262144),
    (32768, 2048, 128256),
    (32768, 4096, 32000),
    (32768, 2048, 32000),
    (32768, 2048, 262144),
    (32768, 4096, 262144),
]
# The quick start's micro-batch, and logits that are large beside all else.
CPU_SHAPES: list[Shape] = [(2048, 128, 2048), (1024, 256, 32000)]
SEQUENCE = {"cuda": 4096, "cpu": 128}
CHECKED = 64
WARM_UP = 2
CHUNK = 4096
FLOOR = "floor"


@dataclass(frozen=True)
class Problem:
    """Inputs of one shape: `[s, b, H]`, `[V, H]`, labels and upstream gradients `[s, b]`."""

    hidden: Tensor
    weight: Tensor
    target: Tensor
    upstream: Tensor

    @staticmethod
    def make(shape: Shape, device: torch.device, dtype: torch.dtype) -> Problem:
        """Random ones; logits of a spread of 2."""
        tokens, size, vocab = shape
        generator = torch.Generator(device).manual_seed(0)
        sequence = min(tokens, SEQUENCE[device.type])
        rows = (sequence, tokens // sequence)
        make = functools.partial(torch.randn, generator=generator, device=device)
        hidden = make(*rows, size).to(dtype)
        weight = (make(vocab, size) * 2 / size**0.5).to(dtype)
        target = torch.randint(0, vocab, rows, generator=generator, device=device)
        # As weights make it: another value for every sample.
        upstream = torch.rand(rows, generator=generator, device=device)
        return Problem(hidden, weight, target, upstream)

    @property
    def checked(self) -> tuple[Tensor, Tensor]:
        """Tokens, flat, and rows of the weight, the checked tokens' targets among them."""
        tokens = self.target.numel()
        some = torch.arange(0, tokens, max(1, tokens // CHECKED), device=self.target.device)
        others = torch.arange(0, len(self.weight), max(1, len(self.weight) // CHECKED))
        targets = self.target.flatten()[some]
        return some, torch.cat([targets, others.to(targets)]).unique()

    def exact(self) -> tuple[Tensor, Tensor, Tensor]:
        """Losses of all tokens, gradients at the checked tokens and rows, in fp64."""
        hidden, target = self.hidden.flatten(0, 1).double(), self.target.flatten()
        parts = self.weight.split(CHUNK)
        sums = [torch.logsumexp(hidden @ part.double().T, dim=1) for part in parts]
        lse = torch.logsumexp(torch.stack(sums), dim=0)
        own = (hidden * self.weight[target].double()).sum(dim=1)
        some, rows = self.checked
        factor = self.upstream.flatten().double()
        of_hidden = -self.weight[target[some]].double()
        for part in parts:
            wide = part.double()
            of_hidden += torch.exp(hidden[some] @ wide.T - lse[some, None]) @ wide
        p = torch.exp(hidden @ self.weight[rows].double().T - lse[:, None])
        p -= (target[:, None] == rows).double()
        return lse - own, factor[some, None] * of_hidden, p.T @ (factor[:, None] * hidden)


class Candidate:
    """One implementation on one problem.

    Args:
        layer: `(hidden, weight, target) -> losses`.
        problem: its inputs.
        clock: times the passes.
    """

    def __init__(self, layer: Callable[..., Tensor], problem: Problem, clock: Clock) -> None:
        self._layer, self._problem, self._clock = layer, problem, clock

    def run(self) -> tuple[float, float]:
        """Milliseconds of the forward and of the backward pass."""
        losses, forward, gradients, backward = self._passes()
        del losses, gradients
        self._clock.wait()
        return forward(), backward()

    def check(self, exact: tuple[Tensor, Tensor, Tensor]) -> dict[str, float | None]:
        """Peak memory in bytes and relative errors of one run."""
        problem = self._problem
        with self._peak() as peak:
            losses, _, gradients, _ = self._passes()
        some, rows = problem.checked
        found = (losses.flatten(), gradients[0].flatten(0, 1)[some], gradients[1][rows])
        errors = [
            float((mine.double() - theirs).norm() / theirs.norm())
            for mine, theirs in zip(found, exact, strict=True)
        ]
        beyond = None
        if peak.bytes is not None:
            beyond = peak.bytes - sum(gradient.nbytes for gradient in gradients)
        names = ("loss_error", "hidden_error", "weight_error")
        return {"extra_bytes": beyond} | dict(zip(names, errors, strict=True))

    def _peak(self) -> Any:
        if self._clock.device.type == "cuda":
            return PeakMemory(self._clock.device)
        return PeakTensors(self._problem.hidden, self._problem.weight)

    def _passes(self) -> tuple[Tensor, Callable[[], float], tuple[Tensor, ...], Any]:
        problem = self._problem
        leaves = [tensor.detach().requires_grad_() for tensor in (problem.hidden, problem.weight)]
        losses, forward = self._clock.time(lambda: self._layer(*leaves, problem.target))
        upstream = problem.upstream.to(losses.dtype)
        gradients, backward = self._clock.time(
            lambda: torch.autograd.grad(losses, leaves, upstream)
        )
        return losses.detach(), forward, gradients, backward


class Floor:
    """The three matrix products alone, and a copy of the logits.

    Args:
        problem: its inputs.
        clock: times the passes.
    """

    def __init__(self, problem: Problem, clock: Clock) -> None:
        self._hidden, self._weight = problem.hidden.flatten(0, 1), problem.weight
        self._clock = clock
        tokens, vocab = len(self._hidden), len(self._weight)
        self._logits, self._copy = self._hidden.new_empty(2, tokens, vocab).unbind()

    def run(self) -> tuple[float, float]:
        """Milliseconds of the forward and of the backward pass."""
        _, forward = self._clock.time(self._forward)
        _, backward = self._clock.time(self._backward)
        self._clock.wait()
        return forward(), backward()

    def _forward(self) -> None:
        torch.mm(self._hidden, self._weight.T, out=self._logits)
        self._copy.copy_(self._logits)

    def _backward(self) -> None:
        torch.mm(self._logits, self._weight)
        torch.mm(self._logits.T, self._hidden)


def ours(
    device: torch.device, shape: Shape, dtype: torch.dtype
) -> dict[str, Callable[..., Tensor]]:
    """`ours`, the default backend with all logits kept; the other backends; splits."""
    found: dict[str, Callable[..., Tensor]] = {"ours": linear_weighted_cross_entropy}
    backends: tuple[BackendName, ...] = ("triton", "cuda", "torch") if device.type == "cuda" else ()
    for name in backends:
        if name != default_backend(device):
            found[f"ours, {name}"] = functools.partial(
                linear_weighted_cross_entropy, backend_name=name
            )
    tokens, size, vocab = shape
    least = least_budget(tokens, vocab, size, dtype)
    for share in (4, 16):
        budget = max(least, tokens * vocab * dtype.itemsize // share)
        found[f"ours, 1/{share} of the logits"] = functools.partial(
            linear_weighted_cross_entropy, logits_budget=budget
        )
    return found


def measure(
    shape: Shape,
    dtype: torch.dtype,
    rounds: int,
    clock: Clock,
    layers: dict[str, Callable[..., Tensor]],
) -> dict[str, Any]:
    """All candidates on one shape.

    Args:
        shape: tokens, hidden size, vocabulary.
        dtype: of hidden states and weight.
        rounds: how often each is timed.
        clock: of the device.
        layers: by name.
    """
    torch.compiler.reset()
    problem = Problem.make(shape, clock.device, dtype)
    exact = problem.exact()
    found: dict[str, Any] = {}
    ready: dict[str, Callable[[], tuple[float, float]]] = {}
    for name, layer in layers.items():
        candidate = Candidate(layer, problem, clock)
        try:
            for _ in range(WARM_UP):
                candidate.run()
            found[name] = candidate.check(exact)
            ready[name] = candidate.run
        except torch.OutOfMemoryError:
            found[name] = {"error": "out of memory"}
        except Exception as error:  # A peer that fails on this device is a result too.
            if name.startswith("ours"):
                raise
            found[name] = {"error": f"{type(error).__name__}: {error}"[:300]}
        if clock.device.type == "cuda":
            torch.cuda.empty_cache()
    try:
        ready[FLOOR] = Floor(problem, clock).run
        found[FLOOR] = {}
    except torch.OutOfMemoryError:
        found[FLOOR] = {"error": "out of memory"}
    timed = interleave(rounds, ready)
    tokens, size, vocab = shape
    for name, times in timed.items():
        forward, backward = zip(*times, strict=True)
        both = [sum(pair) for pair in times]
        for what, series in (("forward", forward), ("backward", backward), ("both", both)):
            found[name][what] = asdict(Spread.of(series))
        median = found[name]["both"]["median"]
        found[name]["tflop_per_s"] = 6 * tokens * size * vocab / (median / 1000) / 1e12
        found[name]["over_ours"] = statistics.median(
            sum(theirs) / sum(mine) for theirs, mine in zip(times, timed["ours"], strict=True)
        )
    return {
        "tokens": tokens,
        "hidden": size,
        "vocab": vocab,
        "dtype": str(problem.hidden.dtype).removeprefix("torch."),
        "logits_bytes": tokens * vocab * problem.hidden.element_size(),
        "implementations": found,
    }


def print_shape(result: dict[str, Any]) -> None:
    """One line an implementation, the fastest first."""
    print(
        f"\n{result['tokens']} tokens x {result['hidden']} hidden x {result['vocab']} vocabulary, "
        f"{result['dtype']}; logits of {result['logits_bytes'] / 2**20:.0f} MiB\n"
        f"{'':26}{'forward ms':>11}{'backward ms':>12}{'both ms':>10}{'over ours':>10}"
        f"{'TFLOP/s':>9}{'of logits':>10}{'loss err':>10}{'dX err':>9}{'dW err':>9}"
    )
    implementations = result["implementations"]
    order = sorted(
        implementations, key=lambda name: implementations[name].get("both", {}).get("median", 1e9)
    )
    for name in order:
        found = implementations[name]
        if "error" in found:
            print(f"{name:26}{found['error']}")
            continue
        line = f"{name:26}{found['forward']['median']:11.3f}{found['backward']['median']:12.3f}"
        line += f"{found['both']['median']:10.3f}{found['over_ours']:10.3f}"
        line += f"{found['tflop_per_s']:9.2f}"
        if name != FLOOR:
            line += f"{found['extra_bytes'] / result['logits_bytes']:10.2f}"
            line += f"{found['loss_error']:10.1e}{found['hidden_error']:9.1e}"
            line += f"{found['weight_error']:9.1e}"
        print(line, flush=True)


def main() -> int:
    """Measure, print and write the result after every shape."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shapes", help="TOKENSxHIDDENxVOCAB,…; some that suit the device")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="bfloat16 on a GPU")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--budget-s", type=float, default=float("inf"), help="begin no shape later")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    device = torch.device(options.device)
    shapes = GPU_SHAPES if device.type == "cuda" else CPU_SHAPES
    if options.shapes:
        sizes = [[int(size) for size in shape.split("x")] for shape in options.shapes.split(",")]
        shapes = [(tokens, hidden, vocab) for tokens, hidden, vocab in sizes]

    dtype = getattr(torch, options.dtype or ("bfloat16" if device.type == "cuda" else "float32"))

    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29581")
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, rank=0, world_size=1)
    if device.type == "cpu":
        torch.set_num_threads(1)
    peers, missing = available(device, LAYERS)
    if device.type == "cuda":
        try:
            check_backend(device, "cuda")
        except BackendError as error:
            missing["ours, cuda"] = str(error)
    for name, reason in missing.items():
        print(f"without {name}: {reason}")

    record = about(device) | {
        "benchmark": "output layer and cross-entropy, forward and backward",
        "backend": default_backend(device),
        "rounds": options.rounds,
        "peers": {peer.name: {"version": peer.version, "note": peer.note} for peer in peers},
        "missing": missing,
        "left_out": [],
        "shapes": [],
    }
    output = options.output or results_file("linear_cross_entropy", device)
    start = time.perf_counter()
    clock = Clock(device)
    for shape in shapes:
        if time.perf_counter() - start > options.budget_s:
            record["left_out"].append(shape)
            continue
        layers = ours(device, shape, dtype) | {peer.name: peer.loss for peer in peers}
        layers = {name: layer for name, layer in layers.items() if name not in missing}
        try:
            result = measure(shape, dtype, options.rounds, clock, layers)
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
