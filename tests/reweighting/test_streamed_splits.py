"""How documents and tokens are split over ranks and micro-batches changes no weight."""

from __future__ import annotations

import dataclasses
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megatron_rw.reweighting import ReduceGroup, ReweightConfig, TokenBatch, make_reweighter

# Loss, signal, mask, static weight of the document with this number, and whether one ends here.
integers, flags = st.integers, st.booleans()
a_token = st.tuples(integers(0, 9), integers(-9, 9), flags, st.sampled_from([0, 1, 2, 5]), flags)
some_rows: Any = st.lists(st.lists(a_token, min_size=4, max_size=4), min_size=2, max_size=6)
a_share, a_temperature = st.floats(0.05, 1.0), st.floats(0.2, 100.0)
a_ranged_config = st.builds(
    lambda delta, **rest: ReweightConfig(
        delta=1.0 if "softmax" in rest.values() else delta, **rest
    ),
    strategy=st.sampled_from(["linupper", "quadratic", "extremes", "softmax"]),
    unit=st.sampled_from(["token", "document"]),
    normalizer=st.sampled_from(["sample", "token"]),
    temperature=a_temperature,
    delta=st.floats(0.5, 2.0),
)
a_config = st.builds(
    lambda config, more: dataclasses.replace(config, **more),
    a_ranged_config,
    st.sampled_from([{}, {"strategy": "uniform"}, {"range": "quantile"}])
    | a_share.map(
        lambda share: {"strategy": "topk", "top_share": share, "temperature": 1.0, "delta": 1.0}
    )
    | a_share.map(lambda share: {"target_ess": share, "temperature": 1.0})
    | st.floats(1.0, 5.0).map(lambda most: {"max_weight": most}),
)
Batch = dict[str, Any]  # The fields of a `TokenBatch`.


def batch_of(rows: Any) -> Batch:
    losses, signal, mask, static, ends = torch.tensor(rows, dtype=torch.float64).unbind(-1)
    documents = (ends.cumsum(1) - ends).long()
    # On this grid the mean of up to four signals is exact.
    fields = {"losses": losses, "mask": mask, "signal": 12 / 64 * signal, "documents": documents}
    return fields | {"sample_weights": static.gather(1, documents)}


def weigh(config: ReweightConfig, *batches: Batch, ranks: Any = None) -> Tensor:
    """Weights of a step's only set."""
    seen: list[Any] = []
    reweighter = make_reweighter(config, ranks, seen.append)
    reweighter.begin(0, len(batches))
    for batch in batches:
        (reweighter.weigh if len(batches) == 1 else reweighter.score)(TokenBatch(**batch))
    weights: Tensor = seen[0].weights
    return weights


def close(wanted: Tensor) -> Any:
    return pytest.approx(wanted.flatten().tolist(), rel=1e-6, abs=1e-9)


@given(some_rows, a_config, st.lists(flags, min_size=24, max_size=24), flags)
def test_missing_is_0_and_masked_is_absent(rows: Any, config: Any, lost: Any, static: bool) -> None:
    batch = batch_of(rows)
    if not static:
        # The base of a masked unit would be 0 of its own.
        del batch["sample_weights"]
    gone = torch.tensor(lost)[: 4 * len(rows)].view(-1, 4)
    if config.unit == "document":
        gone = gone.gather(1, batch["documents"])
    signal = batch["signal"]
    wanted = weigh(config, batch | {"signal": signal.masked_fill(gone, 0.0)})
    # The same rows, and once more wholly masked, with anything behind the mask.
    batch["signal"] = signal.masked_fill(gone, math.nan)
    every = {name: values.repeat(2, 1) for name, values in batch.items()}
    every["mask"][len(rows) :] = 0
    for name, anything in (("losses", math.nan), ("signal", 1e30), ("sample_weights", 7.0)):
        if name in every:
            every[name][every["mask"] == 0] = anything
    assert weigh(config, every).tolist() == close(torch.cat([wanted, 0 * wanted]))


def all_reduce(
    tensor: Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False
) -> Any:
    """Over a group whose two ranks are threads; it has ended when it returns."""
    group.sent.append(tensor.clone())
    group.barrier.wait()
    both = torch.stack(group.sent[-2:])
    group.barrier.wait()
    tensor.copy_(both.amax(0) if op == dist.ReduceOp.MAX else both.sum(0))
    return SimpleNamespace(wait=lambda: None) if async_op else None


@given(some_rows, a_config, st.sampled_from(["micro-batches", "DP2", "CP2"]))
def test_how_tokens_are_split_changes_nothing(rows: Any, config: Any, how: str) -> None:
    batch = batch_of(rows[: len(rows) // 2 * 2])
    weights = weigh(config, batch).view(len(batch["mask"]), -1)
    along = int(how == "CP2")
    parts = [{n: v.chunk(2, dim=along)[half] for n, v in batch.items()} for half in (0, 1)]
    if how == "micro-batches":
        joined = weigh(dataclasses.replace(config, scope="global"), *parts)
        assert joined.tolist() == close(weights)
        return
    group: Any = SimpleNamespace(barrier=threading.Barrier(2, timeout=60), sent=[])
    ranks, wanted = [ReduceGroup(group, rank, 2) for rank in (0, 1)], weights.chunk(2, dim=along)
    if how == "CP2":
        ranks = [ReduceGroup(group, 0, 1, rank, 2, group) for rank in (0, 1)]
        # Each of these has all documents.
        wanted = (weights, weights) if config.unit == "document" else wanted
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(2) as pool:
        patch.setattr(dist, "all_reduce", all_reduce)
        found = pool.map(lambda part, rank: weigh(config, part, ranks=rank), parts, ranks)
        for weights, own in zip(found, wanted, strict=True):
            assert weights.tolist() == close(own)
