"""The weighting in plain torch, the reference; see `weights.weigh_units`."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_rw.kernels.options import (
    COLLAPSED_RANGE,
    LARGEST_EXPONENT,
    RANGE_QUANTILE,
    Plan,
    Units,
    UnitWeights,
    Weighting,
)

# A search tries this many places in each round. By the dtype of the signals it takes so many rounds
# that what it finds is off by less than their precision: at most 4^-rounds of the interval.
_PLACES = 3
_ROUNDS = {torch.float32: 15, torch.float64: 26}


def weigh(units: Units, weighting: Weighting, given: Tensor | None) -> UnitWeights:
    """See `Backend.weigh`."""
    signals, base, active = competing(units)
    counts = active.to(base)
    if units.counts is not None:
        counts = units.counts.masked_fill(~active, 0.0)
    for_others = given is not None
    plan, exponents = _plan(signals, base, counts, active, weighting, for_others=for_others)
    if given is not None:
        exponents = planned_exponents(signals, weighting, given)
    relative = torch.exp(exponents).masked_fill(~active, 0.0)
    weights = base * relative
    sums = [counts.sum(), base.sum(), weights.sum(), (weights * relative).sum()]
    return finished(weights, sums, relative.amax(), plan, normalised=given is None)


def competing(units: Units) -> tuple[Tensor, Tensor, Tensor]:
    """Signals, b, and which units are in the set; `[n]` each, 0 for those that are not in it."""
    active = units.signals.isfinite()
    if units.mask is not None:
        active = active & units.mask
    base = torch.ones_like(units.signals) if units.base is None else units.base
    active = active & (base > 0)
    # A unit beside the set has a signal of its own that must reach no sum.
    return units.signals.masked_fill(~active, 0.0), base.masked_fill(~active, 0.0), active


def finished(
    weights: Tensor, sums: Sequence[Tensor], largest: Tensor, plan: Tensor, *, normalised: bool
) -> UnitWeights:
    """Weights and statistics from sums over the set.

    Args:
        weights: `[n]`, b·v, where v is the relative weight; they may be a part of the set.
        sums: scalars, over the whole set: its units, Σ b, Σ b·v, and Σ b·v².
        largest: scalar, the largest v of the whole set.
        plan: `[5]`, that of the set.
        normalised: whether the weights are to add up to 1, or to 0 where there are none.
    """
    count, whole, total, squares = sums
    tiny = torch.finfo(weights.dtype).tiny
    divisor = total.clamp(min=tiny)
    ess = total.square() / (whole * squares).clamp(min=tiny)
    largest = largest * whole / divisor
    if normalised:
        weights, total = weights / divisor, total / divisor
    return UnitWeights(weights, torch.stack([count, whole, total, ess, largest]), plan)


def planned_exponents(signals: Tensor, weighting: Weighting, plan: Tensor) -> Tensor:
    """Logarithms of relative weights that each depend on their own signal alone.

        min((h(u) − h_max)/r, level), u clamped to [−δ, δ]; for `topk` 0 or −inf

    Args:
        signals: `[…]` float.
        weighting: strategy, δ, and the temperature if there is no target ESS.
        plan: `[5]`, see `Plan`. A range that ends before it begins, as that of no units, makes all
            exponents 0.

    Returns:
        `[…]`, at most 0.
    """
    low, high, _, threshold, level = plan
    if weighting.strategy == "topk":
        kept = signals >= threshold
        return torch.zeros_like(signals).masked_fill(~kept & (low <= high), -torch.inf)
    top: float | Tensor = weighting.largest_score
    if weighting.strategy == "softmax":
        top = high
    temperature = planned_temperature(weighting, plan)
    exponents = (_scores(signals, low, high, weighting) - top) / temperature
    return torch.where(low <= high, torch.minimum(exponents, level), 0.0)


def planned_temperature(weighting: Weighting, plan: Tensor) -> Tensor:
    """The temperature of `planned_exponents`, a scalar; that of `softmax` has a lower limit."""
    if weighting.target_ess is not None:
        return plan[Plan.TEMPERATURE]
    temperature = _scalar(weighting.temperature, plan)
    if weighting.strategy != "softmax":
        return temperature
    return torch.maximum(temperature, (plan[Plan.HIGH] - plan[Plan.LOW]) / LARGEST_EXPONENT)


def _plan(
    signals: Tensor,
    base: Tensor,
    counts: Tensor,
    active: Tensor,
    weighting: Weighting,
    *,
    for_others: bool,
) -> tuple[Tensor, Tensor]:
    """The plan of a set, and the exponents that it gives its units, the best one's 0.

    With `for_others` the plan is for other units, whose exponents come from `planned_exponents`; a
    temperature must not be so low that all of these underflow.
    """
    low = signals.masked_fill(~active, torch.inf).amin()
    high = signals.masked_fill(~active, -torch.inf).amax()
    if weighting.range == "quantile":
        shares = (RANGE_QUANTILE, 1 - RANGE_QUANTILE)
        low, upper = smallest_with_share(signals, counts, active, *shares)
        high = torch.where(active.any(), upper, -torch.inf)
    temperature = _scalar(weighting.temperature, signals)
    threshold, level = signals.new_zeros(2)
    if weighting.strategy == "topk":
        [least] = smallest_with_share(-signals, counts, active, weighting.top_share)
        threshold = -least
        plan = torch.stack([low, high, temperature, threshold, level])
        return plan, planned_exponents(signals, weighting, plan)
    scores = _scores(signals, low, high, weighting)
    best = torch.where(active, scores, -torch.inf).amax()
    gaps = torch.where(active, best - scores, 0.0)
    if weighting.target_ess is not None:
        temperature = _temperature_for(weighting.target_ess, gaps, base).to(gaps)
    # The largest score that is possible, which may be above `best`.
    top = high if weighting.strategy == "softmax" else weighting.largest_score
    if for_others and (weighting.strategy == "softmax" or weighting.target_ess is not None):
        # Those exponents count from `top`.
        lowest = (top - best + gaps.amax()) / LARGEST_EXPONENT
        temperature = torch.where(active.any(), torch.maximum(temperature, lowest), temperature)
    exponents = -gaps / temperature
    if weighting.max_weight is not None:
        cap = _cap_for(weighting.max_weight, exponents.double(), base.double()).to(gaps)
        # Of the best unit 0 again: a cap far down would leave no weight that fp32 can hold.
        exponents = torch.minimum(exponents, cap) - cap
        level = torch.where(active.any(), cap - (top - best) / temperature, 0.0)
    return torch.stack([low, high, temperature, threshold, level]), exponents


def _scalar(value: float | Tensor, like: Tensor) -> Tensor:
    if isinstance(value, Tensor):
        return value.to(like).reshape(())
    # Filled on the device, so that the host waits for no copy.
    return like.new_full((), value)


def _scores(signals: Tensor, low: Tensor, high: Tensor, weighting: Weighting) -> Tensor:
    if weighting.strategy == "softmax":
        return torch.minimum(torch.maximum(signals, low), high)
    return strategy_scores(normalise(signals, low, high, weighting.delta), weighting)


def normalise(signals: Tensor, low: Tensor, high: Tensor, delta: float) -> Tensor:
    """Scale signals from [low, high] to [−δ, δ] and clamp; 0 for all when the range collapses.

    Args:
        signals: `[…]` float.
        low: scalar.
        high: scalar.
        delta: δ.

    Returns:
        `[…]`, u.
    """
    spread = high - low
    # An empty set has spread −inf and lands here too.
    collapsed = ~(spread >= COLLAPSED_RANGE)
    # Subtract before dividing: h = 2δl/range − … cancels in fp32 when the range is small.
    scaled = 2.0 * delta * ((signals - low) / spread.masked_fill(collapsed, 1.0)) - delta
    return torch.where(collapsed, 0.0, scaled.clamp(-delta, delta))


def strategy_scores(normalised: Tensor, weighting: Weighting) -> Tensor:
    """h(u), the score that the softmax turns into a weight, of strategies that have a range.

    Args:
        normalised: `[…]`, u in [−δ, δ].
        weighting: strategy and δ.

    Returns:
        `[…]`, h.
    """
    delta = weighting.delta
    match weighting.strategy:
        case "linupper":
            return (normalised + delta).clamp(max=delta)
        case "quadratic":
            return 1.0 - (normalised / delta).square()
        case "extremes":
            return normalised.abs()
        case _:
            return torch.zeros_like(normalised)


def smallest_with_share(
    signals: Tensor, counts: Tensor, active: Tensor, *shares: float
) -> list[Tensor]:
    """For each share the smallest signal with at least that share of the units at or below it.

    Args:
        signals: `[n]` float.
        counts: `[n]`, how many units each stands for, 0 for those that are not active.
        active: `[n]` bool.
        shares: above 0, at most 1.

    Returns:
        Scalars, +inf if no unit is active.
    """
    ordered, order = signals.masked_fill(~active, torch.inf).sort()
    below = counts.double()[order].cumsum(0)
    # What a product such as 0.7·10 is too large by must not ask for one more unit.
    wanted = torch.stack([share * below[-1] - 1e-6 for share in shares])
    places = torch.searchsorted(below, wanted)
    return list(ordered[places.clamp(max=len(ordered) - 1)])


def _temperature_for(target: float, gaps: Tensor, base: Tensor) -> Tensor:
    """The lowest temperature with (Σ b·w)² ≥ f·Σb·Σ b·w², w = exp(−gap/r); 1 where all tie."""
    rounds, gaps, base = _ROUNDS[gaps.dtype], gaps.double(), base.double()
    spread, whole = gaps.amax(), base.sum()
    shares = gaps / spread.masked_fill(spread == 0, 1.0)

    def effective(sharpness: Tensor) -> Tensor:
        relative = torch.exp(-sharpness[:, None] * shares)
        return (relative @ base).square() >= target * whole * (relative.square() @ base)

    # The largest sharpness of which it is true; it is true from 0 up to there.
    end = width = torch.full_like(spread, LARGEST_EXPONENT)
    places = torch.arange(1, _PLACES + 1, dtype=end.dtype, device=end.device) / (_PLACES + 1)
    found = torch.zeros_like(end)
    for _ in range(rounds):
        found = found + width * effective(found + width * places).sum() / (_PLACES + 1)
        width = width / (_PLACES + 1)
    found = torch.where(effective(end[None])[0], end, found)
    return torch.where(spread > 0, spread / found.clamp(min=1e-9), 1.0)


def _cap_for(most: float, exponents: Tensor, base: Tensor) -> Tensor:
    """The largest l ≤ 0 with e^l·Σb ≤ c·Σ b·min(w, e^l), w = exp(exponent)."""
    ordered, order = exponents.sort(descending=True)
    base = base[order]
    capped = base.cumsum(0)
    # For each unit, the logarithm of Σ b·w over it and those after it.
    rest = (ordered + base.log()).flip(0).logcumsumexp(0).flip(0)
    after = torch.cat([rest[1:], rest.new_full((1,), -torch.inf)])
    # Whether no weight is above c times its share when those before and at a unit are cut to its
    # own. It is true at the last unit, where all weights are in proportion to b.
    fits = most * (capped + torch.exp(after - ordered)) >= capped[-1]
    first = fits.long().argmax(keepdim=True)
    level = math.log(most) + rest[first] - torch.log(capped[-1] - most * capped[first - 1])
    return torch.where(first > 0, level, 0.0).squeeze(0)
