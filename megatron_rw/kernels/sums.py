"""What the losses of a sample's tokens come down to."""

from typing import NamedTuple

import torch
from torch import Tensor


class SampleSums(NamedTuple):
    """Sums over this rank's tokens of each of its samples.

    Attributes:
        loss_sum: `[b]` fp32 (fp64 where the losses are), Σ_t m·ce in nats, with gradient.
        tokens: `[b]`, Σ_t m, same dtype (exact below 2^24).
    """

    loss_sum: Tensor
    tokens: Tensor


def sample_sums(token_losses: Tensor, loss_mask: Tensor) -> SampleSums:
    """Masked loss sum and token count of each sample.

    Args:
        token_losses: `[b, s]`, any float dtype, cross-entropy in nats.
        loss_mask: `[b, s]`, 1 where the token counts. A token outside adds nothing even if its
            loss is not finite.
    """
    if token_losses.dtype != torch.float64:
        token_losses = token_losses.float()
    mask = loss_mask.to(token_losses.dtype)
    counted = torch.where(mask > 0, token_losses * mask, 0.0)
    return SampleSums(counted.sum(dim=1), mask.sum(dim=1))
