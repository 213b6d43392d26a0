"""The weighting in plain torch, the reference; see `weights.weigh_samples`."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_rw.kernels.options import (
    COLLAPSED_RANGE,
    SampleWeights,
    WeightStrategy,
    largest_score,
)


def weigh(
    losses: Tensor,
    strategy: WeightStrategy,
    temperature: float | Tensor,
    delta: float,
    mask: Tensor | None,
    given_range: Tensor | None,
) -> SampleWeights:
    """See `Backend.weigh`."""
    finite = torch.isfinite(losses)
    active = finite if mask is None else finite & mask
    # A sample beside the set has a loss of its own that must reach no sum.
    losses = losses.masked_fill(~active, 0.0)
    low = losses.masked_fill(~active, torch.inf).amin()
    high = losses.masked_fill(~active, -torch.inf).amax()
    if given_range is None:
        scores = strategy_scores(normalise(losses, low, high, delta), strategy, delta)
        # exp(0) for the best sample: no overflow at any temperature, and the sum is at least 1.
        best = torch.where(active, scores, -torch.inf).amax()
        weights = torch.exp((scores - best) / temperature).masked_fill(~active, 0.0)
        weights = weights / weights.sum().clamp(min=torch.finfo(losses.dtype).tiny)
    else:
        normalised = normalise(losses, given_range[0], given_range[1], delta)
        scores = strategy_scores(normalised, strategy, delta)
        exponents = (scores - largest_score(strategy, delta)) / temperature
        weights = torch.exp(exponents).masked_fill(~active, 0.0)
    return SampleWeights(weights, _statistics(weights, losses, active, low, high))


def _statistics(
    weights: Tensor, losses: Tensor, active: Tensor, low: Tensor, high: Tensor
) -> Tensor:
    count, total = active.sum(), weights.sum()
    mean = losses.sum() / count.clamp(min=1)
    distance = torch.where(active, losses - mean, 0.0)
    share = weights / total.clamp(min=torch.finfo(weights.dtype).tiny)
    ess = effective_sample_size(share)
    variance = distance.square().sum() / count.clamp(min=1)
    objective = (share * losses).sum()
    values = [count.to(mean), low, high, mean, variance, total, ess, share.amax(), objective]
    return torch.stack(values)


def normalise(losses: Tensor, low: Tensor, high: Tensor, delta: float) -> Tensor:
    """Scale losses from [low, high] to [−δ, δ] and clamp; 0 for all when the range collapses.

    Args:
        losses: `[n]` float.
        low: scalar.
        high: scalar.
        delta: δ.

    Returns:
        `[n]`, u_i.
    """
    spread = high - low
    # An empty set has spread −inf and lands here too.
    collapsed = ~(spread >= COLLAPSED_RANGE)
    # Subtract before dividing: h = 2δl/range − … cancels in fp32 when the range is small.
    scaled = 2.0 * delta * ((losses - low) / spread.masked_fill(collapsed, 1.0)) - delta
    return torch.where(collapsed, 0.0, scaled.clamp(-delta, delta))


def strategy_scores(normalised: Tensor, strategy: WeightStrategy, delta: float) -> Tensor:
    """h(u), the score that the softmax turns into a weight.

    Args:
        normalised: `[n]`, u_i in [−δ, δ].
        strategy: as in `weigh_samples`.
        delta: δ.

    Returns:
        `[n]`, h_i.
    """
    match strategy:
        case "uniform":
            return torch.zeros_like(normalised)
        case "linupper":
            return (normalised + delta).clamp(max=delta)
        case "quadratic":
            return 1.0 - (normalised / delta).square()
        case "extremes":
            return normalised.abs()


def effective_sample_size(weights: Tensor) -> Tensor:
    """`1/Σ w²`: how many equally weighted samples carry as much as these.

    Args:
        weights: `[…, n]`, normalised to sum to 1 along the last dimension.

    Returns:
        `[…]`, between 1 and n; 0 for an empty set.
    """
    total = weights.square().sum(dim=-1)
    return torch.where(total > 0, 1.0 / total, 0.0)
