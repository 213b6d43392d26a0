"""The reference backend: plain torch, a few rows at a time, without an fp32 copy of the logits."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_rw.kernels.options import (
    MAX,
    SUM,
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
        """See `CrossEntropyBackend`."""
        column, here = local_columns(target, shard, options)
        pieces, columns = cut_pieces(logits[..., : shard.columns], column)
        top, total, own, plain = _by_target(pieces, columns, options)
        # Where the target's logit is not finite it says nothing of the others. A device is not
        # asked whether there are any, which would make the host wait.
        if logits.is_cuda or not torch.isfinite(top).all():
            top, total = _by_maximum(pieces, options)
        rows = [top, total, torch.where(here.flatten(), own, 0.0)]
        if plain is not None:
            rows.append(plain)
        return torch.stack(rows).view(1, len(rows), *target.shape)

    def merge(self, tables: Tensor) -> Tensor:
        """See `CrossEntropyBackend`."""
        if len(tables) == 1:
            return tables
        top, _, total = _join(tables)
        return torch.cat([torch.stack([top, total]), tables[:, TARGET:].sum(dim=0)]).unsqueeze(0)

    def combine(
        self,
        tables: Tensor,
        target: Tensor,
        shard: Shard,
        options: CrossEntropyOptions,
        loss_mask: Tensor | None,
    ) -> Combined:
        """See `CrossEntropyBackend`."""
        _, base, total = _join(tables)
        log_total = torch.log(total)
        own = tables[:, TARGET].sum(dim=0)
        # Not lse − z_y: a common offset of the logits would cost both their digits.
        losses = log_total + (base - own)
        lse = log_total + base
        smoothing = shard.smoothing(options)
        if smoothing:
            losses += smoothing * (own - tables[:, SUM].sum(dim=0) / shard.vocab_size)
        if options.z_loss:
            losses += options.z_loss * lse.square()
        # A label beyond the vocabulary would pass as a loss without a target.
        losses.masked_fill_((target < 0) | (target >= shard.vocab_size), torch.nan)
        losses.masked_fill_(target == options.ignore_index, 0.0)
        sums = None if loss_mask is None else sample_sums(losses.T, loss_mask.T)
        return Combined(losses, lse, sums)

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
        """See `CrossEntropyBackend`."""
        smoothing = shard.smoothing(options)
        column, here = local_columns(target, shard, options)
        scale = upstream.contiguous().masked_fill(target == options.ignore_index, 0.0)
        row_scale = (scale * (1.0 + 2.0 * options.z_loss * lse)).unsqueeze(-1)
        correction = torch.where(here, (smoothing - 1.0) * scale, 0.0).unsqueeze(-1)
        uniform = (scale * (smoothing / shard.vocab_size)).unsqueeze(-1)
        whole = shard.columns == shard.vocab_size
        pieces = cut_pieces(
            logits[..., : shard.columns],
            out[..., : shard.columns],
            lse.unsqueeze(-1),
            column,
            row_scale,
            correction,
            uniform,
            (scale == 0).unsqueeze(-1),
        )
        scratch = Scratch(pieces[0])
        for part, place, row_lse, index, factor, own, even, zero in zip(*pieces, strict=True):
            z = scratch.read(part, options)
            # Straight into its place where nothing is left to read there: each row of these is read
            # before it is written.
            straight = place.dtype == computed_in(place.dtype) and options.softcap is None
            gradient = place if straight else scratch.space(z)
            if whole:
                torch.softmax(z, dim=-1, out=gradient)
            else:
                torch.sub(z, row_lse, out=gradient).exp_()
            gradient *= factor
            if smoothing:
                gradient -= even
            gradient.scatter_add_(-1, index, own)
            if options.softcap is not None:
                gradient *= 1.0 - z.div_(options.softcap).square_()
            clear_rows(gradient, zero)
            if not straight:
                place.copy_(gradient)
        out[..., shard.columns :] = 0


def _join(tables: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The largest logit m of all parts, a finite m for a row of −inf, and Σ exp(z − m)."""
    top = tables[:, MAX].amax(dim=0)
    base = top.masked_fill(top == -torch.inf, 0.0)
    return top, base, (tables[:, SUM_EXP] * torch.exp(tables[:, MAX] - base)).sum(dim=0)


def _by_target(
    logits: list[Tensor], columns: list[Tensor], options: CrossEntropyOptions
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """m, Σ exp(z − m), the logit z_y in `columns`, and with label smoothing Σ z, `[s·b]` each.

    From one fused log-softmax: any m near the largest logit does, and log Σ exp z = z_y − log p_y.
    """
    scratch = Scratch(logits)
    owns, log_probabilities, plain = [], [], []
    for part, index in zip(logits, columns, strict=True):
        z = scratch.read(part, options)
        owns.append(z.gather(-1, index))
        log_p = torch.log_softmax(z, dim=-1, out=scratch.space(z))
        log_probabilities.append(log_p.gather(-1, index))
        if options.label_smoothing:
            plain.append(z.sum(dim=-1))
    own, log_p = torch.cat(owns).squeeze(-1), torch.cat(log_probabilities).squeeze(-1)
    top = own - log_p
    # What rounding left of z_y − m − log p_y keeps the digits of log p_y.
    total = torch.exp((own - top) - log_p)
    return top, total, own, torch.cat(plain) if plain else None


def _by_maximum(logits: list[Tensor], options: CrossEntropyOptions) -> tuple[Tensor, Tensor]:
    """The largest logit m and Σ exp(z − m), `[s·b]` each."""
    scratch = Scratch(logits)
    tops, totals = [], []
    for part in logits:
        z = scratch.read(part, options)
        tops.append(z.amax(dim=-1))
        # The largest probability is 1/Σ exp(z − m).
        totals.append(torch.softmax(z, dim=-1, out=scratch.space(z)).amax(dim=-1))
    top = torch.cat(tops)
    # A row of −inf has no softmax.
    return top, torch.cat(totals).reciprocal().masked_fill(top == -torch.inf, 0.0)
