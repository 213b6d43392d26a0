"""Forward and backward pass of ours against every other implementation there is, in one process.

    python benchmarks/kernels/compare.py {logits,layer,launches,weighting,plot} [--device cpu]

`logits` are losses of logits, `layer` an output layer with its loss, `launches` our losses of
logits by threads of a block, `weighting` the weights by backend, whose calls the host starts while
the device still sleeps; `plot` draws what `logits` wrote to `--output`.

All see the same random inputs, labels and per-token upstream gradients, one after the other within
a round, from cold caches, in an order that turns from round to round. The floor takes part: forward
a copy that moves the bytes of the logits once, backward one that moves them twice, and a layer's
three matrix products. Errors are relative to fp64, of a run in which some tokens have a gradient;
the exit status is 1 where those of ours are too large. Extra memory is the peak beyond inputs and
the gradients of a layer, over that of the logits.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from argparse import Namespace
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, ClassVar
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.kernels.peers import LAYERS, LOSSES, Call, available
from benchmarks.kernels.record import Result, arguments, print_table
from benchmarks.kernels.timing import Clock, interleave, spread
from megatron_rw import kernels
from megatron_rw.kernels.cuda_backend import CudaBackend, Launch
from megatron_rw.kernels.logits_plan import FEWEST_COLUMNS

BATCH, WARM_UP = 4, 2
ENTROPY = kernels.CrossEntropyOptions(entropy=True)
PASSES = ("forward", "backward", "both")


class Logits:
    """Random logits of a spread of 2, labels `[s, b]` and upstream gradients as weights make them.

    Args:
        shape: tokens, hidden units where it is a layer, vocabulary.
        device: of all tensors.
        dtype: of logits and hidden states.

    Attributes:
        shapes: by device, the most telling first; the CPU's are the quick start's.
        bounds: of the errors of ours in bf16; the gradients' are in the order of the leaves.
        kept_bytes: of gradients that belong to the result and are no extra memory.
    """

    result = "cross_entropy"
    peers: ClassVar = LOSSES
    shapes: ClassVar = {
        "cuda": "8192x128256,8192x32000,8192x50304,32768x128256,8192x262144,4096x128256,"
        "8192x131072,32768x32000,4096x32000,4096x50304,32768x50304,4096x262144,32768x262144",
        "cpu": "2048x2048,1024x2048",
        "check": "8192x128256,8192x32000",
        "rehearsal": "8x96,4x40",
    }
    bounds: ClassVar = {"loss": 1e-5, "entropy": 1e-5, "dz": 4e-3}
    kept_bytes = 0

    def __init__(self, shape: Sequence[int], device: torch.device, dtype: torch.dtype) -> None:
        tokens, *_, vocab = shape
        generator = torch.Generator(device).manual_seed(0)
        self.logits_bytes = tokens * vocab * dtype.itemsize
        size = (tokens // BATCH, BATCH)
        self.target = torch.randint(0, vocab, size, generator=generator, device=device)
        self.upstream = torch.rand(size, generator=generator, device=device)
        self.some = torch.arange(tokens, device=device).view(size) % -(-tokens // 64) == 0
        self._make(shape, dtype, partial(torch.randn, generator=generator, device=device))

    def _make(self, shape: Sequence[int], dtype: torch.dtype, random: Call) -> None:
        self._source = self.upstream.new_empty(*self.target.shape, shape[1], dtype=dtype)
        # Some rows at a time: fp32 random numbers of all would not fit.
        for part in self._source.flatten(0, 1).split(4096):
            part.copy_(random(part.shape) * 2)
        self._logits = torch.empty_like(self._source)

    def ours(self) -> dict[str, Call]:
        """Our functions of leaves and labels; others are compared with the first."""
        loss = kernels.vocab_parallel_cross_entropy
        return {"ours": loss, "ours, with entropy": partial(loss, options=ENTROPY)}

    def leaves(self) -> list[Tensor]:
        """What a run takes before the labels; logits anew, as some overwrite them."""
        return [self._logits.copy_(self._source).detach().requires_grad_()]

    def exact(self) -> list[Tensor]:
        """Losses, entropies and gradients of `some` tokens in fp64, in the order of `bounds`."""
        first, *rest = self.leaves()
        leaves = [x.detach().double().requires_grad_() for x in (first[self.some], *rest)]
        log_p = torch.log_softmax(leaves[0] @ leaves[1].T if rest else leaves[0], dim=1)
        losses = -log_p.gather(1, self.target[self.some][:, None]).squeeze(1)
        gradients = torch.autograd.grad(losses, leaves, self.upstream[self.some].double())
        return [losses.detach(), -(log_p.exp() * log_p).sum(dim=1).detach(), *gradients]

    def floor(self) -> tuple[Call, Call]:
        """The least of a forward and a backward pass."""
        into, source = self._logits.flatten(), self._source.flatten()
        half = len(source) // 2
        return lambda: into[:half].copy_(source[:half]), lambda: into.copy_(source)


class Launches(Logits):
    """The problem of `Logits`, for our CUDA kernels with other numbers of threads."""

    result = "launches"
    peers: ClassVar = {}
    shapes: ClassVar = {"cuda": "8192x128256,8192x32000,4096x50304", "rehearsal": "8x96,4x40"}

    def ours(self) -> dict[str, Call]:
        """One for each number of threads in a block."""

        def call(backend: CudaBackend, *given: Tensor) -> kernels.CrossEntropy:
            with mock.patch.object(kernels.cross_entropy, "backend", return_value=backend):
                return kernels.vocab_parallel_cross_entropy(*given)

        counts = (256, 128, 512, 1024)
        return {f"ours, {n} threads": partial(call, CudaBackend(Launch(n, n))) for n in counts}


class Layer(Logits):
    """Random hidden states and a weight, whose logits have a spread of 2."""

    result = "linear_cross_entropy"
    peers: ClassVar = LAYERS
    shapes: ClassVar = {
        "cuda": "8192x4096x128256,8192x2048x128256,8192x4096x32000,32768x4096x128256,"
        "8192x2048x32000,8192x4096x262144,32768x4096x32000,32768x2048x128256,32768x4096x262144",
        "cpu": "2048x128x2048,1024x256x32000",
        "check": "8192x4096x128256",
        "rehearsal": "8x16x1100",
    }
    # Its losses are those of logits rounded to bf16.
    bounds: ClassVar = {"loss": 1e-3, "entropy": 1e-3, "dX": 1e-2, "dW": 1e-2}

    def _make(self, shape: Sequence[int], dtype: torch.dtype, random: Call) -> None:
        tokens, size, vocab = shape
        self._hidden = random(*self.target.shape, size).to(dtype)
        self._weight = (random(vocab, size) * 2 / size**0.5).to(dtype)
        self.kept_bytes = self._hidden.nbytes + self._weight.nbytes
        whole = kernels.plan_logits(tokens, vocab, size, dtype, 1 << 60).nbytes
        self._beside = whole - self.logits_bytes
        self._least = tokens * min(vocab, FEWEST_COLUMNS) * dtype.itemsize

    def ours(self) -> dict[str, Call]:
        """One for each budget."""
        budgets = {part: max(self.logits_bytes // part, self._least) for part in (4, 16)}
        layer = kernels.linear_weighted_cross_entropy
        return {
            f"ours, 1/{part} of the logits": partial(layer, logits_budget=self._beside + budget)
            for part, budget in budgets.items()
        }

    def leaves(self) -> list[Tensor]:
        """The hidden states and the weight."""
        return [tensor.detach().requires_grad_() for tensor in (self._hidden, self._weight)]

    def floor(self) -> tuple[Call, Call]:
        """The copies and the three matrix products."""
        hidden, weight = self._hidden.flatten(0, 1), self._weight
        logits, copy = hidden.new_empty(2, len(hidden), len(weight)).unbind()
        half = len(hidden) // 2

        def forward() -> None:
            copy[:half].copy_(torch.mm(hidden, weight.T, out=logits)[:half])

        def backward() -> None:
            torch.mm(copy.copy_(logits), weight)
            torch.mm(copy.T, hidden)

        return forward, backward


def run(call: Call, problem: Logits, clock: Clock, upstream: Tensor) -> tuple[list[Any], Any]:
    """Losses, entropies or None, gradients; milliseconds of both passes."""
    leaves = problem.leaves()
    views = [leaf.view_as(leaf) for leaf in leaves]
    made, forward = clock.time(lambda: call(*views, problem.target))
    losses, _, entropy = made if isinstance(made, kernels.CrossEntropy) else (made, None, None)
    upstream = upstream.to(losses.dtype)
    gradients, backward = clock.time(lambda: torch.autograd.grad(losses, leaves, upstream))
    return [losses.detach(), entropy, *gradients], (forward, backward, forward + backward)


def check(call: Call, problem: Logits, clock: Clock, exact: list[Tensor]) -> dict[str, Any]:
    """Extra memory and errors of one run."""
    upstream = problem.upstream * problem.some
    (made, _), peak = clock.peak(lambda: run(call, problem, clock, upstream))
    extra = None if peak is None else (peak - problem.kept_bytes) / problem.logits_bytes
    found: dict[str, Any] = {"extra": extra}
    for name, value, truth in zip(problem.bounds, made, exact, strict=True):
        if value is not None:
            mine = value if value.shape == truth.shape else value[problem.some]
            found[f"{name} error"] = float((mine - truth).norm() / truth.norm())
    return found


def measure(
    problem: Logits, peers: dict[str, Call], given: dict[str, Any], rounds: int, clock: Clock
) -> dict[str, Any]:
    """What is found of ours, with arguments given, and of others; times where there are rounds."""
    # Compilers would turn to dynamic shapes.
    torch.compiler.reset()
    exact = problem.exact()
    calls = {name: partial(call, **given) for name, call in problem.ours().items()} | peers
    found, ready = dict[str, Any](), dict[str, Call]()
    for name, call in calls.items():
        try:
            for _ in range(WARM_UP):
                run(call, problem, clock, problem.upstream)
            found[name] = check(call, problem, clock, exact)
            ready[name] = lambda call=call: run(call, problem, clock, problem.upstream)[1]
        except Exception as error:  # A peer that fails on this device is a result too.
            if name.startswith("ours"):
                raise
            found[name] = {"failed": f"{type(error).__name__}: {error}"[:300]}
        torch.cuda.empty_cache()
    if not rounds:
        return found
    del exact
    forward, backward = problem.floor()

    def copies() -> tuple[float, float, float]:
        times = clock.time(forward)[1], clock.time(backward)[1]
        return (*times, sum(times))

    ready["floor"] = copies
    timed = interleave(rounds, ready)
    for name, series in timed.items():
        mine = found.setdefault(name, {})
        for place, what in enumerate(PASSES):
            pairs = zip(timed["floor"], series, strict=True)
            share = median(floor[place] / times[place] for floor, times in pairs)
            mine[what] = spread([times[place] for times in series]) | {"of floor": share}
        pairs = zip(series, timed[next(iter(calls))], strict=True)
        mine["over ours"] = median(theirs[-1] / ours[-1] for theirs, ours in pairs)
    return found


def show(title: str, found: dict[str, Any], columns: Iterable[str]) -> None:
    """One line an implementation, the fastest first, and why others are not there."""
    rows = [["", *(f"{what} ms (of floor)" if what in PASSES else what for what in columns)]]
    for name in sorted(found, key=lambda name: found[name].get("both", {"median": 0.0})["median"]):
        rows.append([name])
        if "failed" in found[name]:
            print(f"without {rows.pop()[0]}: {found[name]['failed']}")
            continue
        for value in map(found[name].get, columns):
            if isinstance(value, dict):
                rows[-1].append(f"{value['median']:.3f} ({value['of floor']:.0%})")
            else:
                rows[-1].append("-" if value is None else f"{value:.3g}")
    print_table(title, rows)


def weighting(options: Namespace) -> None:
    """Print and write the device's microseconds of the weighting."""
    result, found = Result("weighting", options), dict[int, Any]()
    # No more calls than the host starts while the device sleeps.
    clock, calls = Clock(result.device), 20
    backends = ("torch", "cuda") if options.rehearse or clock.on_gpu else ("torch",)

    def microseconds(losses: Tensor, name: Any) -> float:
        units, how = kernels.Units(losses, losses > 0.01), kernels.Weighting(strategy="linupper")
        call: Call = partial(kernels.weigh_units, units, how, backend_name=name)
        return 1000 * clock.time(lambda: [call() for _ in range(calls)])[1] / calls

    for samples in (32, 512) if options.rehearse else (32, 512, 4096, 16384, 65536):
        losses = torch.rand(samples, device=result.device) * 6
        cases = {name: partial(microseconds, losses, name) for name in backends}
        interleave(1, cases)
        timed = interleave(options.rounds, cases)
        found[samples] = {name: spread(times) for name, times in timed.items()}
        result.save(calls=calls, microseconds=found)
    rows = [[str(n), *(f"{x[name]['median']:.1f}" for name in backends)] for n, x in found.items()]
    print_table("weighting, microseconds a call", [["samples", *backends], *rows])


def plot(path: Path) -> None:
    """Draw the share of the floor by shape and implementation beside a result of `logits`."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        print(f"without a plot: {error}")
        return
    record = json.loads(path.read_text())
    shapes = sorted(record["shapes"].items(), key=lambda item: int(item[0].split("x")[1]))
    names = list(dict.fromkeys(name for _, found in shapes for name in found if name != "floor"))
    figure = Figure(figsize=(max(7, 1.6 * len(shapes)), 4.2), layout="constrained")
    axes = figure.subplots()
    for index, name in enumerate(names):
        places = [place + 0.8 * (index / len(names) - 0.5) for place in range(len(shapes))]
        # Where it did not run there is no bar.
        both = [found.get(name, {}).get("both", {"of floor": 0.0}) for _, found in shapes]
        axes.bar(places, [100 * x["of floor"] for x in both], 0.8 / len(names), label=name)
    axes.set_xticks(range(len(shapes)), [shape for shape, _ in shapes])
    axes.set_ylabel("% of the speed of a copy, both passes")
    rehearsal = "Rehearsal, no measurement: " if record["rehearsal"] else ""
    axes.set_title(f"{rehearsal}{record['device']}, {record['date']}")
    axes.legend(fontsize=7, ncols=3)
    figure.savefig(path.with_suffix(".png"), dpi=110)


def main() -> int:
    """Measure, print, and write the result after every shape."""
    kinds = {"logits": Logits, "layer": Layer, "launches": Launches}
    parser = arguments(__doc__, 15)
    parser.add_argument("kind", choices=[*kinds, "weighting", "plot"])
    parser.add_argument("--shapes", help="separated by commas; some that suit the device")
    parser.add_argument("--check", action="store_true", help="errors alone, the entropy's besides")
    options = parser.parse_args()
    if options.kind not in kinds:
        weighting(options) if options.kind == "weighting" else plot(options.output)
        return 0
    kind, end = kinds[options.kind], time.monotonic() + options.budget_s
    result = Result(kind.result, options)
    device, clock = result.device, Clock(result.device)
    where = "rehearsal" if options.rehearse else "check" if options.check else device.type
    dtype = "float32" if where == "cpu" else "bfloat16"
    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group(store=store, rank=0, world_size=1)
    peers, missing = available(device, {} if options.check else kind.peers)
    print(*(f"without {name}: {reason}" for name, reason in missing.items()), sep="\n")
    errors = {f"{what} error": bound for what, bound in kind.bounds.items()}
    given, rounds = ({"options": ENTROPY}, 0) if options.check else ({}, options.rounds)
    done, left_out, wrong = dict[str, Any](), list[str](), list[str]()
    result.record |= {"dtype": dtype, "rounds": rounds, "missing": missing}
    for shape in (options.shapes or kind.shapes[where]).split(","):
        try:
            if time.monotonic() > end:
                raise TimeoutError
            made = ([int(size) for size in shape.split("x")], device, getattr(torch, dtype))
            found = done[shape] = measure(kind(*made), peers, given, rounds, clock)
        except (TimeoutError, torch.OutOfMemoryError):
            left_out.append(f"{shape} is left out for time or memory")
        else:
            show(f"{shape}, {dtype}", found, [*PASSES, "over ours", "extra", *errors])
            for name, (what, bound) in itertools.product(found, errors.items()):
                if name.startswith("ours") and not found[name].get(what, 0.0) <= bound:
                    wrong.append(f"error: {shape}, {name}: {what} is above {bound:g}")
        if not options.check:
            result.save(left_out=left_out, shapes=done)
    print(*left_out, *wrong, sep="\n")
    dist.destroy_process_group()
    return 1 if wrong or (options.check and left_out) else 0


if __name__ == "__main__":
    sys.exit(main())
