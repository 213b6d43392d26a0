"""What each scope sends beside Megatron's own, counted on `torch.distributed` itself."""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from megatron_rw.integrations import attach
from megatron_rw.reweighting import ReweightConfig
from tests.exactness import cases, model, oracle, worker
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
    model_parallel_cuda_manual_seed(1)
    found = {}
    for scope in ("none", "forward", "microbatch", "global", "deferred"):
        ddp = DistributedDataParallelConfig(**layout.ddp)
        chunks = model.build(worker.core_config(layout, torch.float32), ddp, oracle.parameters(0))
        forward_step: Any = model.forward_step
        if scope not in ("none", "forward"):
            config: Any = {"strategy": "linupper", "scope": scope}
            forward_step = attach(forward_step, ReweightConfig(**config))
        first, second, _ = cases.steps("ragged")
        worker.run_step(forward_step, chunks, first)
        traffic: Traffic = Counter()
        originals = {name: getattr(dist, name) for name in COUNTED}
        for name, original in originals.items():
            setattr(dist, name, counted(traffic, name, original))
        worker.run_step(forward_step, chunks, second, forward_only=scope == "forward")
        for name, original in originals.items():
            setattr(dist, name, original)
        found[scope] = traffic
    return found


SAMPLES = cases.SET_SIZE
STEP_SAMPLES = SAMPLES * cases.MICRO_BATCHES


@pytest.mark.parametrize("layout_name", ["one process", "DP2", "PP2", "DP2 CP2 distopt"])
def test_each_scope_sends_what_the_docs_say(layout_name: str) -> None:
    layout = cases.LAYOUTS[layout_name]
    ranks = run_ranks(layout.processes, traffic_by_scope, layout, **layout.sizes)
    stages = layout.sizes["pipeline_model_parallel_size"]
    shards = layout.sizes["context_parallel_size"]
    for rank, found in enumerate(ranks):
        own = found["none"]
        last = rank >= layout.processes * (stages - 1) // stages
        wanted: dict[str, Traffic] = {
            "microbatch": Counter({("all_reduce", 12 * SAMPLES): cases.MICRO_BATCHES}),
            "global": Counter({("all_reduce", 12 * STEP_SAMPLES): 1}),
            "deferred": Counter({("all_reduce", 12 * STEP_SAMPLES): 1}),
        }
        if shards > 1:
            rows = SAMPLES // (layout.processes // stages // shards)
            wanted["deferred"]["all_reduce", 8 * rows] += cases.MICRO_BATCHES
        for scope, expected in wanted.items():
            passes = own + found["forward"] if scope == "global" else own
            if not last:
                expected = Counter()
            if scope == "deferred" and stages > 1:
                expected = expected + Counter({("broadcast", 24): 1})
            assert found[scope] == passes + expected, f"rank {rank}, {scope}"
