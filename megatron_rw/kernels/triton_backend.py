"""The Triton backend of the cross-entropy.

Forward, a program reads a stretch of a row, keeps a running maximum and sum and notes both; a
second, small kernel joins the stretches and shards and adds up the samples. Backward, a program
reads a block of a row and writes its gradient, in place where the caller says so. No atomics:
results repeat bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_rw.kernels.options import Combined, CrossEntropyOptions, Shard
from megatron_rw.kernels.sums import SampleSums


@dataclass(frozen=True)
class Launch:
    """How the two passes over the logits are cut.

    Attributes:
        forward_block: columns that a program of the forward pass reads at a time.
        forward_blocks: how many of those, one after the other, at most.
        forward_warps: warps of such a program.
        backward_block: columns of a program of the backward pass.
        backward_warps: its warps.
    """

    forward_block: int = 4096
    forward_blocks: int = 2
    forward_warps: int = 8
    backward_block: int = 4096
    backward_warps: int = 8


# Not tuned yet: no GPU has run them. benchmarks/kernels/tune.py tries others.
LAUNCH = Launch()
# Tokens of a sample whose losses one program joins.
COMBINED_TOKENS = 256


@triton.jit
def cap(z, softcap):
    """c·tanh(z/c)."""
    # tanh(x) = 1 − 2/(1 + e^2x), exact at both ends: e^2x is 0 or inf there.
    return softcap * (1.0 - 2.0 / (1.0 + tl.exp(2.0 * z / softcap)))


@triton.jit
def _statistics_kernel(
    logits,
    target,
    out,
    rows,
    batch,
    start,
    columns,
    ignore_index,
    stride_s,
    stride_b,
    stride_v,
    target_stride_s,
    target_stride_b,
    softcap,
    CAPPED: tl.constexpr,
    WITH_SUM: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    # 64 bits: the offset of a row passes 2^31.
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    sequence, sample = row // batch, row % batch
    base = logits + sequence * stride_s + sample * stride_b
    top = -float("inf")
    total = 0.0
    plain = 0.0
    first = part * BLOCK * BLOCKS
    for offset in range(first, tl.minimum(first + BLOCK * BLOCKS, columns), BLOCK):
        offsets = offset + tl.arange(0, BLOCK)
        inside = offsets < columns
        z = tl.load(base + offsets.to(tl.int64) * stride_v, mask=inside, other=0.0).to(tl.float32)
        if CAPPED:
            z = cap(z, softcap)
        if WITH_SUM:
            plain += tl.sum(tl.where(inside, z, 0.0), axis=0)
        z = tl.where(inside, z, -float("inf"))
        new = tl.maximum(top, tl.max(z, axis=0))
        # A row of −inf so far: exp(−inf − 0) is 0, exp(−inf + inf) would be NaN.
        safe = tl.where(new == -float("inf"), 0.0, new)
        total = total * tl.exp(top - safe) + tl.sum(tl.exp(z - safe), axis=0)
        top = new
    label = tl.load(target + sequence * target_stride_s + sample * target_stride_b)
    column = label - start
    own = 0.0
    if (part == 0) & (column >= 0) & (column < columns) & (label != ignore_index):
        own = tl.load(base + column * stride_v).to(tl.float32)
        if CAPPED:
            own = cap(own, softcap)
    place = out + part.to(tl.int64) * (4 if WITH_SUM else 3) * rows + row
    tl.store(place, top)
    tl.store(place + rows, total)
    tl.store(place + 2 * rows, own)
    if WITH_SUM:
        tl.store(place + 3 * rows, plain)


@triton.jit
def _join(tables, offsets, inside, rows, parts, WITH_SUM: tl.constexpr, TOKENS: tl.constexpr):
    """Largest logit, Σ exp(z − m), the target's logit and Σ z of tokens, from all parts."""
    step = (4 if WITH_SUM else 3) * rows
    top = tl.full([TOKENS], -float("inf"), tl.float32)
    for part in range(parts):
        here = tables + part * step + offsets
        top = tl.maximum(top, tl.load(here, mask=inside, other=-float("inf")))
    base = tl.where(top == -float("inf"), 0.0, top)
    total = tl.zeros([TOKENS], tl.float32)
    own = tl.zeros([TOKENS], tl.float32)
    plain = tl.zeros([TOKENS], tl.float32)
    for part in range(parts):
        here = tables + part * step + offsets
        part_top = tl.load(here, mask=inside, other=-float("inf"))
        total += tl.load(here + rows, mask=inside, other=0.0) * tl.exp(part_top - base)
        own += tl.load(here + 2 * rows, mask=inside, other=0.0)
        if WITH_SUM:
            plain += tl.load(here + 3 * rows, mask=inside, other=0.0)
    return top, base, total, own, plain


@triton.jit
def _merge_kernel(tables, out, rows, parts, WITH_SUM: tl.constexpr, TOKENS: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    inside = offsets < rows
    top, _, total, own, plain = _join(tables, offsets, inside, rows, parts, WITH_SUM, TOKENS)
    tl.store(out + offsets, top, mask=inside)
    tl.store(out + rows + offsets, total, mask=inside)
    tl.store(out + 2 * rows + offsets, own, mask=inside)
    if WITH_SUM:
        tl.store(out + 3 * rows + offsets, plain, mask=inside)


@triton.jit
def _combine_kernel(
    tables,
    target,
    loss_mask,
    losses,
    lses,
    sums,
    rows,
    parts,
    sequence,
    batch,
    vocab_size,
    ignore_index,
    target_stride_s,
    target_stride_b,
    mask_stride_s,
    mask_stride_b,
    z_loss,
    smoothing,
    WITH_SUM: tl.constexpr,
    MASKED: tl.constexpr,
    TOKENS: tl.constexpr,
):
    block, sample = tl.program_id(0), tl.program_id(1)
    position = (block * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    inside = position < sequence
    offsets = position * batch + sample
    _, base, total, own, plain = _join(tables, offsets, inside, rows, parts, WITH_SUM, TOKENS)
    log_total = tl.log(total)
    lse = base + log_total
    # Not lse − z_y: a common offset of the logits would cost both their digits.
    loss = log_total + (base - own) + z_loss * lse * lse
    if WITH_SUM:
        loss += smoothing * (own - plain / vocab_size)
    label = tl.load(
        target + position * target_stride_s + sample * target_stride_b,
        mask=inside,
        other=ignore_index,
    )
    # A label beyond the vocabulary would pass as a loss without a target.
    loss = tl.where((label >= 0) & (label < vocab_size), loss, float("nan"))
    loss = tl.where(label == ignore_index, 0.0, loss)
    tl.store(losses + offsets, loss, mask=inside)
    tl.store(lses + offsets, lse, mask=inside)
    if MASKED:
        mask = tl.load(
            loss_mask + position * mask_stride_s + sample * mask_stride_b, mask=inside, other=0.0
        ).to(tl.float32)
        # 0·NaN is NaN.
        counted = tl.where(mask > 0, loss * mask, 0.0)
        # `[2, blocks, batch]`
        place = sums + block * batch + sample
        tl.store(place, tl.sum(counted, axis=0))
        tl.store(place + tl.num_programs(0) * batch, tl.sum(mask, axis=0))


@triton.jit
def _gradient_kernel(
    logits,
    target,
    lse,
    upstream,
    out,
    batch,
    start,
    columns,
    width,
    ignore_index,
    stride_s,
    stride_b,
    stride_v,
    target_stride_s,
    target_stride_b,
    upstream_stride_s,
    upstream_stride_b,
    out_stride_s,
    out_stride_b,
    out_stride_v,
    softcap,
    z_loss,
    smoothing,
    uniform,
    CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    sequence, sample = row // batch, row % batch
    offsets = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    within = offsets < width
    wide = offsets.to(tl.int64)
    place = out + sequence * out_stride_s + sample * out_stride_b + wide * out_stride_v
    scale = tl.load(upstream + sequence * upstream_stride_s + sample * upstream_stride_b)
    label = tl.load(target + sequence * target_stride_s + sample * target_stride_b)
    if (scale == 0.0) | (label == ignore_index):
        # Literal zeros: 0·NaN is NaN. The logits need not even be read.
        tl.store(place, tl.zeros([BLOCK], dtype=out.dtype.element_ty), mask=within)
        return
    inside = offsets < columns
    source = logits + sequence * stride_s + sample * stride_b + wide * stride_v
    z = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    if CAPPED:
        z = cap(z, softcap)
    row_lse = tl.load(lse + row)
    gradient = tl.exp(z - row_lse) * (1.0 + 2.0 * z_loss * row_lse) - uniform
    # The target joins in fp32, before the one rounding: p − 1 cancels as p nears 1.
    gradient -= tl.where(wide == label - start, 1.0 - smoothing, 0.0)
    gradient *= scale
    if CAPPED:
        gradient *= 1.0 - (z / softcap) * (z / softcap)
    gradient = tl.where(inside, gradient, 0.0)
    tl.store(place, gradient.to(out.dtype.element_ty), mask=within)


class TritonBackend:
    """Runs on a GPU, or on the CPU under Triton's interpreter (TRITON_INTERPRET=1).

    Args:
        launch: how the passes are cut; the default when None.
    """

    def __init__(self, launch: Launch | None = None) -> None:
        self._launch = launch or LAUNCH

    def statistics(
        self, logits: Tensor, target: Tensor, shard: Shard, options: CrossEntropyOptions
    ) -> Tensor:
        """See `CrossEntropyBackend`."""
        sequence, batch, _ = logits.shape
        rows = sequence * batch
        block = _block(shard.columns, self._launch.forward_block)
        blocks = min(self._launch.forward_blocks, triton.cdiv(shard.columns, block))
        parts = triton.cdiv(shard.columns, block * blocks)
        smoothed = options.label_smoothing > 0
        tables = logits.new_empty(parts, 4 if smoothed else 3, sequence, batch, dtype=torch.float32)
        _statistics_kernel[(rows, parts)](
            logits,
            target,
            tables,
            rows,
            batch,
            shard.start,
            shard.columns,
            options.ignore_index,
            *logits.stride(),
            *target.stride(),
            options.softcap or 1.0,
            CAPPED=options.softcap is not None,
            WITH_SUM=smoothed,
            BLOCK=block,
            BLOCKS=blocks,
            num_warps=self._launch.forward_warps,
        )
        return tables

    def merge(self, tables: Tensor) -> Tensor:
        """See `CrossEntropyBackend`."""
        parts, statistics, sequence, batch = tables.shape
        if parts == 1:
            return tables
        rows = sequence * batch
        merged = torch.empty_like(tables[:1])
        _merge_kernel[(triton.cdiv(rows, COMBINED_TOKENS),)](
            tables, merged, rows, parts, WITH_SUM=statistics == 4, TOKENS=COMBINED_TOKENS
        )
        return merged

    def combine(
        self,
        tables: Tensor,
        target: Tensor,
        shard: Shard,
        options: CrossEntropyOptions,
        loss_mask: Tensor | None,
    ) -> Combined:
        """See `CrossEntropyBackend`."""
        parts, statistics, sequence, batch = tables.shape
        losses = tables.new_empty(sequence, batch)
        lse = torch.empty_like(losses)
        blocks = triton.cdiv(sequence, COMBINED_TOKENS)
        mask = losses if loss_mask is None else loss_mask
        sums = tables.new_empty(2, blocks, batch)
        _combine_kernel[(blocks, batch)](
            tables,
            target,
            mask,
            losses,
            lse,
            sums,
            sequence * batch,
            parts,
            sequence,
            batch,
            shard.vocab_size,
            options.ignore_index,
            *target.stride(),
            *mask.stride(),
            options.z_loss,
            shard.smoothing(options),
            WITH_SUM=statistics == 4,
            MASKED=loss_mask is not None,
            TOKENS=COMBINED_TOKENS,
        )
        # Few partial sums, in a fixed order.
        by_sample = None if loss_mask is None else SampleSums(*sums.sum(dim=1).unbind())
        return Combined(losses, lse, by_sample)

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
        sequence, batch, width = logits.shape
        block = _block(width, self._launch.backward_block)
        smoothing = shard.smoothing(options)
        _gradient_kernel[(sequence * batch, triton.cdiv(width, block))](
            logits,
            target,
            lse,
            upstream,
            out,
            batch,
            shard.start,
            shard.columns,
            width,
            options.ignore_index,
            *logits.stride(),
            *target.stride(),
            *upstream.stride(),
            *out.stride(),
            options.softcap or 1.0,
            options.z_loss,
            smoothing,
            smoothing / shard.vocab_size,
            CAPPED=options.softcap is not None,
            BLOCK=block,
            num_warps=self._launch.backward_warps,
        )


def _block(columns: int, largest: int) -> int:
    return min(largest, triton.next_power_of_2(columns))
