"""What each scope sends beside Megatron's own, counted on `torch.distributed` itself."""

from __future__ import annotations

import functools
from collections import Counter
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
        traffic = found[scope] = Counter()
        with pytest.MonkeyPatch.context() as patch:
            for name in COUNTED:
                patch.setattr(dist, name, counted(traffic, name, getattr(dist, name)))
            model.run_step(forward_step, chunks, second, forward_only=scope == "forward")
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
