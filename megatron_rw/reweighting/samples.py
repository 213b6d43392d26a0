"""One set of samples, gathered: per-sample losses of this rank's micro-batch, then of all ranks.

A sample's loss is Σ_t m_it·ce_it / Σ_t m_it over all of its tokens, wherever they lie. The one
collective of this module adds up the shards of context parallelism and lines up the samples of
data parallelism at once: every rank writes its sums into its own rows of a zeroed table and the
table is all-reduced. Adding zeros is exact, so the result does not depend on the reduction order
across data-parallel ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class ReduceGroup:
    """The ranks whose samples compete, and this rank's place among them.

    Attributes:
        group: data-parallel group including context parallelism; None for a single process.
        dp_rank: this rank's index along data parallelism alone, the owner of a row block.
        dp_size: how many data-parallel ranks.
        cp_rank: this rank's index along context parallelism.
        cp_size: how many context-parallel ranks hold shards of the same samples.
        cp_group: those ranks; None for one.
    """

    group: dist.ProcessGroup | None = None
    dp_rank: int = 0
    dp_size: int = 1
    cp_rank: int = 0
    cp_size: int = 1
    cp_group: dist.ProcessGroup | None = None

    @property
    def size(self) -> int:
        """Ranks over which data-parallel gradients are averaged."""
        return self.dp_size * self.cp_size


@dataclass(frozen=True)
class SampleSet:
    """What every rank knows of one set after the collective. No gradient.

    Attributes:
        loss_sum: `[n]`, Σ_t m·ce of each sample, nats. fp32, or fp64 as the losses were.
        tokens: `[n]`, Σ_t m of each sample, same dtype (exact below 2^24).
        domain: `[n]`, index of the sample's domain, in the same dtype.
        losses: `[n]`, nats per token; 0 where a sample has no active token.
        local: the rows that are this rank's own.
    """

    loss_sum: Tensor
    tokens: Tensor
    domain: Tensor
    losses: Tensor
    local: slice

    @property
    def has_tokens(self) -> Tensor:
        """`[n]` bool: the sample has an active token."""
        return self.tokens > 0

    @property
    def active(self) -> Tensor:
        """`[n]` bool: the sample competes; it has an active token and a finite loss."""
        return self.has_tokens & torch.isfinite(self.losses)


def sample_sums(token_losses: Tensor, loss_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Masked loss sum and token count of each sample, over this rank's tokens.

    Args:
        token_losses: `[b, s]`, any float dtype, cross-entropy in nats.
        loss_mask: `[b, s]`, 1 where the token counts.

    Returns:
        `(loss_sum, tokens)`, each `[b]`, fp32 (fp64 when the losses are); the first carries the
        gradient. A token outside the mask adds nothing even if its loss is not finite.
    """
    if token_losses.dtype != torch.float64:
        token_losses = token_losses.float()
    mask = loss_mask.to(token_losses.dtype)
    counted = torch.where(mask > 0, token_losses * mask, 0.0)
    return counted.sum(dim=1), mask.sum(dim=1)


@torch.no_grad()
def gather_samples(
    loss_sum: Tensor, tokens: Tensor, domain: Tensor, ranks: ReduceGroup
) -> SampleSet:
    """Gather every rank's `b` samples over data- and context-parallel ranks.

    One all-reduce of `12·dp·b` bytes, nothing when `ranks.group` is None.

    Args:
        loss_sum: `[b]`, this rank's part of each sample's loss sum.
        tokens: `[b]`, this rank's part of each sample's token count.
        domain: `[b]` int64.
        ranks: the group and this rank's place. `b` is the same on all of its ranks.

    Returns:
        The set, in order of data-parallel rank, the same on every rank.
    """
    count = loss_sum.numel()
    # Every context-parallel rank holds the label; one of them writes it.
    label = domain.to(loss_sum.dtype) if ranks.cp_rank == 0 else torch.zeros_like(tokens)
    table = torch.stack([loss_sum, tokens, label])
    if ranks.dp_size > 1:
        rows = table
        table = rows.new_zeros(3, ranks.dp_size, count)
        table[:, ranks.dp_rank] = rows
        table = table.view(3, -1)
    if ranks.group is not None:
        dist.all_reduce(table, group=ranks.group)
    loss_sum, tokens, label = table.unbind()
    # The mean of a sample without tokens is 0/1: its loss sum is an empty one.
    losses = loss_sum / tokens.clamp(min=1.0)
    start = ranks.dp_rank * count
    return SampleSet(loss_sum, tokens, label, losses, slice(start, start + count))
