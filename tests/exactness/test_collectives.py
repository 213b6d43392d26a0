"""What each scope sends beside Megatron's own, counted on `torch.distributed` itself."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_rw.integrations import attach
from tests.exactness import cases, model
from tests.ranks import run_ranks

# Operation and bytes of its tensor on this rank.
Traffic = Counter[tuple[str, int]]
COUNTED = (
    "all_reduce",
    "broadcast",
    "all_gather",
    "all_gather_into_tensor",
    "reduce_scatter_tensor",
)

# A set's collectives, without those of `over_shards`: bytes of each, from those of all its
# sequences or from the ranks.
ENDS, HISTOGRAM = 8, 2 * 4096 * 8
CHOICES: dict[str, Callable[[int, int], list[int]]] = {
    "sequence excess token extremes microbatch range=quantile": lambda n, ranks: [20 * n],
    "sequence loss token quadratic global max_weight=1.3 sample_weights=given": (
        lambda n, ranks: [16 * n]
    ),
    "token loss sample linupper microbatch": lambda n, ranks: [ENDS, 32 * ranks],
    "token excess token linupper global max_weight=1.3": (
        lambda n, ranks: [ENDS, HISTOGRAM, 32 * ranks]
    ),
    "token excess sample softmax deferred": lambda n, ranks: [32 * ranks],
    "document loss sample topk microbatch sample_weights=given": (
        lambda n, ranks: [ENDS, HISTOGRAM, 32 * ranks]
    ),
    "document loss token uniform deferred": lambda n, ranks: [32 * ranks],
}


def counted(traffic: Traffic, name: str, original: Any) -> Any:
    @functools.wraps(original)
    def call(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        traffic[name, tensor.nbytes] += 1
        return original(tensor, *args, **kwargs)

    return call


def traffic_by_scope(layout: cases.Layout) -> dict[str, Traffic]:
    """Collectives of one step on this rank: of Megatron's own loss, of its forward passes alone
    (`forward`), and of every scope.
    """
    found: dict[str, Traffic] = {}
    for scope in ("none", "forward", *cases.CONFIGS):
        chunks = model.build(layout, torch.float32)
        forward_step: Any = model.forward_step
        if scope in cases.CONFIGS:
            forward_step = attach(forward_step, cases.CONFIGS[scope])
        first, second, _ = cases.steps("ragged")
        model.run_step(forward_step, chunks, first)
        found[scope] = traffic_of(forward_step, chunks, second, forward_only=scope == "forward")
    return found


def traffic_of(forward_step: Any, chunks: Any, step: Any, forward_only: bool = False) -> Traffic:
    """Collectives of one step on this rank."""
    traffic: Traffic = Counter()
    with pytest.MonkeyPatch.context() as patch:
        for name in COUNTED:
            patch.setattr(dist, name, counted(traffic, name, getattr(dist, name)))
        model.run_step(forward_step, chunks, step, forward_only=forward_only)
    return traffic


def traffic_by_choice(layout: cases.Layout) -> dict[str, Traffic]:
    """As `traffic_by_scope`, of every line of `CHOICES`."""
    chunks = model.build(layout, torch.float32)
    first, second, _ = cases.detailed_steps()
    found = {
        name: traffic_of(model.forward_step, chunks, second, forward_only=name == "forward")
        for name in ("none", "forward")
    }
    for name in CHOICES:
        forward_step = model.WeightedForwardStep(cases.CHOICES[name])
        model.run_step(forward_step, chunks, first)
        found[name] = traffic_of(forward_step, chunks, second)
    return found


@pytest.mark.parametrize("name", ["one process", "DP2", "PP2", "DP2 CP2 distopt"])
def test_each_scope_sends_what_the_docs_say(name: str) -> None:
    layout = cases.Layout(name)
    ranks = run_ranks(layout.processes, traffic_by_scope, layout, **layout.sizes)
    stages, shards = layout.size("PP"), layout.size("CP")
    # Three numbers of four bytes for each sample of the set.
    micro_batch = 12 * cases.SET_SIZE
    step = micro_batch * cases.MICRO_BATCHES
    for rank, found in enumerate(ranks):
        wanted: dict[str, Traffic] = {
            "microbatch": Counter({("all_reduce", micro_batch): cases.MICRO_BATCHES}),
            "global": Counter({("all_reduce", step): 1}),
            "deferred": Counter({("all_reduce", step): 1}),
        }
        if shards > 1:
            rows = cases.SET_SIZE // layout.size("DP")
            wanted["deferred"]["all_reduce", 12 * rows] += cases.MICRO_BATCHES
        if rank < layout.processes * (stages - 1) // stages:
            wanted = {scope: Counter() for scope in wanted}
        if stages > 1:
            wanted["deferred"] = wanted["deferred"] + Counter({("broadcast", 48): 1})
        # The scoring pass.
        wanted["global"] = wanted["global"] + found["forward"]
        for scope, expected in wanted.items():
            assert found[scope] == found["none"] + expected, f"rank {rank}, {scope}"


@pytest.mark.parametrize("name", ["DP2", "DP2 CP2 distopt"])
def test_each_choice_sends_what_the_docs_say(name: str) -> None:
    layout = cases.Layout(name)
    shards, sets = layout.size("CP"), cases.MICRO_BATCHES
    rows = cases.SET_SIZE // layout.size("DP")
    for found in run_ranks(layout.processes, traffic_by_choice, layout, **layout.sizes):
        for choice, bytes_of_set in CHOICES.items():
            config, expected = cases.CHOICES[choice], Counter(found["none"])
            sequences = cases.SET_SIZE
            if config.scope == "global":
                sequences *= sets
                expected += found["forward"]
            for size in bytes_of_set(sequences, layout.processes):
                expected["all_reduce", size] += sets if config.scope == "microbatch" else 1
            if config.unit == "document" and shards > 1:
                # Three or four sums for each place that a document can have.
                sums = 4 if config.sample_weights else 3
                expected["all_reduce", 4 * sums * rows * cases.SEQUENCE] += sets
            assert found[choice] == expected, choice
