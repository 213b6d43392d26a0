"""The reference backend: plain torch, a few rows at a time, without an fp32 copy of the logits."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_rw.kernels.options import CrossEntropyOptions, Shard

# Elements of the fp32 working set: it stays in a core's cache.
CHUNK_ELEMENTS = 1 << 18


class TorchBackend:
    """Runs anywhere."""

    def statistics(
        self, logits: Tensor, local_target: Tensor, shard: Shard, options: CrossEntropyOptions
    ) -> Tensor:
        """See `CrossEntropyBackend`."""
        rows = 4 if options.label_smoothing else 3
        table = torch.empty(rows, *logits.shape[:2], dtype=torch.float32, device=logits.device)
        for part in _chunks(logits):
            z = _capped(logits[part][..., : shard.columns].float(), options)
            target = local_target[part]
            top = z.amax(dim=-1)
            # A row of −inf: exp(−inf − 0) is 0, exp(−inf + inf) would be NaN.
            base = top.masked_fill(top == -torch.inf, 0.0)
            own = z.gather(-1, target.clamp(min=0).unsqueeze(-1)).squeeze(-1)
            columns = [top, torch.exp(z - base.unsqueeze(-1)).sum(dim=-1)]
            columns.append(torch.where(target >= 0, own, 0.0))
            if options.label_smoothing:
                columns.append(z.sum(dim=-1))
            for row, values in enumerate(columns):
                table[row][part] = values
        return table

    def gradient(
        self,
        logits: Tensor,
        local_target: Tensor,
        lse: Tensor,
        upstream: Tensor,
        shard: Shard,
        options: CrossEntropyOptions,
        out: Tensor,
    ) -> None:
        """See `CrossEntropyBackend`."""
        smoothing = shard.smoothing(options)
        for part in _chunks(logits):
            z = _capped(logits[part][..., : shard.columns].float(), options)
            target, scale = local_target[part], upstream[part].unsqueeze(-1)
            row_lse = lse[part].unsqueeze(-1)
            gradient = torch.exp(z - row_lse) * (1.0 + 2.0 * options.z_loss * row_lse)
            if smoothing:
                gradient -= smoothing / shard.vocab_size
            own = torch.where(target >= 0, 1.0 - smoothing, 0.0).unsqueeze(-1)
            gradient.scatter_add_(-1, target.clamp(min=0).unsqueeze(-1), -own)
            gradient *= scale
            if options.softcap is not None:
                gradient *= 1.0 - (z / options.softcap).square()
            # 0·NaN is NaN.
            gradient.masked_fill_(scale == 0, 0.0)
            out[part][..., : shard.columns] = gradient
            out[part][..., shard.columns :] = 0


def _capped(z: Tensor, options: CrossEntropyOptions) -> Tensor:
    return z if options.softcap is None else options.softcap * torch.tanh(z / options.softcap)


def _chunks(logits: Tensor) -> list[tuple[slice, slice]]:
    """Indices into `[s, b]` of about CHUNK_ELEMENTS logits each; views, whatever the strides."""
    sequence, batch, columns = logits.shape
    rows = max(1, CHUNK_ELEMENTS // columns)
    if rows < batch:
        return [
            (slice(s, s + 1), slice(b, b + rows))
            for s in range(sequence)
            for b in range(0, batch, rows)
        ]
    step = max(1, rows // batch) if batch else sequence
    return [(slice(s, s + step), slice(0, batch)) for s in range(0, sequence, step)]
