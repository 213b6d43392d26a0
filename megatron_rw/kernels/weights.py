"""Sample weights from sample losses: equations 1 to 4 of the method, on one set of samples.

    u_i = 2δ·(l_i − l_min)/(l_max − l_min) − δ
    h_i = 0 | min(u_i + δ, δ) | 1 − u_i²/δ² | |u_i|     (uniform|linupper|quadratic|extremes)
    w_i = exp(h_i/r) / Σ_j exp(h_j/r)

Sow et al., arXiv 2502.06733. A sample outside the mask, or whose loss is not finite, has weight
exactly 0 and touches no other sample's weight. No gradient flows through the result and the host
never waits for the device. This module is the torch backend as well; the others are in
`triton_weights` and `cuda_backend`.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from megatron_rw.kernels.selection import BackendName, default_backend

WeightStrategy = Literal["uniform", "linupper", "quadratic", "extremes"]

# Below this range of losses (nats) a set has no order to speak of and its weights are uniform.
COLLAPSED_RANGE = 1e-6


class Statistic(IntEnum):
    """Places in `SampleWeights.statistics`; all are of the active samples."""

    COUNT = 0
    """|S|: inside the mask and finite."""
    LOW = 1
    """l_min; +inf when there are none."""
    HIGH = 2
    """l_max; −inf when there are none."""
    MEAN = 3
    """Mean loss; 0 when there are none."""
    VARIANCE = 4
    """Mean squared distance from it."""
    TOTAL = 5
    """Σ of the weights as returned: 1 when they are normalised."""
    ESS = 6
    """1/Σ w² of normalised weights; 0 when there are none."""
    LARGEST = 7
    """Largest normalised weight."""
    OBJECTIVE = 8
    """Σ w·l of normalised weights."""


class SampleWeights(NamedTuple):
    """Weights of a set.

    Attributes:
        weights: `[n]` in the dtype of the losses.
        statistics: `[9]`, same dtype; see `Statistic`.
    """

    weights: Tensor
    statistics: Tensor


@torch.no_grad()
def weigh_samples(
    losses: Tensor,
    strategy: WeightStrategy,
    temperature: float | Tensor,
    delta: float = 1.0,
    mask: Tensor | None = None,
    given_range: Tensor | None = None,
    *,
    backend_name: BackendName | None = None,
) -> SampleWeights:
    """Weights and statistics of the samples of one set.

    With a range given, a weight depends on its own sample alone and is not normalised:
    `exp((h(u_i) − h_max)/r)`, u_i clamped to [−δ, δ].

    Args:
        losses: `[n]`, float32 or float64, nats per token.
        strategy: `uniform`, `linupper`, `quadratic` or `extremes`.
        temperature: r > 0. As a scalar tensor it may change between replays of a CUDA graph.
        delta: δ > 0.
        mask: `[n]` bool, True for the samples of the set. All of them when None.
        given_range: `[2]` (l_min, l_max) to form u with. l_max below l_min, as in an empty set,
            makes all weights equal.
        backend_name: see `default_backend` when None; float64 always runs in torch then.

    Raises:
        ValueError: not 1-D, another dtype (bf16 losses would quantise the weights), or an
            unknown strategy.
    """
    if losses.dim() != 1:
        raise ValueError(f"losses must be 1-D, one per sample, not of shape {tuple(losses.shape)}")
    if losses.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"losses must be float32 or float64, not {losses.dtype}: rounding them to fewer bits "
            "quantises the weights"
        )
    if strategy not in get_args(WeightStrategy):
        raise ValueError(f"strategy {strategy!r} gives no weights")
    if given_range is not None:
        given_range = given_range.to(losses)
    if backend_name is None:
        double = losses.dtype == torch.float64
        backend_name = "torch" if double else default_backend(losses.device)
    if backend_name == "triton" and losses.numel() > 0:
        from megatron_rw.kernels import triton_weights

        return triton_weights.weigh(losses, strategy, temperature, delta, mask, given_range)
    if backend_name == "cuda" and losses.numel() > 0:
        from megatron_rw.kernels import cuda_backend

        return cuda_backend.weigh(losses, strategy, temperature, delta, mask, given_range)
    return _weigh(losses, strategy, temperature, delta, mask, given_range)


def loss_weights(
    losses: Tensor,
    strategy: WeightStrategy,
    temperature: float | Tensor,
    delta: float = 1.0,
    mask: Tensor | None = None,
) -> Tensor:
    """Normalised weights alone: `[n]`, sums to 1, or to 0 when the set is empty.

    Arguments and errors are those of `weigh_samples`.
    """
    return weigh_samples(losses, strategy, temperature, delta, mask).weights


def largest_score(strategy: WeightStrategy, delta: float) -> float:
    """h_max, the largest score that a strategy can give to any loss; the smallest is 0."""
    if strategy == "uniform":
        return 0.0
    return 1.0 if strategy == "quadratic" else delta


def _weigh(
    losses: Tensor,
    strategy: WeightStrategy,
    temperature: float | Tensor,
    delta: float,
    mask: Tensor | None,
    given_range: Tensor | None,
) -> SampleWeights:
    finite = torch.isfinite(losses)
    active = finite if mask is None else finite & mask
    # A sample beside the set has a loss of its own that must reach no sum.
    losses = losses.masked_fill(~active, 0.0)
    low, high = _range(losses, active)
    if given_range is None:
        scores = strategy_scores(normalise(losses, low, high, delta), strategy, delta)
        # exp(0) for the best sample: no overflow at any temperature, and the sum is at least 1.
        best = torch.where(active, scores, -torch.inf).amax() if len(losses) else 0.0
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
    largest = share.amax() if len(share) else total
    ess = effective_sample_size(share)
    variance = distance.square().sum() / count.clamp(min=1)
    objective = (share * losses).sum()
    values = [count.to(mean), low, high, mean, variance, total, ess, largest, objective]
    return torch.stack(values)


def _range(losses: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
    """l_min and l_max of the active losses; +inf and −inf when there are none."""
    if len(losses) == 0:
        return losses.new_tensor(torch.inf), losses.new_tensor(-torch.inf)
    low = losses.masked_fill(~active, torch.inf).amin()
    return low, losses.masked_fill(~active, -torch.inf).amax()


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
