"""The Triton backend: one program a row forward, one a tile of a row backward.

Forward reads each logit once and keeps a running maximum and sum; backward reads it once and writes
its gradient, in place where the caller says so. No atomics: results repeat bit for bit.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor, float32

from megatron_rw.kernels.options import CrossEntropyOptions, Shard

# Not tuned yet: no GPU has run them.
FORWARD_BLOCK, BACKWARD_BLOCK = 4096, 4096
FORWARD_WARPS, BACKWARD_WARPS = 8, 8


@triton.jit
def _cap(z, softcap):
    # tanh(x) = 1 − 2/(1 + e^2x), exact at both ends: e^2x is 0 or inf there.
    return softcap * (1.0 - 2.0 / (1.0 + tl.exp(2.0 * z / softcap)))


@triton.jit
def _statistics_kernel(
    logits,
    target,
    out,
    rows,
    batch,
    columns,
    stride_s,
    stride_b,
    stride_v,
    softcap,
    CAPPED: tl.constexpr,
    WITH_SUM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # 64 bits: the offset of a row passes 2^31.
    row = tl.program_id(0).to(tl.int64)
    base = logits + (row // batch) * stride_s + (row % batch) * stride_b
    top = -float("inf")
    total = 0.0
    plain = 0.0
    for start in range(0, columns, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        inside = offsets < columns
        z = tl.load(base + offsets.to(tl.int64) * stride_v, mask=inside, other=0.0).to(tl.float32)
        if CAPPED:
            z = _cap(z, softcap)
        if WITH_SUM:
            plain += tl.sum(tl.where(inside, z, 0.0), axis=0)
        z = tl.where(inside, z, -float("inf"))
        new = tl.maximum(top, tl.max(z, axis=0))
        # A row of −inf so far: exp(−inf − 0) is 0, exp(−inf + inf) would be NaN.
        safe = tl.where(new == -float("inf"), 0.0, new)
        total = total * tl.exp(top - safe) + tl.sum(tl.exp(z - safe), axis=0)
        top = new
    label = tl.load(target + row)
    own = 0.0
    if label >= 0:
        own = tl.load(base + label * stride_v).to(tl.float32)
        if CAPPED:
            own = _cap(own, softcap)
    tl.store(out + row, top)
    tl.store(out + rows + row, total)
    tl.store(out + 2 * rows + row, own)
    if WITH_SUM:
        tl.store(out + 3 * rows + row, plain)


@triton.jit
def _gradient_kernel(
    logits,
    target,
    lse,
    upstream,
    out,
    batch,
    columns,
    width,
    stride_s,
    stride_b,
    stride_v,
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
    scale = tl.load(upstream + row)
    if scale == 0.0:
        # Literal zeros: 0·NaN is NaN. The logits need not even be read.
        tl.store(place, tl.zeros([BLOCK], dtype=out.dtype.element_ty), mask=within)
        return
    inside = offsets < columns
    source = logits + sequence * stride_s + sample * stride_b + wide * stride_v
    z = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    if CAPPED:
        z = _cap(z, softcap)
    row_lse = tl.load(lse + row)
    gradient = tl.exp(z - row_lse) * (1.0 + 2.0 * z_loss * row_lse) - uniform
    # The target joins in fp32, before the one rounding: p − 1 cancels as p nears 1.
    gradient -= tl.where(offsets == tl.load(target + row), 1.0 - smoothing, 0.0)
    gradient *= scale
    if CAPPED:
        gradient *= 1.0 - (z / softcap) * (z / softcap)
    gradient = tl.where(inside, gradient, 0.0)
    tl.store(place, gradient.to(out.dtype.element_ty), mask=within)


class TritonBackend:
    """Runs on a GPU, or on the CPU under Triton's interpreter (TRITON_INTERPRET=1)."""

    def statistics(
        self, logits: Tensor, local_target: Tensor, shard: Shard, options: CrossEntropyOptions
    ) -> Tensor:
        """See `CrossEntropyBackend`."""
        sequence, batch, _ = logits.shape
        rows = sequence * batch
        smoothed = options.label_smoothing > 0
        table = logits.new_empty(4 if smoothed else 3, sequence, batch, dtype=float32)
        if rows:
            _statistics_kernel[(rows,)](
                logits,
                local_target.contiguous(),
                table,
                rows,
                batch,
                shard.columns,
                *logits.stride(),
                options.softcap or 1.0,
                CAPPED=options.softcap is not None,
                WITH_SUM=smoothed,
                BLOCK=_block(shard.columns, FORWARD_BLOCK),
                num_warps=FORWARD_WARPS,
            )
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
        sequence, batch, width = logits.shape
        rows = sequence * batch
        if rows == 0:
            return
        block = _block(width, BACKWARD_BLOCK)
        smoothing = shard.smoothing(options)
        _gradient_kernel[(rows, triton.cdiv(width, block))](
            logits,
            local_target.contiguous(),
            lse.contiguous(),
            upstream,
            out,
            batch,
            shard.columns,
            width,
            *logits.stride(),
            *out.stride(),
            options.softcap or 1.0,
            options.z_loss,
            smoothing,
            smoothing / shard.vocab_size,
            CAPPED=options.softcap is not None,
            BLOCK=block,
            num_warps=BACKWARD_WARPS,
        )


def _block(columns: int, largest: int) -> int:
    return min(largest, triton.next_power_of_2(columns))
