"""Gathers the set of samples that compete for weight from all ranks.

A sample's loss is Σ_t m_it·ce_it / Σ_t m_it over all of its tokens, on whichever rank they are. One
collective both adds up the shards of context parallelism and collects the samples of data
parallelism: every rank writes its sums into its own rows of a zeroed table, and the table is
all-reduced. Adding zeros is exact, so the result does not depend on the reduction order across
data-parallel ranks.
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

    Context-parallel ranks hold shards of the same samples.
    """

    # Data-parallel group including context parallelism; None for a single process.
    group: dist.ProcessGroup | None = None
    dp_rank: int = 0  # Along data parallelism alone.
    dp_size: int = 1
    cp_rank: int = 0
    cp_size: int = 1
    cp_group: dist.ProcessGroup | None = None  # None for a single context-parallel rank.

    @property
    def size(self) -> int:
        """Number of ranks over which Megatron averages gradients."""
        return self.dp_size * self.cp_size


@dataclass(frozen=True)
class SampleSet:
    """A set of samples, the same on every rank but for `local`. It has no gradient.

    The tensors are `[n]` each, in fp32, or in fp64 if the losses are.
    """

    loss_sum: Tensor  # Σ_t m·ce of each sample, nats.
    tokens: Tensor  # Σ_t m of each sample (exact below 2^24).
    domain: Tensor  # Index of the sample's domain.
    losses: Tensor  # Nats per token; 0 for a sample without active tokens.
    local: slice  # The rows of this rank's own samples.

    @property
    def has_tokens(self) -> Tensor:
        """`[n]` bool, whether the sample has an active token."""
        return self.tokens > 0

    @property
    def active(self) -> Tensor:
        """`[n]` bool, whether the sample competes: it has an active token and a finite loss."""
        return self.has_tokens & torch.isfinite(self.losses)


@torch.no_grad()
def gather_samples(
    sums: SampleSums, domain: Tensor | None = None, ranks: ReduceGroup | None = None
) -> SampleSet:
    """Gathers every rank's `b` samples over data- and context-parallel ranks.

    Collective: one all-reduce of `12·dp·b` bytes, or nothing if `ranks.group` is None.

    Args:
        sums: `[b]` each, over this rank's part of each sample's tokens; `b` is the same on all
            ranks, by whose data-parallel index the set is ordered.
        domain: `[b]` int64; None stands for all 0.
        ranks: The ranks to gather from; None stands for this process alone.
    """
    ranks = ranks or ReduceGroup()
    loss_sum, tokens = sums
    count = loss_sum.numel()
    # Every context-parallel rank holds the label, and they are added: only one may write it.
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
    # A sample without tokens has a loss sum of 0, so its loss is 0/1.
    losses = loss_sum / tokens.clamp(min=1.0)
    start = ranks.dp_rank * count
    return SampleSet(loss_sum, tokens, label, losses, slice(start, start + count))
