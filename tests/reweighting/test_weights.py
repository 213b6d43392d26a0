"""The weighting in fp64 against the oracle, and the laws that it must keep."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from megatron_rw.kernels import Plan, Statistic, Units, UnitWeights, Weighting, weigh_units
from megatron_rw.reweighting import loss_weights
from tests.reweighting import oracle

a_strategy: Any = st.sampled_from(oracle.STRATEGIES)
a_temperature = st.floats(0.05, 100.0)
a_delta = st.floats(0.1, 10.0)
a_loss = st.floats(0.0, 20.0)
# A grid of few values makes ties; the extremes of the range tie as well.
a_tied_loss = st.integers(0, 4).map(float)
some_losses = st.lists(st.one_of(a_loss, a_tied_loss), min_size=1, max_size=40)
a_share = st.floats(0.05, 1.0)
a_weighting = st.builds(
    Weighting,
    strategy=a_strategy,
    temperature=a_temperature,
    delta=a_delta,
    top_share=a_share,
    target_ess=st.none() | a_share,
    max_weight=st.none() | st.floats(1.0, 5.0),
    range=st.sampled_from(["minmax", "quantile"]),
)
# On a grid, so that moving them is exact: a signal, what its unit weighs without a strategy, and
# whether the mask lets it in.
a_unit = st.tuples(st.integers(-80, 80).map(lambda s: s / 8), st.floats(0.1, 3.0), st.booleans())
some_units = st.lists(a_unit, min_size=1, max_size=30)


def weigh(
    signals: Any, how: Weighting, base: Any = None, mask: Any = None, dtype: Any = torch.float64
) -> UnitWeights:
    base = None if base is None else torch.tensor(base, dtype=dtype)
    mask = None if mask is None else torch.tensor(mask)
    return weigh_units(Units(torch.tensor(signals, dtype=dtype), mask, base), how)


def in_fp64(losses: list[float], *args: Any, **kwargs: Any) -> list[float]:
    weights = loss_weights(torch.tensor(losses, dtype=torch.float64), *args, **kwargs)
    return weights.tolist()


# A search ends where rounding decides: near an effective sample size of 1 at 1e-8.
def close(wanted: Any) -> Any:
    return pytest.approx(wanted, rel=1e-6, abs=1e-12)


@given(some_losses, a_weighting)
def test_weights_are_the_oracles(losses: list[float], how: Weighting) -> None:
    # A range on either side of what counts as collapsed, and one so small that rounding shows.
    assume(not 0 < max(losses) - min(losses) < 1e-3)
    assert weigh(losses, how).weights.tolist() == close(oracle.weights(losses, how))
    temperature, delta = float(how.temperature), how.delta
    plain = Weighting(strategy=how.strategy, temperature=temperature, delta=delta)
    expected = oracle.weights(losses, plain)
    assert in_fp64(losses, how.strategy, temperature, delta) == pytest.approx(expected, rel=1e-11)


@given(some_units, a_weighting)
def test_masked_and_nonfinite_units_weigh_nothing_and_touch_no_other(
    units: list[tuple[float, float, bool]], how: Weighting
) -> None:
    signals, base, mask = zip(*units, strict=True)
    # NaN inside the mask for some, and for all that are outside.
    broken = [s if m and i % 5 != 3 else math.nan for i, (s, _, m) in enumerate(units)]
    kept = [i for i, signal in enumerate(broken) if math.isfinite(signal)]
    weights = weigh(broken, how, base, mask).weights.tolist()
    assert weights == weigh(broken, how, base).weights.tolist()
    assert not any(weights[i] for i in range(len(units)) if i not in kept)
    alone = weigh([signals[i] for i in kept], how, [base[i] for i in kept]).weights
    assert [weights[i] for i in kept] == close(alone.tolist())


@given(some_units, a_weighting, st.randoms(use_true_random=False))
def test_permuted_units_have_permuted_weights_that_sum_to_one(
    units: list[tuple[float, float, bool]], how: Weighting, random: Any
) -> None:
    signals, base, _ = zip(*units, strict=True)
    order = random.sample(range(len(units)), len(units))
    weights = weigh(signals, how, base).weights[order]
    again = weigh([signals[i] for i in order], how, [base[i] for i in order])
    assert weights.tolist() == close(again.weights.tolist())
    single = weigh(signals, how, base, dtype=torch.float32)
    assert [single.weights.sum(), single.statistics[Statistic.TOTAL]] == pytest.approx([1, 1])


@given(some_units, a_weighting, st.integers(-8, 8))
def test_a_constant_added_to_all_signals_changes_nothing(
    units: list[tuple[float, float, bool]], how: Weighting, shift: int
) -> None:
    signals, base, _ = zip(*units, strict=True)
    moved = weigh([signal + shift for signal in signals], how, base)
    assert moved.weights.tolist() == close(weigh(signals, how, base).weights.tolist())
    if how.strategy != "softmax":
        scaled = weigh([4 * signal for signal in signals], how, base)
        assert moved.weights.tolist() == close(scaled.weights.tolist())


@given(some_units, a_temperature, a_delta)
def test_what_is_the_base_itself(
    units: list[tuple[float, float, bool]], temperature: float, delta: float
) -> None:
    signals, base, _ = zip(*units, strict=True)
    wanted = [b / math.fsum(base) for b in base]
    how: dict[str, Any] = {"temperature": temperature, "delta": delta}
    for strategy in oracle.STRATEGIES:
        settings: list[dict[str, Any]] = [{"target_ess": 1.0}, {"max_weight": 1.0}]
        for more in [{}] if strategy in ("uniform", "topk") else settings:
            weighting = Weighting(strategy=strategy, **how, **more)
            found = weigh(signals, weighting, base, dtype=torch.float32).weights
            assert found.tolist() == pytest.approx(wanted, rel=2e-6)


@given(some_units, a_weighting, a_temperature)
def test_effective_sample_size_grows_with_the_temperature(
    units: list[tuple[float, float, bool]], how: Weighting, other: float
) -> None:
    signals, base, _ = zip(*units, strict=True)
    how = dataclasses.replace(how, target_ess=None, max_weight=None)
    warm, hot = (
        weigh(signals, dataclasses.replace(how, temperature=r), base).statistics[Statistic.ESS]
        for r in sorted([float(how.temperature), other])
    )
    assert warm <= hot + 1e-12


@given(some_units, a_weighting, st.floats(1.0, 5.0))
def test_a_cap_is_never_exceeded(
    units: list[tuple[float, float, bool]], how: Weighting, most: float
) -> None:
    signals, base, mask = zip(*units, strict=True)
    assume(how.strategy != "topk")
    capped = dataclasses.replace(how, max_weight=most)
    weights, statistics, _ = weigh(signals, capped, base, mask, torch.float32)
    whole = math.fsum(b for b, used in zip(base, mask, strict=True) if used)
    largest = max(w / b * whole for w, b in zip(weights.tolist(), base, strict=True))
    assert largest <= most * (1 + 1e-5)
    assert statistics[Statistic.LARGEST].item() == pytest.approx(largest, rel=1e-5)


@given(some_units, a_weighting, a_share)
def test_a_target_of_the_effective_sample_size_is_met_where_it_can_be(
    units: list[tuple[float, float, bool]], how: Weighting, target: float
) -> None:
    signals, base, _ = zip(*units, strict=True)
    assume(how.strategy != "topk")
    how = dataclasses.replace(how, target_ess=target, max_weight=None)
    _, statistics, plan = weigh(signals, how, base)
    reached = statistics[Statistic.ESS].item()
    assert reached >= target - 1e-9
    low, high = plan[:2].tolist()
    scores = [oracle.scored(s, low, high, how) for s in signals]
    sharpest = (max(scores) - min(scores)) / oracle.LARGEST_EXPONENT
    if sharpest and plan[Plan.TEMPERATURE].item() > sharpest * (1 + 1e-9):
        assert reached == pytest.approx(target, rel=1e-6)


@given(some_losses, a_strategy, a_temperature)
def test_fp32_follows_fp64(losses: list[float], strategy: Any, temperature: float) -> None:
    # The same fp32 inputs; losses nearer than fp32 can tell apart may land on either side of the
    # collapsed range.
    single = torch.tensor(losses, dtype=torch.float32)
    spread = float(single.max() - single.min())
    assume(not 1e-7 < spread < 1e-4)
    weights = loss_weights(single, strategy, temperature)
    assert weights.dtype == torch.float32
    expected = loss_weights(single.double(), strategy, temperature)
    torch.testing.assert_close(
        weights.double(), expected, rtol=2e-5 / min(temperature, 1), atol=1e-9
    )


@pytest.mark.parametrize("strategy", oracle.STRATEGIES)
def test_one_sample_ties_and_a_collapsed_range_are_uniform(strategy: Any) -> None:
    assert in_fp64([3.0], strategy, 0.4) == [1.0]
    assert in_fp64([2.0] * 4, strategy, 0.4) == [0.25] * 4
    # Softmax has no range that could collapse.
    assert in_fp64([2.0, 2.0 + 9e-7], strategy, 0.4) == pytest.approx([0.5, 0.5], abs=1e-6)


def test_uniform_is_exactly_uniform() -> None:
    # The authors' README calls the identity "uniform"; that one would prefer high losses.
    weights = loss_weights(torch.tensor([0.0, 1.0, 5.0, 9.0]), "uniform", 0.4)
    assert weights.tolist() == [0.25] * 4


@pytest.mark.parametrize("strategy", oracle.STRATEGIES)
def test_an_empty_set_has_no_weight(strategy: Any) -> None:
    assert in_fp64([], strategy, 1.0) == []
    assert in_fp64([math.nan, math.inf], strategy, 1.0) == [0.0, 0.0]
    mask = torch.zeros(3, dtype=torch.bool)
    assert in_fp64([1.0, 2.0, 3.0], strategy, 1.0, mask=mask) == [0.0] * 3


def test_two_samples_have_the_published_linupper_weights() -> None:
    assert in_fp64([1.0, 7.5], "linupper", 1.0) == pytest.approx([0.2689, 0.7311], abs=1e-4)


# M·w_max and ESS/M for uniformly distributed losses, M → ∞ (our report on the paper, section 3).
ANCHORS = [
    ("linupper", 1.0, 1.225, 0.930),
    ("quadratic", 1.0, 1.339, 0.932),
    ("extremes", 1.0, 1.582, 0.924),
    ("linupper", 0.4, 1.463, 0.780),
    ("quadratic", 0.4, 1.831, 0.754),
    ("extremes", 0.4, 2.724, 0.679),
]


@pytest.mark.parametrize(("strategy", "temperature", "largest", "ess"), ANCHORS)
def test_uniform_losses_meet_the_analytic_anchors(
    strategy: Any, temperature: float, largest: float, ess: float
) -> None:
    count = 100_001
    losses = torch.linspace(0, 1, count, dtype=torch.float64)
    weights = loss_weights(losses, strategy, temperature)
    assert float(weights.max()) * count == pytest.approx(largest, abs=1e-3)
    assert float(1 / (count * weights.square().sum())) == pytest.approx(ess, abs=1e-3)


def test_no_gradient_flows_through_the_weights() -> None:
    losses = torch.tensor([1.0, 2.0, 4.0], requires_grad=True)
    assert not loss_weights(losses, "linupper", 1.0).requires_grad


def test_sharp_temperature_does_not_overflow() -> None:
    weights = loss_weights(torch.tensor([0.0, 1.0, 2.0, 3.0]), "extremes", 1e-4)
    assert weights.tolist() == [0.5, 0.0, 0.0, 0.5]


@pytest.mark.parametrize("temperature", [-1.0, 0.0, 1e-300, 1e-6, math.nan, math.inf])
def test_a_temperature_that_gives_no_weights_is_refused(temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature must be a finite number above 1e-06"):
        loss_weights(torch.zeros(2), "linupper", temperature)
