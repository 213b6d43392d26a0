"""The rule of the verdict: how often it is wrong, and how often it finds what there is."""

import math

import numpy as np
import pytest

from megatron_rw.comparison.inference import (
    POWER,
    Estimate,
    decide,
    estimate,
    half_width,
    holm,
    smallest_found,
)

TRUNKS, SD, MARGIN = 5, 0.004, 0.005


def verdicts(differences: np.ndarray, margin: float = MARGIN) -> list[str]:
    """The verdicts on arms, a row each of differences from the baseline."""
    found = [estimate(row.tolist()) for row in differences]
    adjusted = holm([each.p_value for each in found])
    return [decide(each, p, margin) for each, p in zip(found, adjusted, strict=True)]


def test_without_a_difference_hardly_any_study_calls_an_arm_better() -> None:
    rng = np.random.default_rng(1)
    wrong = 0
    for _ in range(2000):
        losses = rng.normal(0.0, SD, (7, TRUNKS))  # the baseline's is in every difference
        wrong += "better" in verdicts(losses[1:] - losses[0])
    assert wrong / 2000 < 0.05


@pytest.mark.parametrize(("n", "family"), [(3, 1), (5, 1), (5, 6)])
def test_a_difference_is_found_as_often_as_planned(n: int, family: int) -> None:
    effect = smallest_found(Estimate(n, 0.0, SD), family)
    assert effect is not None
    rng = np.random.default_rng(2)
    differences = rng.normal(-effect, SD, (2000, n))
    # One arm by itself at Holm's first step, without the margin, which is not of the test.
    found = [estimate(row.tolist()) for row in differences]
    share = np.mean([each.p_value * family < 0.05 and each.mean < 0 for each in found])  # type: ignore[operator]
    assert abs(share - POWER) < 3 * math.sqrt(POWER * (1 - POWER) / 2000)


def test_the_power_is_that_of_a_published_table() -> None:
    # n = 34 pairs find half a standard deviation at 0.05 with a probability of 0.8 (Cohen, 1988).
    assert smallest_found(Estimate(34, 0.0, 1.0), 1) == pytest.approx(0.495, abs=0.005)


def test_the_smallest_difference_exists_for_few_pairs_and_many_arms() -> None:
    sizes = [smallest_found(Estimate(n, 0.0, 1.0), 50) for n in (2, 3, 5, 10, 100)]
    assert all(size is not None and math.isfinite(size) for size in sizes)
    assert sizes == sorted(sizes, key=lambda size: -(size or 0))


def test_an_interval_by_hand() -> None:
    found = estimate([0.01, 0.02, 0.03])
    # s = 0.01, t(0.975, 2) = 4.3027
    assert (found.n, found.mean, found.sd) == (3, pytest.approx(0.02), pytest.approx(0.01))
    assert found.high == pytest.approx(0.02 + 4.3027 * 0.01 / math.sqrt(3), abs=1e-6)
    # t = 0.02 / (0.01 / √3) = 3.4641; with two degrees of freedom p = 1 - t / √(2 + t²)
    assert found.p_value == pytest.approx(1 - 3.4641 / math.sqrt(2 + 12), abs=1e-5)
    assert half_width(0.01, 3, 2) == pytest.approx(found.mean - (found.low or 0))


def test_holm_by_hand() -> None:
    assert holm([0.04, 0.01, 0.03, 0.5]) == [0.09, 0.04, 0.09, 0.5]
    assert holm([0.01, None, 0.02]) == [0.03, None, 0.04]
    assert holm([0.9, 0.8]) == [1.0, 1.0]


@pytest.mark.parametrize(
    ("differences", "p", "verdict"),
    [
        ([0.001, 0.002], 0.2, "undecided"),  # the interval is ±0.0064
        ([0.0010, 0.0011, 0.0012], 0.01, "equivalent"),
        ([0.0, 0.0], 1.0, "equivalent"),
        ([0.1, 0.1], 0.0, "worse"),
        ([-0.02, -0.021, -0.022], 0.01, "better"),
        ([-0.02, -0.021, -0.022], 0.05, "undecided"),
        ([-0.02], None, "one run each: cannot tell"),
    ],
)
def test_the_rule(differences: list[float], p: float | None, verdict: str) -> None:
    assert decide(estimate(differences), p, MARGIN) == verdict
