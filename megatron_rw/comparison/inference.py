"""Statistics of paired differences: intervals, tests, their power, and the rule of the verdict."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Literal

from scipy.optimize import brentq
from scipy.stats import nct, t

Verdict = Literal[
    "better", "worse", "equivalent", "undecided", "one run each: cannot tell", "not comparable"
]
LEVEL, POWER = 0.05, 0.8


@dataclass(frozen=True)
class Estimate:
    """The mean of n differences, their standard deviation, and the mean's 95 % t interval.

    With a single difference all but the mean is None.
    """

    n: int
    mean: float
    sd: float | None = None
    low: float | None = None
    high: float | None = None

    @property
    def p_value(self) -> float | None:
        """The two-sided p of the t test that the true mean is 0."""
        if self.sd is None:
            return None
        if self.sd == 0.0:  # as of a strategy that trains as the baseline does, to the last bit
            return float(self.mean == 0.0)
        return float(2 * t.sf(abs(self.mean) / self.sd * math.sqrt(self.n), self.n - 1))


def estimate(differences: Sequence[float]) -> Estimate:
    """Returns the mean of at least one difference, and how certain it is."""
    n, mean = len(differences), fmean(differences)
    if n < 2:
        return Estimate(n, mean)
    sd = stdev(differences)
    half = half_width(sd, n, n - 1)
    return Estimate(n, mean, sd, mean - half, mean + half)


def half_width(sd: float, n: int, freedom: int) -> float:
    """Returns half the 95 % t interval of a mean of n, whose sd has these degrees of freedom."""
    return float(t.ppf(1 - LEVEL / 2, freedom) * sd / math.sqrt(n))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Adjusts the p values of a family by Holm's method; None counts as a test that found nothing.

    An arm that cannot be tested does not make the others' tests easier that way.
    """
    known = [1.0 if p is None else p for p in p_values]
    adjusted: list[float | None] = [None] * len(known)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(known)), key=known.__getitem__)):
        largest = max(largest, min(1.0, (len(known) - rank) * known[index]))
        adjusted[index] = None if p_values[index] is None else largest
    return adjusted


def decide(found: Estimate, adjusted_p: float | None, margin: float) -> Verdict:
    """Returns the verdict on a difference of losses, by the rule that `rule` tells."""
    if found.low is None or found.high is None or adjusted_p is None:
        return "one run each: cannot tell"
    if -margin < found.low and found.high < margin:
        return "equivalent"
    if adjusted_p < LEVEL:
        return "better" if found.mean < 0 else "worse"
    return "undecided"


def rule(margin: float, family: int) -> str:
    """Returns the rule in words."""
    return (
        "The verdict is on the mean unweighted validation loss of the clean domains alone, from "
        f"the differences of paired runs; one pair tells nothing. Equivalent: the {1 - LEVEL:.0%} "
        f"t interval of their mean lies within ±{margin:g} nats. Otherwise better or worse: the "
        f"two-sided p of the paired t test, by Holm's method in a family of {family}, is below "
        f"{LEVEL:g}. Otherwise undecided. Found from: the smallest true difference that the test, "
        f"at {LEVEL:g}/{family}, finds with probability {POWER:g} in as many pairs of this "
        "standard deviation."
    )


def smallest_found(found: Estimate, family: int) -> float | None:
    """Returns the smallest true difference that as many pairs find with the probability `POWER`.

    The test is two-sided at the level of Holm's first step in a family of this size, which is the
    power of an arm that stands alone in being different.
    """
    if found.sd is None:
        return None
    freedom = found.n - 1
    critical = float(t.ppf(1 - LEVEL / family / 2, freedom))

    def lacking(shift: float) -> float:
        # The other tail adds nothing here, and its numbers underflow.
        return float(nct.sf(critical, freedom, shift)) - POWER

    return float(brentq(lacking, 0.0, 3 * critical + 10) * found.sd / math.sqrt(found.n))
