"""One set of samples, gathered from all ranks.

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

from megatron_rw.kernels.sums import SampleSums


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


@torch.no_grad()
def gather_samples(
    sums: SampleSums, domain: Tensor | None = None, ranks: ReduceGroup | None = None
) -> SampleSet:
    """Gather every rank's `b` samples over data- and context-parallel ranks.

    One all-reduce of `12·dp·b` bytes, nothing when `ranks.group` is None.

    Args:
        sums: `[b]` each, over this rank's part of each sample's tokens.
        domain: `[b]` int64; all 0 when None.
        ranks: the group and this rank's place; this process alone when None. `b` is the same on all
            ranks.

    Returns:
        The set, in order of data-parallel rank, the same on every rank.
    """
    ranks = ranks or ReduceGroup()
    loss_sum, tokens = sums
    count = loss_sum.numel()
    # Every context-parallel rank holds the label; one of them writes it.
    label = torch.zeros_like(tokens)
    if domain is not None and ranks.cp_rank == 0:
        label = domain.to(tokens.dtype)
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
