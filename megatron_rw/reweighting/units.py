"""What competes for weight: a micro-batch's tokens, summed by sequence, document or token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rw.kernels.sums import SampleSums, sample_sums

Unit = Literal["sequence", "document", "token"]


@dataclass(frozen=True)
class ReduceGroup:
    """The ranks whose units compete, and this rank's place among them.

    Context-parallel ranks hold shards of the same sequences.
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

    @property
    def rank(self) -> int:
        """This rank's number, below `size`."""
        return self.dp_rank * self.cp_size + self.cp_rank


def begin_sum(table: Tensor, ranks: ReduceGroup) -> Callable[[], Tensor]:
    """Begins to add up a table over the ranks, in place.

    It returns a function that waits for the sum and returns the table; on a GPU the stream waits,
    not the host. Collective, unless `ranks.group` is None.
    """
    work = None
    if ranks.group is not None:
        work = dist.all_reduce(table, group=ranks.group, async_op=True)

    def wait() -> Tensor:
        if work is not None:
            work.wait()
        return table

    return wait


@dataclass(frozen=True)
class TokenBatch:
    """A micro-batch on this rank; `[b, s/cp]` each, but for the sums and the domain."""

    losses: Tensor  # Nats, with gradient.
    mask: Tensor  # 1 where the token counts.
    # Of the two, where a kernel has made them; otherwise they are computed.
    sums: SampleSums | None = None
    # What the weights follow, nats, NaN where it is missing; None where that is the loss.
    signal: Tensor | None = None
    documents: Tensor | None = None  # int64, number of the token's document in its sequence.
    sample_weights: Tensor | None = None  # The static weight of the token's document.
    domain: Tensor | None = None  # `[b]` int64; None stands for all 0.

    def sequence_sums(self) -> SampleSums:
        """Returns the sums by sequence, with gradient."""
        return sample_sums(self.losses, self.mask) if self.sums is None else self.sums


@dataclass(frozen=True)
class UnitSums:
    """Sums over the tokens of units, and their domain; `[n]` each, in fp32 or fp64."""

    loss_sum: Tensor  # Σ_t m·ce, nats.
    tokens: Tensor  # Σ_t m (exact below 2^24).
    domain: Tensor
    signal_sum: Tensor | None = None  # Over the tokens that have a signal.
    signal_tokens: Tensor | None = None
    weight_sum: Tensor | None = None  # Σ_t m·a of the static weights a.

    @staticmethod
    def of(batch: TokenBatch, unit: Unit, ranks: ReduceGroup) -> UnitSums:
        """Adds up this rank's tokens of its units; no gradient flows through it.

        There are b units `sequence`, b·s/cp units `token`, and b·s units `document`, as many as a
        sequence can have; most of these have no token. Context-parallel ranks hold parts of the
        same sequences and documents. Only one of them writes the domain, as they are added.
        """
        with torch.no_grad():
            sums = batch.sequence_sums()
            dtype = sums.tokens.dtype
            mask = batch.mask.to(dtype)
            rows = _Rows(unit, batch.documents, ranks.cp_size)
            loss_sum, tokens = sums.loss_sum.detach(), sums.tokens
            if unit != "sequence":
                losses = torch.where(mask > 0, batch.losses.detach().to(dtype) * mask, 0.0)
                loss_sum, tokens = rows.sum(losses), rows.sum(mask)
            signal_sum = signal_tokens = weight_sum = None
            if batch.signal is not None:
                known = torch.where(batch.signal.isfinite(), mask, 0.0)
                signal = batch.signal.detach().to(dtype).nan_to_num(0.0, 0.0, 0.0)
                signal_sum, signal_tokens = rows.sum(signal * known), rows.sum(known)
            if batch.sample_weights is not None:
                weights = batch.sample_weights.to(dtype)
                weight_sum = rows.sum(torch.where(mask > 0, weights * mask, 0.0))
            domain = torch.zeros_like(tokens)
            if batch.domain is not None and (unit == "token" or ranks.cp_rank == 0):
                by_sequence = batch.domain.to(dtype)[:, None]
                domain = by_sequence.expand(-1, len(tokens) // len(by_sequence)).reshape(-1)
            return UnitSums(loss_sum, tokens, domain, signal_sum, signal_tokens, weight_sum)

    def table(self) -> Tensor:
        """Returns the sums that there are as one `[k, n]`."""
        return torch.stack([row for row in vars(self).values() if row is not None])

    def with_table(self, table: Tensor) -> UnitSums:
        """Returns others of the same kinds, from a `table()` of theirs."""
        names = [name for name, row in vars(self).items() if row is not None]
        return UnitSums(**dict(zip(names, table.unbind(), strict=True)))

    def begin_gather(self, ranks: ReduceGroup) -> Callable[[], UnitSums]:
        """Begins to gather those of all data-parallel ranks, each over all context-parallel ranks.

        It returns a function that waits for them and returns them. Collective: one all-reduce of
        4·k·dp·n bytes for k sums in fp32. The ranks' units, as many on each, are in the order of
        their data-parallel index.
        """
        table = self.table()
        if ranks.dp_size > 1:
            rows = table
            table = rows.new_zeros(len(rows), ranks.dp_size, rows.shape[1])
            table[:, ranks.dp_rank] = rows
            table = table.view(len(rows), -1)
        wait = begin_sum(table, ranks)
        return lambda: self.with_table(wait())

    def over_shards(self, ranks: ReduceGroup) -> UnitSums:
        """Returns this rank's units over all context-parallel ranks. Collective over these."""
        if ranks.cp_size == 1:
            return self
        table = self.table()
        dist.all_reduce(table, group=ranks.cp_group)
        return self.with_table(table)


@dataclass(frozen=True)
class _Rows:
    """How the tokens of a micro-batch, `[b, s/cp]`, are put together to units."""

    unit: Unit
    documents: Tensor | None
    cp_size: int

    def sum(self, values: Tensor) -> Tensor:
        if self.unit == "sequence":
            return values.sum(dim=1)
        if self.unit == "token":
            return values.reshape(-1)
        assert self.documents is not None
        batch, tokens = values.shape
        slots = values.new_zeros(batch, tokens * self.cp_size)
        if not values.is_cuda:
            return slots.scatter_add_(1, self.documents, values).view(-1)
        # On CUDA this one, unlike scatter_add_, adds in an order that repeats.
        rows = torch.arange(batch, device=values.device)[:, None].expand_as(values)
        return slots.index_put_((rows, self.documents), values, accumulate=True).view(-1)


@dataclass(frozen=True)
class UnitSet:
    """Units with all their tokens. It has no gradient. The tensors are `[n]` each."""

    losses: Tensor  # Nats per token; 0 for a unit without active tokens.
    tokens: Tensor
    domain: Tensor  # Index of the unit's domain.
    signals: Tensor  # What the weights follow, nats per token; 0 where it is missing.
    # What weights are without a strategy, up to a factor; None where that is 1.
    base: Tensor | None
    missing: Tensor | None  # bool, the unit has tokens but no signal; None where that cannot be.
    local: slice  # The rows of this rank's own units.

    @staticmethod
    def of(sums: UnitSums, by_tokens: bool, local: slice) -> UnitSet:
        """Makes units of whole sums; with `by_tokens` a unit's base grows with its tokens."""
        # A unit without tokens has a loss sum of 0, so its loss is 0/1.
        tokens, divisor = sums.tokens, sums.tokens.clamp(min=1.0)
        losses = signals = sums.loss_sum / divisor
        missing = None
        if sums.signal_sum is not None and sums.signal_tokens is not None:
            signals = sums.signal_sum / sums.signal_tokens.clamp(min=1.0)
            missing = (tokens > 0) & (sums.signal_tokens == 0)
        base = tokens if by_tokens else None
        if sums.weight_sum is not None:
            base = sums.weight_sum if by_tokens else sums.weight_sum / divisor
        return UnitSet(losses, tokens, sums.domain, signals, base, missing, local)

    @property
    def has_tokens(self) -> Tensor:
        """`[n]` bool, whether the unit has an active token."""
        return self.tokens > 0

    @property
    def active(self) -> Tensor:
        """`[n]` bool, whether the unit competes: it has an active token and a finite loss."""
        return self.has_tokens & torch.isfinite(self.losses)
