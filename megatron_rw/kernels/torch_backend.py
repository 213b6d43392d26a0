"""The reference backend: plain torch, a few rows at a time, without an fp32 copy of the logits."""

import torch
from torch import Tensor

from megatron_rw.kernels import torch_weights
from megatron_rw.kernels.options import (
    MAX,
    SPREAD,
    SUM_EXP,
    TARGET,
    Combined,
    CrossEntropyOptions,
    Shard,
)
from megatron_rw.kernels.sums import sample_sums
from megatron_rw.kernels.torch_pieces import (
    Scratch,
    clear_rows,
    computed_in,
    cut_pieces,
    local_columns,
)


class TorchBackend:
    """Runs anywhere."""

    def statistics(
        self, logits: Tensor, target: Tensor, shard: Shard, options: CrossEntropyOptions
    ) -> Tensor:
        """See `Backend`."""
        column, here = local_columns(target, shard, options)
        pieces, columns = cut_pieces(logits[..., : shard.columns], column)
        scratch = Scratch(pieces)
        found: list[list[Tensor]] = []
        for part, index in zip(pieces, columns, strict=True):
            z = scratch.read(part)
            p = torch.softmax(z, dim=-1, out=scratch.space(z))
            # The largest probability is 1/Σ exp(z − m).
            rows = [z.amax(dim=-1), p.amax(dim=-1).reciprocal(), z.gather(-1, index).squeeze(-1)]
            if options.entropy:
                # It may overwrite what was read, which was needed until here.
                below = torch.sub(z, rows[0].unsqueeze(-1), out=scratch.space(z, 0))
                # 0·(−inf) is NaN, and e^(−200) of nothing is nothing.
                rows.append(torch.linalg.vecdot(p, below.clamp_(min=-200.0)))
            found.append(rows)
        table = torch.stack([torch.cat(row) for row in zip(*found, strict=True)])
        # A row of −inf has no softmax.
        total = table[SUM_EXP].masked_fill_(table[MAX] == -torch.inf, 0.0)
        table[TARGET].masked_fill_(~here.flatten(), 0.0)
        if options.entropy:
            # Σ exp(z − m)·(z − m), of the shard's own probabilities exp(z − m)/total.
            table[SPREAD] = torch.where(total > 0, total * table[SPREAD], 0.0)
        return table.view(options.rows, *target.shape)

    def combine(
        self,
        tables: Tensor,
        target: Tensor,
        shard: Shard,
        options: CrossEntropyOptions,
        loss_mask: Tensor | None,
    ) -> Combined:
        """See `Backend`."""
        table = join_tables(tables, options)
        total, own = table[SUM_EXP], table[TARGET]
        base = _anchor(table[MAX])
        log_total = torch.log(total)
        # Not lse − z_y: a common offset of the logits would cost both their digits.
        losses = log_total + (base - own)
        # A label beyond the vocabulary would pass as a loss without a target.
        losses.masked_fill_((target < 0) | (target >= shard.vocab_size), torch.nan)
        ignored = target == options.ignore_index
        losses.masked_fill_(ignored, 0.0)
        sums = entropy = None
        if loss_mask is not None:
            # The mask keeps its strides, and so the order of the sums.
            sums = sample_sums(losses.T, torch.where(ignored, 0.0, loss_mask).T)
        if options.entropy:
            entropy = log_total - table[SPREAD] / total
        return Combined(losses, torch.stack([base, log_total]), sums, entropy)

    weigh = staticmethod(torch_weights.weigh)

    def gradient(
        self,
        logits: Tensor,
        target: Tensor,
        lse: Tensor,
        upstream: Tensor,
        shard: Shard,
        options: CrossEntropyOptions,
        out: Tensor,
    ) -> None:
        """See `Backend`."""
        column, here = local_columns(target, shard, options)
        scale = upstream.contiguous().masked_fill(target == options.ignore_index, 0.0)
        scale, top, log_total = (x.unsqueeze(-1) for x in (scale, *lse))
        # The target's p − 1 in all its digits, before it may be overwritten.
        own = scale * torch.expm1(logits.gather(-1, column).to(lse.dtype) - top - log_total)
        whole = shard.columns == shard.vocab_size
        # What to multiply the softmax by, or, of a shard, exp(z − m).
        factor = scale * (1.0 if whole else torch.exp(-log_total))
        pieces = cut_pieces(
            logits[..., : shard.columns],
            out[..., : shard.columns],
            *(top, factor, column, own, here.unsqueeze(-1), scale == 0),
        )
        scratch = Scratch(pieces[0])
        for part, place, base, rise, index, exact, held, zero in zip(*pieces, strict=True):
            z = scratch.read(part)
            # Straight into its place where that holds it in full: each row is read before.
            straight = place.dtype == computed_in(place.dtype)
            gradient = place if straight else scratch.space(z)
            if whole:
                torch.softmax(z, dim=-1, out=gradient)
            else:
                torch.sub(z, base, out=gradient).exp_()
            gradient *= rise
            gradient.scatter_(-1, index, torch.where(held, exact, gradient.gather(-1, index)))
            clear_rows(gradient, zero)
            if not straight:
                place.copy_(gradient)
        out[..., shard.columns :] = 0


def join_tables(tables: Tensor, options: CrossEntropyOptions) -> Tensor:
    """One table, `[options.rows, s, b]`, of those of shards, `[shards, options.rows, s, b]`."""
    if len(tables) == 1:
        return tables[0]
    top = tables[:, MAX].amax(dim=0)
    lift = tables[:, MAX] - _anchor(top)
    factor = torch.exp(lift)
    sums = tables[:, SUM_EXP]
    joined = tables.sum(dim=0)
    joined[MAX], joined[SUM_EXP] = top, (sums * factor).sum(dim=0)
    if options.entropy:
        # Of a shard of −inf, or of the least numbers there are, −inf·0 is NaN.
        moved = tables[:, SPREAD] + torch.where(factor > 0, lift * sums, 0.0)
        joined[SPREAD] = (moved * factor).sum(dim=0)
    return joined


def _anchor(top: Tensor) -> Tensor:
    """What to subtract from logits of which `top` is the largest: of a row of −inf nothing."""
    return top.masked_fill(top == -torch.inf, 0.0)
