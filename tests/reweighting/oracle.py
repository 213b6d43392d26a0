"""The method in plain Python floats (fp64), one sample after the other: obviously right."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

STRATEGIES: list[Any] = ["uniform", "linupper", "quadratic", "extremes"]
COLLAPSED_RANGE = 1e-6


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


def weights(
    losses: Sequence[float],
    strategy: str,
    temperature: float,
    delta: float = 1.0,
    mask: Sequence[bool] | None = None,
) -> list[float]:
    """w_i = exp(h_i/r) / Σ_j exp(h_j/r) over the finite losses inside the mask, 0 elsewhere."""
    inside = [math.isfinite(loss) and (mask is None or mask[i]) for i, loss in enumerate(losses)]
    members = [loss for loss, used in zip(losses, inside, strict=True) if used]
    if not members:
        return [0.0] * len(losses)
    low, high = min(members), max(members)
    if high - low < COLLAPSED_RANGE:
        return [1 / len(members) if used else 0.0 for used in inside]
    scores = [
        score(2 * delta * (loss - low) / (high - low) - delta, strategy, delta) if used else None
        for loss, used in zip(losses, inside, strict=True)
    ]
    best = max(h for h in scores if h is not None)
    unnormalised = [0.0 if h is None else math.exp((h - best) / temperature) for h in scores]
    total = math.fsum(unnormalised)
    return [value / total for value in unnormalised]


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
    strategy: str,
    temperature: float,
    delta: float = 1.0,
) -> list[list[float]]:
    """∂(Σ w_i·l_i)/∂ce_it with the weights held constant: w_i·m_it / Σ_t m_it."""
    losses = sample_losses(token_losses, mask)
    active = [loss is not None for loss in losses]
    w = weights([loss or 0.0 for loss in losses], strategy, temperature, delta, active)
    return [
        [w_i * m / math.fsum(row) if m else 0.0 for m in row]
        for w_i, row in zip(w, mask, strict=True)
    ]
