"""Sample weights from sample losses: equations 1 to 4 of the method, on one set of samples."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_rw.reweighting.config import STRATEGIES, Strategy, largest_score

# Below this range of losses (nats) a set has no order to speak of and its weights are uniform.
COLLAPSED_RANGE = 1e-6


@torch.no_grad()
def loss_weights(
    losses: Tensor,
    strategy: Strategy,
    temperature: float,
    delta: float = 1.0,
    mask: Tensor | None = None,
) -> Tensor:
    """Weights of the samples of one set, from their losses.

        u_i = 2δ·(l_i − l_min)/(l_max − l_min) − δ
        h_i = 0 | min(u_i + δ, δ) | 1 − u_i²/δ² | |u_i|     (uniform|linupper|quadratic|extremes)
        w_i = exp(h_i/r) / Σ_j exp(h_j/r)

    Sow et al., arXiv 2502.06733. A sample outside the mask, or whose loss is not finite, has
    weight exactly 0 and touches no other sample's weight. No gradient flows through the result
    and the host never waits for the device.

    Args:
        losses: `[n]`, float32 or float64, nats per token.
        strategy: `uniform`, `linupper`, `quadratic` or `extremes`.
        temperature: r > 0.
        delta: δ > 0.
        mask: `[n]` bool, True for the samples of the set. All of them when None.

    Returns:
        `[n]` in the dtype of `losses`. Sums to 1, or to 0 when the set is empty.

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
    if strategy not in STRATEGIES or strategy == "none":
        raise ValueError(f"strategy {strategy!r} gives no weights")

    if losses.numel() == 0:
        return losses.detach().clone()

    active = _active(losses, mask)
    low, high = loss_range(losses, active)
    scores = strategy_scores(normalise(losses, low, high, delta), strategy, delta)
    # exp(0) for the best sample: no overflow at any temperature, and the sum is at least 1.
    scores = scores.masked_fill(~active, -torch.inf)
    best = torch.where(active.any(), scores.amax(), 0.0)
    unnormalised = torch.exp((scores - best) / temperature)
    return unnormalised / unnormalised.sum().clamp(min=torch.finfo(losses.dtype).tiny)


@torch.no_grad()
def unnormalised_weights(
    losses: Tensor,
    low: Tensor,
    high: Tensor,
    strategy: Strategy,
    temperature: float,
    delta: float = 1.0,
    mask: Tensor | None = None,
) -> Tensor:
    """Weights up to the normaliser of their set, from a range of losses known before.

        exp((h(u_i) − h_max)/r), with u_i clamped to [−δ, δ]

    Each depends on its own sample alone. Divided by their sum they are the weights of the set.

    Args:
        losses: `[n]` float, nats per token.
        low: scalar, l_min of the range that u is formed with.
        high: scalar, l_max. Below `low`, as that of an empty set, it makes all weights equal.
        strategy: as in `loss_weights`.
        temperature: r > 0.
        delta: δ > 0.
        mask: as in `loss_weights`.

    Returns:
        `[n]` in the dtype of `losses`, between 0 and 1; 0 where the mask or a loss that is not
        finite excludes the sample.
    """
    scores = strategy_scores(normalise(losses, low, high, delta), strategy, delta)
    exponent = (scores - largest_score(strategy, delta)) / temperature
    return torch.where(_active(losses, mask), torch.exp(exponent), 0.0)


def _active(losses: Tensor, mask: Tensor | None) -> Tensor:
    finite = torch.isfinite(losses)
    return finite if mask is None else finite & mask


def loss_range(losses: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
    """l_min and l_max of the active losses; +inf and −inf when there are none.

    Args:
        losses: `[n]` float, n > 0.
        active: `[n]` bool.
    """
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
        `[n]`, u_i. NaN where a loss is NaN, unless the range collapses.
    """
    spread = high - low
    # An empty set has spread −inf and lands here too.
    collapsed = ~(spread >= COLLAPSED_RANGE)
    # Subtract before dividing: h = 2δl/range − … cancels in fp32 when the range is small.
    scaled = 2.0 * delta * ((losses - low) / spread.masked_fill(collapsed, 1.0)) - delta
    return torch.where(collapsed, 0.0, scaled.clamp(-delta, delta))


def strategy_scores(normalised: Tensor, strategy: Strategy, delta: float) -> Tensor:
    """h(u), the score that the softmax turns into a weight.

    Args:
        normalised: `[n]`, u_i in [−δ, δ].
        strategy: as in `loss_weights`.
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
        case _:
            raise ValueError(f"strategy {strategy!r} gives no weights")


def effective_sample_size(weights: Tensor) -> Tensor:
    """`1/Σ w²`: how many equally weighted samples carry as much as these.

    Args:
        weights: `[…, n]`, normalised to sum to 1 along the last dimension.

    Returns:
        `[…]`, between 1 and n; 0 for an empty set.
    """
    total = weights.square().sum(dim=-1)
    return torch.where(total > 0, 1.0 / total, 0.0)
