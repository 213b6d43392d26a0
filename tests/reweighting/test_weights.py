"""`loss_weights` against the fp64 oracle, and the laws that it must keep."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from megatron_rw.reweighting import effective_sample_size, loss_weights
from tests.reweighting import oracle

a_strategy: Any = st.sampled_from(oracle.STRATEGIES)
a_temperature = st.floats(0.05, 100.0)
a_delta = st.floats(0.1, 10.0)
a_loss = st.floats(0.0, 20.0)
# A grid of few values makes ties; the extremes of the range tie as well.
a_tied_loss = st.integers(0, 4).map(float)
some_losses = st.lists(st.one_of(a_loss, a_tied_loss), min_size=1, max_size=40)
broken_loss = st.one_of(a_loss, st.sampled_from([math.nan, math.inf, -math.inf]))


def in_fp64(losses: list[float], *args: Any, **kwargs: Any) -> list[float]:
    weights = loss_weights(torch.tensor(losses, dtype=torch.float64), *args, **kwargs)
    return weights.tolist()


@given(some_losses, a_strategy, a_temperature, a_delta)
def test_weights_are_the_oracles(
    losses: list[float], strategy: Any, temperature: float, delta: float
) -> None:
    expected = oracle.weights(losses, strategy, temperature, delta)
    assert in_fp64(losses, strategy, temperature, delta) == pytest.approx(expected, rel=1e-11)


@given(st.lists(st.tuples(broken_loss, st.booleans()), min_size=1, max_size=40), a_strategy)
def test_masked_and_nonfinite_samples_weigh_nothing_and_touch_no_other(
    samples: list[tuple[float, bool]], strategy: Any
) -> None:
    losses, mask = map(list, zip(*samples, strict=True))
    weights = in_fp64(losses, strategy, 0.7, mask=torch.tensor(mask))
    assert weights == pytest.approx(oracle.weights(losses, strategy, 0.7, mask=mask), rel=1e-11)
    kept = [i for i, (loss, used) in enumerate(samples) if used and math.isfinite(loss)]
    assert all(weights[i] == 0.0 for i in range(len(samples)) if i not in kept)
    if kept:
        alone = in_fp64([losses[i] for i in kept], strategy, 0.7)
        assert [weights[i] for i in kept] == pytest.approx(alone, rel=1e-12)


@given(st.lists(st.integers(0, 40), min_size=2, max_size=20), a_strategy, st.integers(-8, 8))
def test_shift_and_scale_of_the_losses_change_nothing(
    grid: list[int], strategy: Any, shift: int
) -> None:
    # Powers of two, so that the transformed losses are exact.
    losses = [g / 4 for g in grid]
    moved = [4 * loss + shift for loss in losses]
    assert in_fp64(moved, strategy, 0.4) == pytest.approx(in_fp64(losses, strategy, 0.4), rel=1e-12)


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
    assert in_fp64([2.0, 2.0 + 9e-7], strategy, 0.4) == [0.5, 0.5]


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
    assert float(effective_sample_size(weights)) / count == pytest.approx(ess, abs=1e-3)


def test_no_gradient_flows_through_the_weights() -> None:
    losses = torch.tensor([1.0, 2.0, 4.0], requires_grad=True)
    assert not loss_weights(losses, "linupper", 1.0).requires_grad


def test_sharp_temperature_does_not_overflow() -> None:
    weights = loss_weights(torch.tensor([0.0, 1.0, 2.0, 3.0]), "extremes", 1e-4)
    assert weights.tolist() == [0.5, 0.0, 0.0, 0.5]


@pytest.mark.parametrize(
    ("losses", "strategy", "message"),
    [
        (torch.zeros(2, 2), "linupper", "1-D"),
        (torch.zeros(2, dtype=torch.bfloat16), "linupper", "quantises"),
        (torch.zeros(2), "none", "no weights"),
        (torch.zeros(2), "upper", "no weights"),
    ],
)
def test_bad_input_is_refused(losses: torch.Tensor, strategy: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loss_weights(losses, strategy, 1.0)


@given(st.lists(st.floats(0.01, 1.0), min_size=1, max_size=30))
def test_effective_sample_size_is_between_one_and_n(raw: list[float]) -> None:
    weights = torch.tensor(raw, dtype=torch.float64) / math.fsum(raw)
    ess = float(effective_sample_size(weights))
    assert 1 - 1e-9 <= ess <= len(raw) + 1e-9
    assert ess == pytest.approx(1 / math.fsum(float(w) ** 2 for w in weights))


def test_effective_sample_size_of_nothing_is_zero() -> None:
    assert float(effective_sample_size(torch.zeros(3))) == 0.0
