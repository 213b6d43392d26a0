"""A step in the scopes `global` and `deferred`; their gradients are in tests/exactness."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from megatron_rw.reweighting import (
    DeferredReweighter,
    ReduceGroup,
    ReweightConfig,
    Reweighter,
    TokenBatch,
    WeightedSet,
    WeightMetrics,
    loss_weights,
    make_reweighter,
)


def make(scope: Any, **settings: Any) -> tuple[Reweighter, list[WeightedSet]]:
    seen: list[WeightedSet] = []
    config = ReweightConfig(**{"strategy": "linupper", "scope": scope, **settings})
    return make_reweighter(config, observe=seen.append), seen


def batch(*losses: float) -> TokenBatch:
    """One-token samples."""
    values = torch.tensor(losses, dtype=torch.float64)[:, None]
    return TokenBatch(values, torch.ones_like(values))


def deferred_step(reweighter: Reweighter, step: int, *losses: float) -> float:
    reweighter.begin(step)
    reweighter.weigh(batch(*losses))
    factor = reweighter.finish()
    assert factor is not None
    return factor.item()


def test_first_deferred_step_is_uniform_and_the_next_goes_by_its_range() -> None:
    reweighter, seen = make("deferred")
    assert deferred_step(reweighter, 0, 1.0, 2.0, 5.0) == 1
    assert seen[0].weights.tolist() == pytest.approx([1 / 3] * 3)
    deferred_step(reweighter, 1, 1.0, 2.0, 5.0)
    wanted = loss_weights(torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64), "linupper", 1.0)
    torch.testing.assert_close(seen[1].weights, wanted)


def test_deferred_step_run_again_goes_by_the_same_range() -> None:
    reweighter, seen = make("deferred", moment_decay=0.5)
    assert isinstance(reweighter, DeferredReweighter)
    deferred_step(reweighter, 0, 1.0, 3.0)
    deferred_step(reweighter, 1, 2.0, 6.0)
    after = reweighter.plan
    deferred_step(reweighter, 1, 2.0, 6.0)
    assert torch.equal(seen[1].weights, seen[2].weights)
    assert torch.equal(reweighter.plan, after)
    assert after[:2].tolist() == [0.5 * 1 + 0.5 * 2, 0.5 * 3 + 0.5 * 6]


def test_deferred_moments_pass_over_what_is_not_finite() -> None:
    reweighter, _ = make("deferred")
    assert isinstance(reweighter, DeferredReweighter)
    deferred_step(reweighter, 0, 1.0, math.nan, 3.0, math.inf)
    assert reweighter.plan[:2].tolist() == [1.0, 3.0]
    assert deferred_step(reweighter, 1, math.nan, math.nan) == 1
    assert reweighter.plan[:2].tolist() == [1.0, 3.0]


def test_losses_beyond_the_range_are_clamped_and_counted() -> None:
    reweighter, seen = make("deferred")
    deferred_step(reweighter, 0, 2.0, 4.0)
    deferred_step(reweighter, 1, 1.0, 2.0, 3.0, 9.0)
    low, edge, middle, high = seen[1].weights.tolist()
    assert low == edge
    assert middle == high
    metrics = WeightMetrics(1)
    metrics.add(seen[1])
    report = metrics.read()
    assert report is not None
    assert report.beyond_range == 0.5
    metrics.reset()
    metrics.add(seen[0])
    report = metrics.read()
    assert report is not None
    assert report.beyond_range == 0


def test_global_with_one_micro_batch_is_microbatch() -> None:
    objectives = []
    for scope in ("global", "microbatch"):
        reweighter, _ = make(scope)
        reweighter.begin(0, 1)
        assert not reweighter.scores_first
        objectives.append(reweighter.weigh(batch(1.0, 2.0, 5.0)).item())
    assert objectives[0] == objectives[1]


def test_global_refuses_a_step_that_was_not_scored_whole() -> None:
    reweighter, _ = make("global")
    reweighter.begin(0, 3)
    assert reweighter.scores_first
    reweighter.score(batch(1.0, 2.0))
    with pytest.raises(RuntimeError, match="1 of 3 micro-batches were scored"):
        reweighter.weigh(batch(1.0, 2.0))


@pytest.mark.parametrize("weighed", [1, 3])
def test_deferred_refuses_another_number_of_micro_batches(weighed: int) -> None:
    reweighter, _ = make("deferred")
    reweighter.begin(0, 2)
    for _ in range(weighed):
        reweighter.weigh(batch(1.0, 2.0))
    with pytest.raises(RuntimeError, match=f"{weighed} of 2 micro-batches were weighed"):
        reweighter.finish()


@pytest.mark.parametrize("unit", ["sequence", "token"])
def test_deferred_sums_up_during_the_backward_pass(
    unit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def all_reduce(tensor: torch.Tensor, group: Any, async_op: bool = False) -> Any:
        calls.append("started" if async_op else "waited for at once")
        return SimpleNamespace(wait=lambda: calls.append("waited for"))

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    config = ReweightConfig(strategy="linupper", scope="deferred", unit=cast(Any, unit))
    reweighter = make_reweighter(config, ReduceGroup(group=cast(Any, "one rank")))
    reweighter.begin(0, 2)
    reweighter.weigh(batch(1.0, 2.0))
    assert not calls
    reweighter.weigh(batch(3.0, 4.0))
    assert calls == ["started"]
    reweighter.finish()
    assert calls == ["started", "waited for"]


def test_only_global_takes_scores() -> None:
    reweighter, _ = make("deferred")
    reweighter.begin(0, 2)
    with pytest.raises(RuntimeError, match="deferred needs no scores"):
        reweighter.score(batch(1.0, 2.0))


@pytest.mark.parametrize(
    "control", [{"control": "permute"}, {"control": "random-drop", "top_share": 0.5}]
)
def test_chance_follows_seed_and_step(control: dict[str, Any]) -> None:
    """A step that is run again has the same chance."""

    def weights(seed: int, step: int) -> tuple[float, ...]:
        strategy = "topk" if "top_share" in control else "softmax"
        reweighter, seen = make("microbatch", strategy=strategy, control_seed=seed, **control)
        reweighter.begin(step)
        reweighter.weigh(batch(*(float(number) for number in range(16))))
        return tuple(seen[0].weights.tolist())

    assert weights(3, 5) == weights(3, 5)
    assert len({weights(seed, step) for seed in (0, 1) for step in range(5)}) == 10
