"""The method in plain Python floats (fp64), one sample after the other: obviously right."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from megatron_rw.kernels import Weighting

STRATEGIES: list[Any] = ["uniform", "linupper", "quadratic", "extremes", "topk", "softmax"]
COLLAPSED_RANGE = 1e-6
LARGEST_EXPONENT = 20.0
# Low and high end of the range, temperature, threshold of `topk`, and most that an exponent is.
Plan = tuple[float, float, float, float, float]
EMPTY_PLAN: Plan = (math.inf, -math.inf, 1.0, -math.inf, 0.0)


def score(u: float, strategy: str, delta: float) -> float:
    """h(u)."""
    if strategy == "uniform":
        return 0.0
    if strategy == "linupper":
        return min(u + delta, delta)
    if strategy == "quadratic":
        return 1 - u**2 / delta**2
    assert strategy == "extremes"
    return abs(u)


def scored(signal: float, low: float, high: float, how: Weighting) -> float:
    """h of a signal in a range, or clamped to its ends."""
    signal = min(max(signal, low), high)
    if how.strategy == "softmax":
        return signal
    if high - low < COLLAPSED_RANGE:
        return score(0.0, how.strategy, how.delta)
    # In this order both ends are exactly ±δ: a target of the ESS would make much of a rounding.
    u = 2 * how.delta * ((signal - low) / (high - low)) - how.delta
    return score(u, how.strategy, how.delta)


def smallest_with_share(signals: Sequence[float], counts: Sequence[float], share: float) -> float:
    """The smallest signal that, with those below it, makes up this share of all units."""
    reached, wanted = 0.0, share * math.fsum(counts) - 1e-6
    for signal, count in sorted(zip(signals, counts, strict=True)):
        reached += count
        if reached >= wanted:
            return signal
    raise AssertionError(share)


def largest(holds: Callable[[float], bool], end: float) -> float:
    """The largest x in [0, end] of which `holds` is true, by bisection."""
    if holds(end):
        return end
    low, high = 0.0, end
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def ess(relative: Sequence[float], base: Sequence[float]) -> float:
    """(Σ b·v)²/(Σ b · Σ b·v²): 1/(n·Σ w²) where all b are alike."""
    pairs = list(zip(relative, base, strict=True))
    squares = math.fsum(b * v * v for v, b in pairs)
    return math.fsum(b * v for v, b in pairs) ** 2 / (math.fsum(base) * squares)


def plan(
    signals: Sequence[float],
    how: Weighting,
    base: Sequence[float],
    counts: Sequence[float],
    for_others: bool = True,
) -> Plan:
    """What a set gives another, or itself; all signals are of the set, and there is one."""
    low, high, r = min(signals), max(signals), float(how.temperature)
    if how.range == "quantile":
        low = smallest_with_share(signals, counts, 0.05)
        high = smallest_with_share(signals, counts, 0.95)
    if how.strategy == "topk":
        down = [-signal for signal in signals]
        return low, high, r, -smallest_with_share(down, counts, how.top_share), 0.0
    scores = [scored(signal, low, high, how) for signal in signals]
    best, spread = max(scores), max(scores) - min(scores)
    if (target := how.target_ess) is not None and spread:

        def reaches(sharpness: float) -> bool:
            v = [math.exp(-sharpness * (best - h) / spread) for h in scores]
            return ess(v, base) >= target

        r = spread / max(largest(reaches, LARGEST_EXPONENT), 1e-9)
    elif how.target_ess is not None:
        r = 1.0
    level, top = 0.0, high if how.strategy == "softmax" else how.largest_score
    if for_others and (how.strategy == "softmax" or how.target_ess is not None):
        r = max(r, (top - min(scores)) / LARGEST_EXPONENT)
    if (most := how.max_weight) is not None:

        def fits(above: float) -> bool:
            cap = above - spread / r
            v = [min((h - best) / r, cap) - cap for h in scores]
            mean = math.fsum(b * math.exp(e) for e, b in zip(v, base, strict=True))
            return math.fsum(base) <= most * mean

        level = largest(fits, spread / r) - spread / r - (top - best) / r
    return low, high, r, 0.0, level


def planned(signal: float, how: Weighting, used: Plan) -> float:
    """Weight of one unit over its base, up to a factor that is the same for all."""
    low, high, r, threshold, level = used
    if low > high:
        return 1.0
    if how.strategy == "topk":
        return float(signal >= threshold)
    top = high if how.strategy == "softmax" else how.largest_score
    if how.target_ess is None:
        r = float(how.temperature)
        if how.strategy == "softmax":
            r = max(r, (high - low) / LARGEST_EXPONENT)
    return math.exp(min((scored(signal, low, high, how) - top) / r, level))


def weights(
    signals: Sequence[float],
    how: Weighting,
    mask: Sequence[bool] | None = None,
    base: Sequence[float] | None = None,
    counts: Sequence[float] | None = None,
) -> list[float]:
    """w = b·exp(h/r)/Σ over the finite signals inside the mask with a base, 0 elsewhere."""
    base, counts = base or [1.0] * len(signals), counts or [1.0] * len(signals)
    inside = [
        math.isfinite(s) and b > 0 and (mask is None or mask[i])
        for i, (s, b) in enumerate(zip(signals, base, strict=True))
    ]
    members = [s for s, used in zip(signals, inside, strict=True) if used]
    if not members:
        return [0.0] * len(signals)
    bases = [b for b, used in zip(base, inside, strict=True) if used]
    numbers = [c for c, used in zip(counts, inside, strict=True) if used]
    used_plan = low, high, r, _, level = plan(members, how, bases, numbers, False)
    if how.strategy == "topk":
        relative = [planned(s, how, used_plan) for s in members]
    else:
        scores = [scored(s, low, high, how) for s in members]
        best = max(scores)
        # A cap counts from the best unit here, which a plan for other sets cannot do.
        top = high if how.strategy == "softmax" else how.largest_score
        cap = level + (top - best) / r
        relative = [math.exp(min((h - best) / r, cap)) for h in scores]
    total = math.fsum(b * v for b, v in zip(bases, relative, strict=True))
    found = iter(b * v / total for b, v in zip(bases, relative, strict=True))
    return [next(found) if used else 0.0 for used in inside]


def sample_losses(
    token_losses: Sequence[Sequence[float]], mask: Sequence[Sequence[float]]
) -> list[float | None]:
    """l_i = Σ_t m·ce / Σ_t m; None for a sample without an active token."""
    losses: list[float | None] = []
    for row, active in zip(token_losses, mask, strict=True):
        count = math.fsum(active)
        total = math.fsum(ce * m for ce, m in zip(row, active, strict=True) if m)
        losses.append(total / count if count else None)
    return losses


def token_gradient(
    token_losses: Sequence[Sequence[float]],
    mask: Sequence[Sequence[float]],
    how: Weighting,
) -> list[list[float]]:
    """∂(Σ w_i·l_i)/∂ce_it with the weights held constant: w_i·m_it / Σ_t m_it."""
    losses = sample_losses(token_losses, mask)
    active = [loss is not None for loss in losses]
    w = weights([loss or 0.0 for loss in losses], how, active)
    return [
        [w_i * m / math.fsum(row) if m else 0.0 for m in row]
        for w_i, row in zip(w, mask, strict=True)
    ]
