"""The reference backend of the fused output layer's row passes, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_rw.kernels.options import MAX, SUM_EXP, TARGET, CrossEntropyOptions, Shard
from megatron_rw.kernels.probabilities import largest_ratio
from megatron_rw.kernels.torch_pieces import (
    Scratch,
    clear_rows,
    computed_in,
    cut_pieces,
    local_columns,
)


class TorchProbabilities:
    """Runs anywhere."""

    def probabilities(
        self, logits: Tensor, target: Tensor, shard: Shard, options: CrossEntropyOptions
    ) -> Tensor:
        """See `ProbabilityBackend`."""
        column, here = local_columns(target, shard, options)
        ignored = target == options.ignore_index
        pieces, columns, ignored_rows = cut_pieces(
            logits[..., : shard.columns], column, ignored.unsqueeze(-1)
        )
        scratch = Scratch(pieces)
        tops, totals, owns = [], [], []
        for part, index, unused in zip(pieces, columns, ignored_rows, strict=True):
            z = scratch.read(part, options)
            tops.append(z.amax(dim=-1))
            owns.append(z.gather(-1, index).squeeze(-1))
            # Straight into its place where nothing is left to read there.
            straight = z is part
            q = torch.softmax(z, dim=-1, out=part if straight else scratch.space(z))
            # The largest probability is 1/Σ exp(z − m).
            totals.append(q.amax(dim=-1).reciprocal())
            if options.softcap is not None:
                q *= 1.0 - z.div_(options.softcap).square_()
            clear_rows(q, unused)
            if not straight:
                part.copy_(q)
        logits[..., shard.columns :] = 0
        top, total = torch.cat(tops), torch.cat(totals)
        # A row of −inf has no softmax.
        total = total.masked_fill(top == -torch.inf, 0.0)
        own = torch.where(here.flatten(), torch.cat(owns), 0.0)
        return torch.stack([top, total, own]).view(1, 3, *target.shape)

    def subtract_targets(
        self,
        probabilities: Tensor,
        table: Tensor,
        target: Tensor,
        lse: Tensor,
        shard: Shard,
        options: CrossEntropyOptions,
    ) -> Tensor:
        """See `ProbabilityBackend`."""
        column, here = local_columns(target, shard, options)
        top, total, own = (table[0, row] for row in (MAX, SUM_EXP, TARGET))
        within = torch.where(top == -torch.inf, 0.0, top) + torch.log(total)
        ratio = torch.exp(lse - within) / (1.0 + 2.0 * options.z_loss * lse)
        lost = ~(ratio.abs() <= largest_ratio(probabilities.dtype))
        value = torch.where(lost, -1.0, torch.exp(own - within) - ratio)
        if options.softcap is not None:
            value *= 1.0 - (own / options.softcap).square()
        ignored = target == options.ignore_index
        # A device is not asked whether there are any, which would make the host wait.
        if probabilities.is_cuda or (lost & ~ignored).any():
            probabilities.masked_fill_(lost.unsqueeze(-1), 0.0)
        # Not scatter_, which copies all of it on the CPU.
        rows = probabilities.flatten(0, 1)
        place = (torch.arange(len(rows), device=rows.device), column.flatten())
        rows.index_put_(place, torch.where(here.flatten(), value.flatten().to(rows), rows[place]))
        scale = torch.where(lost, 1.0, ratio.reciprocal())
        scale = torch.where(lse.isfinite(), scale, torch.nan)
        return scale.masked_fill(ignored, 0.0)

    def scale_rows(self, matrix: Tensor, scale: Tensor, out: Tensor) -> None:
        """See `ProbabilityBackend`."""
        factor = scale.to(computed_in(matrix.dtype)).unsqueeze(-1)
        torch.mul(matrix, factor, out=out)
        out.masked_fill_(factor == 0, 0.0)
