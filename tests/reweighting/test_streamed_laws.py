"""Laws of sets that are not gathered, documents and tokens, whose plan may be of a histogram.

Signals are on a grid that no two bins share, so that shares of the units are exact. A temperature
and a level are those of the bins' edges, which are up to 1.01 bins below the units; an exponent is
at most 20 over half of the 4,095 bins and changes by at most 1% in one, hence `HISTOGRAM`.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_rw.kernels import Statistic, Units, Weighting, weigh_units
from megatron_rw.reweighting.sets import WeightedSet, begin_set
from megatron_rw.reweighting.units import ReduceGroup, UnitSums
from tests.reweighting import oracle
from tests.reweighting.test_weights import a_delta, a_share

HISTOGRAM = 2e-2
LEAST = 0.05  # Of the temperature, as a share of the largest score; lower ones are refused.


@st.composite
def weightings(draw: Any, planned: bool | None = None) -> Weighting:
    """Any weighting, or one with or without a plan from a histogram."""
    how = Weighting(strategy=draw(st.sampled_from(oracle.STRATEGIES)), delta=draw(a_delta))
    top = how.largest_score if how.strategy not in ("softmax", "uniform", "topk") else 1.0
    how = dataclasses.replace(how, temperature=max(top, 0.1) * draw(st.floats(LEAST, 50.0)))
    if planned is False:
        return how
    return dataclasses.replace(
        how,
        top_share=draw(a_share),
        target_ess=draw(st.none() | a_share),
        max_weight=draw(st.none() | st.floats(1.0, 5.0)),
        range=draw(st.sampled_from(["minmax", "quantile"])),
    )


# A signal in nats, active tokens, and the static weight.
a_unit = st.tuples(
    st.integers(-80, 80).map(lambda s: s / 8), st.integers(1, 9), st.floats(0.1, 3.0)
)
some_units: Any = st.lists(a_unit, min_size=1, max_size=30)
a_kind: Any = st.sampled_from(["token", "document"])
by_tokens: Any = st.booleans()


def weigh(
    units: list[tuple[float, int, float]],
    how: Weighting,
    kind: Any,
    by_tokens: bool,
    dtype: Any = torch.float64,
) -> WeightedSet:
    """Weights one rank's units; those without tokens are absent."""
    signals, tokens, static = (torch.tensor(column, dtype=dtype) for column in zip(*units))  # noqa: B905
    known = tokens * signals.isfinite()
    sums = UnitSums(
        loss_sum=tokens,
        tokens=tokens,
        domain=torch.zeros_like(tokens),
        signal_sum=(signals * known).nan_to_num(0.0),
        signal_tokens=known,
        weight_sum=static * tokens,
    )
    return begin_set(sums, kind, by_tokens, how, ReduceGroup())()


def base_of(units: list[tuple[float, int, float]], by_tokens: bool) -> list[float]:
    return [static * (tokens if by_tokens else 1) for _, tokens, static in units]


@given(some_units, weightings(), a_kind, by_tokens)
def test_weights_are_those_of_a_gathered_set(
    units: Any, how: Weighting, kind: Any, by_tokens: bool
) -> None:
    how = dataclasses.replace(how, target_ess=None)
    found = weigh(units, how, kind, by_tokens)
    signals, base = [unit[0] for unit in units], base_of(units, by_tokens)
    if how.strategy == "softmax":
        spread = max(signals) - min(signals)
        how = dataclasses.replace(how, temperature=max(how.temperature, spread / 20))
    asked = Units(torch.tensor(signals, dtype=torch.float64), base=torch.tensor(base).double())
    wanted = weigh_units(asked, how)
    assert found.weights.tolist() == pytest.approx(wanted.weights.tolist(), rel=HISTOGRAM)
    assert found.statistics.tolist() == pytest.approx(wanted.statistics.tolist(), rel=HISTOGRAM)


@given(some_units, weightings(), a_kind, by_tokens, st.randoms(use_true_random=False))
def test_permuted_units_have_permuted_weights_that_sum_to_one(
    units: Any, how: Weighting, kind: Any, by_tokens: bool, random: Any
) -> None:
    order = random.sample(range(len(units)), len(units))
    found = weigh(units, how, kind, by_tokens)
    again = weigh([units[i] for i in order], how, kind, by_tokens)
    assert found.weights[order].tolist() == pytest.approx(again.weights.tolist(), rel=1e-6)
    single = weigh(units, how, kind, by_tokens, torch.float32)
    assert [single.weights.sum(), single.statistics[Statistic.TOTAL]] == pytest.approx([1, 1])


@given(some_units, weightings(planned=False), a_kind, by_tokens)
def test_what_is_the_base_itself(units: Any, how: Weighting, kind: Any, by_tokens: bool) -> None:
    base = base_of(units, by_tokens)
    wanted = [b / math.fsum(base) for b in base]
    more: list[dict[str, Any]] = [{"strategy": "uniform"}, {"strategy": "topk", "top_share": 1.0}]
    if how.strategy not in ("uniform", "topk"):
        more += [{"target_ess": 1.0}, {"max_weight": 1.0}]
    for settings in more:
        found = weigh(units, dataclasses.replace(how, **settings), kind, by_tokens).weights
        tolerance = HISTOGRAM if "max_weight" in settings else 2e-6
        assert found.tolist() == pytest.approx(wanted, rel=tolerance)


@given(some_units, weightings(planned=False), a_kind, by_tokens, st.floats(1.0, 50.0))
def test_effective_sample_size_grows_with_the_temperature(
    units: Any, how: Weighting, kind: Any, by_tokens: bool, factor: float
) -> None:
    hotter = dataclasses.replace(how, temperature=how.temperature * factor)
    low, high = (weigh(units, each, kind, by_tokens).statistics for each in (how, hotter))
    assert low[Statistic.ESS] <= high[Statistic.ESS] + 1e-9


@given(some_units, weightings(planned=False), a_kind, by_tokens, a_share)
def test_a_target_of_the_effective_sample_size_is_met(
    units: Any, how: Weighting, kind: Any, by_tokens: bool, target: float
) -> None:
    if how.strategy not in ("uniform", "topk"):
        found = weigh(units, dataclasses.replace(how, target_ess=target), kind, by_tokens)
        asked = Units(found.units.signals, base=found.units.base)
        wanted = weigh_units(asked, dataclasses.replace(how, target_ess=target)).statistics
        assert found.statistics[Statistic.ESS] >= target * (1 - 2 * HISTOGRAM)
        # The best of a set that quadratic scores need not have the largest score.
        if how.strategy != "quadratic":
            assert found.statistics[Statistic.ESS] <= wanted[Statistic.ESS] * (1 + 2 * HISTOGRAM)


@given(some_units, weightings(), a_kind, by_tokens, st.floats(1.0, 5.0))
def test_a_cap_is_never_exceeded(
    units: Any, how: Weighting, kind: Any, by_tokens: bool, cap: float
) -> None:
    if how.strategy != "topk":
        found = weigh(units, dataclasses.replace(how, max_weight=cap), kind, by_tokens)
        assert found.statistics[Statistic.LARGEST] <= cap * (1 + HISTOGRAM)


@given(some_units, weightings(), a_kind, by_tokens, st.integers(-8, 8))
def test_a_constant_added_to_all_signals_changes_nothing(
    units: Any, how: Weighting, kind: Any, by_tokens: bool, shift: int
) -> None:
    moved = [(signal + shift, *rest) for signal, *rest in units]
    found, wanted = (weigh(each, how, kind, by_tokens) for each in (moved, units))
    assert found.weights.tolist() == pytest.approx(wanted.weights.tolist(), rel=1e-6)


@given(some_units, weightings(), a_kind, by_tokens)
def test_absent_units_touch_no_other_and_missing_signals_count_as_0(
    units: Any, how: Weighting, kind: Any, by_tokens: bool
) -> None:
    mixed = [part for unit in units for part in (unit, (1e6, 0, 1e6), (math.nan, 0, 1.0))]
    alone, found = (weigh(each, how, kind, by_tokens) for each in (units, mixed))
    assert found.weights[::3].tolist() == pytest.approx(alone.weights.tolist(), rel=1e-6)
    assert not found.weights[1::3].any()
    assert not found.weights[2::3].any()
    unknown, zero = ([*units, (signal, 2, 1.0)] for signal in (math.nan, 0.0))
    found, wanted = (weigh(each, how, kind, by_tokens) for each in (unknown, zero))
    assert found.weights.tolist() == wanted.weights.tolist()
    assert found.units.missing is not None
    assert found.units.missing.tolist() == [False] * len(units) + [True]
