"""Both backends of `weigh_units` against the fp64 oracle: weights, statistics and plans."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_rw.kernels import Plan, Statistic, Units, UnitWeights, Weighting, weigh_units
from tests.kernels import BACKENDS, DEVICE
from tests.reweighting import oracle


def spread_losses(count: int, seed: int = 0) -> Tensor:
    """Losses as training has them, with a tie at the top."""
    losses = torch.rand(count, generator=torch.Generator().manual_seed(seed)) * 6 + 1
    losses[-1] = losses.max()
    return losses.to(DEVICE)


def check(result: UnitWeights, units: Units, how: Weighting, plan: Tensor | None = None) -> None:
    """All is the oracle's, and statistics are those in fp64 of its weights, see `Statistic`."""
    ones = torch.ones_like(units.signals)
    signals, mask, base, counts = (
        (one if x is None else x).tolist()
        for x, one in zip(units, (ones, ones.bool(), ones, ones), strict=True)
    )
    rows = list(zip(signals, mask, base, counts, strict=True))
    inside = [math.isfinite(s) and m and b > 0 for s, m, b, _ in rows]
    members = [row for row, used in zip(rows, inside, strict=True) if used]
    wanted = oracle.weights(signals, how, mask, base, counts)
    if plan is not None:
        used_plan: Any = tuple(plan.tolist())
        planned = [b * oracle.planned(s, how, used_plan) for s, _, b, _ in rows]
        wanted = [w if used else 0.0 for w, used in zip(planned, inside, strict=True)]
    relative = [w / b for w, b, used in zip(wanted, base, inside, strict=True) if used]
    whole, total = math.fsum(b for *_, b, _ in members), math.fsum(wanted)
    squares = math.fsum(v * v * b for v, (*_, b, _) in zip(relative, members, strict=True))
    statistics = [math.fsum(c for *_, c in members), whole, total, 0.0, 0.0]
    if total:
        statistics[3:] = total**2 / (whole * squares), max(relative) * whole / total
    own: Any = oracle.EMPTY_PLAN
    if members:
        only, _, bases, numbers = zip(*members, strict=True)
        own = oracle.plan(only, how, bases, numbers, for_others=plan is not None)
    assert result.weights.dtype == torch.float32
    assert not result.weights[~torch.tensor(inside, device=DEVICE)].any()
    for found, exactly in zip(result, (wanted, statistics, own), strict=True):
        if not (exactly is own and not members):
            made = torch.tensor(exactly, dtype=torch.float64, device=DEVICE)
            torch.testing.assert_close(found.double(), made, rtol=2e-5, atol=1e-7)


# One sample, one warp, a ragged last block, and the most that a single launch is meant for.
@pytest.mark.parametrize("count", [1, 2, 37, 300, 5000, 65536])
@pytest.mark.parametrize("strategy", oracle.STRATEGIES)
def test_sizes(strategy: Any, count: int, name: Any) -> None:
    units = Units(spread_losses(count))
    for r in (0.4, torch.tensor(0.7, device=DEVICE)):
        how = Weighting(strategy=strategy, temperature=r, top_share=0.3)
        check(weigh_units(units, how, backend_name=name), units, how)


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "target_ess": {"target_ess": 0.8},
    # One that no temperature is sharp enough for.
    "least ess": {"target_ess": 0.001},
    "max_weight": {"max_weight": 1.2},
    "quantile": {"range": "quantile"},
    "all": {"target_ess": 0.6, "max_weight": 1.1, "range": "quantile", "top_share": 0.7},
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("strategy", oracle.STRATEGIES)
def test_settings(strategy: Any, setting: str, name: Any) -> None:
    # Negative ones as well, as signals are that are differences.
    signals = spread_losses(60) - 3
    signals[7] = math.nan
    random = torch.rand(3, 60, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    base = (2 * random[0] - 0.1).clamp(min=0)
    options = {"temperature": 0.4, "delta": 1.5, "top_share": 0.25} | SETTINGS[setting]
    how = Weighting(strategy=strategy, **options)
    units = Units(signals, random[1] > 0.1, base, (random[2] * 9).ceil())
    for some in (Units(signals), units):
        own = weigh_units(some, how, backend_name=name)
        check(own, some, how)
    # Of signals in a narrower range, so that both ends are clamped; of any strides.
    other = weigh_units(Units(signals[10:20]), how, backend_name=name).plan
    other = torch.stack([other, other + 9], dim=1)[:, 0]
    check(weigh_units(units, how, other, backend_name=name), units, how, other)


# On a grid: losses nearer than fp32 can tell apart may land on either side of the range that counts
# as collapsed.
a_loss = st.one_of(
    st.integers(0, 160).map(lambda eighths: eighths / 8),
    st.sampled_from([math.nan, math.inf, -math.inf, 3.0]),
)


@settings(max_examples=40)
@given(
    st.lists(st.tuples(a_loss, st.booleans()), min_size=1, max_size=20),
    st.sampled_from(oracle.STRATEGIES),
    st.sampled_from([0.5, 2.0]),
    st.sampled_from(BACKENDS),
)
def test_masked_and_nonfinite_units_weigh_nothing(
    samples: list[tuple[float, bool]], strategy: Any, delta: float, name: Any
) -> None:
    losses = torch.tensor([loss for loss, _ in samples], device=DEVICE)
    mask = torch.tensor([keep for _, keep in samples], device=DEVICE)
    units = Units(losses, mask)
    how = Weighting(strategy=strategy, temperature=0.7, delta=delta, top_share=0.4)
    check(weigh_units(units, how, backend_name=name), units, how)


@pytest.mark.parametrize("strategy", oracle.STRATEGIES)
def test_collapsed_ranges_and_the_plan_of_an_empty_set_make_equal_weights(
    strategy: Any, name: Any
) -> None:
    losses, how = spread_losses(5), Weighting(strategy=strategy, range="quantile", top_share=0.5)
    empty = weigh_units(Units(losses, losses < 0), how, backend_name=name).plan
    flat = weigh_units(Units(torch.full_like(losses, 2.5)), how, backend_name=name)
    planned = weigh_units(Units(losses), how, empty, backend_name=name)
    assert flat.weights.tolist() == pytest.approx([0.2] * 5)
    assert planned.weights.tolist() == [1.0] * 5


@pytest.mark.parametrize("count", [0, 2])
@pytest.mark.parametrize("setting", SETTINGS)
def test_empty_sets(setting: str, count: int, name: Any) -> None:
    losses = torch.tensor([math.nan, 2.0], device=DEVICE)[:count]
    nobody = torch.tensor([True, False], device=DEVICE)[:count]
    how = Weighting(strategy="linupper", **SETTINGS[setting])
    result = weigh_units(Units(losses, nobody), how, backend_name=name)
    assert result.weights.tolist() == [0.0] * count
    assert result.statistics.tolist() == [0.0] * len(Statistic)
    assert result.plan[: Plan.HIGH + 1].tolist() == [math.inf, -math.inf]
    assert result.plan[Plan.LEVEL].item() == 0


def test_sums_over_many_units_keep_their_digits(name: Any) -> None:
    # Equal, so that roundings of a running sum all go one way.
    units = Units(torch.zeros(65536, device=DEVICE), base=torch.full((65536,), 1.1, device=DEVICE))
    found = weigh_units(units, Weighting(strategy="uniform"), backend_name=name).statistics
    wanted = torch.tensor([65536, units.base[0].item() * 65536, 1, 1, 1], device=DEVICE)  # type: ignore[index]
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)


def test_the_cap_of_a_plan_goes_by_the_temperature_that_planned_weights_have(name: Any) -> None:
    units, given = Units(spread_losses(300)), torch.tensor([0.0, 5.0, 1.0, 0.0, -1.0])
    how = Weighting(strategy="softmax", temperature=0.05, max_weight=2.0)
    for plan in (given.to(DEVICE), None):
        check(weigh_units(units, how, plan, backend_name=name), units, how, plan)


def test_a_target_for_another_set_leaves_weights_that_can_be_told_from_0(name: Any) -> None:
    # None is in the middle of the range, where quadratic scores are largest.
    units = Units(torch.tensor([0.0, -0.125, -9.375], device=DEVICE))
    how = Weighting(strategy="quadratic", target_ess=0.3)
    none = torch.zeros(5, device=DEVICE)
    plan = weigh_units(units, how, none, backend_name=name).plan
    found = weigh_units(units, how, plan, backend_name=name)
    check(found, units, how, plan)
    assert (found.weights > 1e-9).all()


@pytest.mark.parametrize("most", [None, 1.0])
def test_sharp_temperature_neither_overflows_nor_underflows(most: Any, name: Any) -> None:
    units = Units(torch.arange(4.0, device=DEVICE))
    how = Weighting(strategy="extremes", temperature=1e-4, max_weight=most)
    result = weigh_units(units, how, backend_name=name)
    assert result.weights.tolist() == ([0.25] * 4 if most else [0.5, 0.0, 0.0, 0.5])


def test_results_repeat_bit_for_bit(name: Any) -> None:
    how = Weighting(strategy="quadratic", target_ess=0.9, max_weight=1.1)
    units = Units(spread_losses(20_000))
    first, second = (weigh_units(units, how, backend_name=name) for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("strategy", oracle.STRATEGIES)
def test_captured_in_a_cuda_graph_without_asking_the_host(
    strategy: Any, setting: str, name: Any
) -> None:
    losses, r = spread_losses(300), torch.tensor(1.0, device=DEVICE)
    units, how = Units(losses), Weighting(strategy=strategy, temperature=r, **SETTINGS[setting])
    with torch.cuda.stream(torch.cuda.Stream()):
        weigh_units(units, how, backend_name=name)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = weigh_units(units, how, backend_name=name)
    losses.copy_(spread_losses(300, seed=1))
    r.fill_(0.4)
    graph.replay()
    check(result, units, how)
