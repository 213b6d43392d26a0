"""A step in the scopes `global` and `deferred`; their gradients are in tests/exactness."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from megatron_rw.kernels import Statistic
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


def test_deferred_with_a_share_of_1_keeps_all() -> None:
    """Also where all losses are below those of the step before, as a share of 1 in a warm-up."""
    reweighter, seen = make("deferred", strategy="topk", top_share=0.5, warmup_steps=2)
    deferred_step(reweighter, 0, 8.0, 9.0)
    deferred_step(reweighter, 1, 4.0, 5.0)
    assert seen[1].weights.tolist() == [0.5, 0.5]


def test_deferred_target_takes_hold_soon_after_a_warm_up() -> None:
    reweighter, seen = make("deferred", target_ess=0.8, warmup_steps=3, moment_decay=0.9)
    for step in range(40):
        deferred_step(reweighter, step, 1.0, 2.0, 3.0, 4.0, 5.0)
    assert seen[2].statistics[Statistic.ESS] == pytest.approx(1.0)
    assert seen[-1].statistics[Statistic.ESS] == pytest.approx(0.8, abs=0.01)


def test_deferred_takes_micro_batches_of_different_lengths() -> None:
    reweighter, _ = make("deferred", unit="token")
    reweighter.begin(0, 2)
    rows = [torch.rand(1, length, dtype=torch.float64, requires_grad=True) for length in (2, 8)]
    objectives = [reweighter.weigh(TokenBatch(row, torch.ones_like(row))) for row in rows]
    factor = reweighter.finish()
    assert factor is not None
    (sum(objectives) * factor / 2).backward()
    torch.testing.assert_close(
        torch.cat([torch.as_tensor(row.grad) for row in rows], dim=1),
        torch.full((1, 10), 0.1, dtype=torch.float64),
    )


def test_global_takes_micro_batches_of_different_sizes() -> None:
    reweighter, _ = make("global")
    parts = [batch(1.0), batch(2.0, 3.0, 4.0)]
    reweighter.begin(0, 2)
    for part in parts:
        reweighter.score(part)
    losses = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    wanted = (losses * loss_weights(losses, "linupper", 1.0)).sum().item()
    assert sum(reweighter.weigh(part).item() / 2 for part in parts) == pytest.approx(wanted)


def test_softmax_over_tokens_says_the_temperature_that_it_uses() -> None:
    reweighter, seen = make("microbatch", strategy="softmax", temperature=0.01, unit="token")
    reweighter.begin(0)
    reweighter.weigh(batch(1.0, 2.0, 5.0))
    [used] = seen
    assert float(used.temperature) == pytest.approx(4 / 20)
    wanted = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64).div(4 / 20).softmax(0)
    torch.testing.assert_close(used.weights, wanted)


def test_what_is_not_in_the_set_is_neither_dealt_nor_counted() -> None:
    config: dict[str, Any] = {"sample_weights": "given", "control": "permute"}
    samples = dataclasses.replace(
        batch(1.0, 2.0, 3.0, 100.0),
        sample_weights=torch.tensor([1.0, 1.0, 1.0, 0.0])[:, None],
    )
    for step in range(8):
        reweighter, seen = make("microbatch", **config)
        reweighter.begin(step)
        reweighter.weigh(samples)
        wanted = loss_weights(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64), "linupper", 1.0)
        assert seen[0].weights.sort().values.tolist() == pytest.approx([0, *wanted.tolist()])
        assert seen[0].weights[3] == 0
    metrics = WeightMetrics(1)
    metrics.add(seen[0])
    report = metrics.read()
    assert report is not None
    assert (report.set_size, report.sample_loss_max) == (3, 3)
    [domain] = report.domains
    assert (domain.sample_share, domain.weight_ratio) == pytest.approx((1, 1))
    assert domain.lm_loss == pytest.approx(26.5)


@pytest.mark.parametrize(
    ("setting", "missing"),
    [
        ({"unit": "document"}, "documents"),
        ({"signal": "entropy"}, "signal"),
        ({"sample_weights": "given"}, "sample_weights"),
    ],
)
def test_a_batch_without_what_is_weighted_by_is_refused(
    setting: dict[str, Any], missing: str
) -> None:
    reweighter, _ = make("microbatch", **setting)
    reweighter.begin(0)
    with pytest.raises(ValueError, match=f"needs the {missing} of a TokenBatch"):
        reweighter.weigh(batch(1.0, 2.0))
