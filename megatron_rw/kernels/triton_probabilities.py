"""The Triton backend of the fused output layer's row passes.

`probabilities`: a program a row reads it twice, the second time from the L2 cache as far as that
holds it, and writes it once: 4 bytes a bf16 logit. `subtract_targets`: a program a row changes one
element. `scale_rows`: one read and one write of a matrix of the hidden states' size. No atomics:
results repeat bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_rw.kernels.options import CrossEntropyOptions, Shard
from megatron_rw.kernels.probabilities import largest_ratio
from megatron_rw.kernels.triton_backend import cap


@dataclass(frozen=True)
class ProbabilityLaunch:
    """How the pass over the logits is cut.

    Attributes:
        block: columns that a program reads at a time.
        warps: of such a program.
    """

    block: int = 8192
    warps: int = 16


# Not tuned yet: no GPU has run them. benchmarks/kernels/tune.py tries others.
LAUNCH = ProbabilityLaunch()
_SCALED_BLOCK = 2048


@triton.jit
def _probabilities_kernel(
    logits,
    target,
    table,
    rows,
    batch,
    start,
    columns,
    width,
    ignore_index,
    target_stride_s,
    target_stride_b,
    softcap,
    CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # 64 bits: the offset of a row passes 2^31.
    row = tl.program_id(0).to(tl.int64)
    sequence, sample = row // batch, row % batch
    base = logits + row * width
    label = tl.load(target + sequence * target_stride_s + sample * target_stride_b)
    top = -float("inf")
    total = 0.0
    own = 0.0
    ignored = label == ignore_index
    # An ignored row need not be read.
    read = tl.where(ignored, 0, columns)
    column = label - start
    # Before anything is written.
    if (column >= 0) & (column < read):
        own = tl.load(base + column).to(tl.float32)
        if CAPPED:
            own = cap(own, softcap)
    for offset in range(0, read, BLOCK):
        offsets = offset + tl.arange(0, BLOCK)
        inside = offsets < columns
        z = tl.load(base + offsets, mask=inside, other=0.0, eviction_policy="evict_last")
        z = z.to(tl.float32)
        if CAPPED:
            z = cap(z, softcap)
        z = tl.where(inside, z, -float("inf"))
        new = tl.maximum(top, tl.max(z, axis=0))
        # A row of −inf so far: exp(−inf − 0) is 0, exp(−inf + inf) would be NaN.
        safe = tl.where(new == -float("inf"), 0.0, new)
        total = total * tl.exp(top - safe) + tl.sum(tl.exp(z - safe), axis=0)
        top = new
    within = tl.where(top == -float("inf"), 0.0, top) + tl.log(total)
    for offset in range(0, width, BLOCK):
        offsets = offset + tl.arange(0, BLOCK)
        inside = offsets < read
        z = tl.load(base + offsets, mask=inside, other=0.0, eviction_policy="evict_first")
        z = z.to(tl.float32)
        if CAPPED:
            z = cap(z, softcap)
        q = tl.exp(z - within)
        if CAPPED:
            q *= 1.0 - (z / softcap) * (z / softcap)
        q = tl.where(inside, q, 0.0)
        tl.store(base + offsets, q.to(logits.dtype.element_ty), mask=offsets < width)
    tl.store(table + row, top)
    tl.store(table + rows + row, total)
    tl.store(table + 2 * rows + row, own)


@triton.jit
def _subtract_targets_kernel(
    probabilities,
    table,
    target,
    lse,
    scale,
    rows,
    batch,
    start,
    columns,
    width,
    ignore_index,
    target_stride_s,
    target_stride_b,
    softcap,
    z_loss,
    largest,
    CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    sequence, sample = row // batch, row % batch
    label = tl.load(target + sequence * target_stride_s + sample * target_stride_b)
    if label == ignore_index:
        tl.store(scale + row, 0.0)
        return
    top = tl.load(table + row)
    total = tl.load(table + rows + row)
    own = tl.load(table + 2 * rows + row)
    row_lse = tl.load(lse + row)
    within = tl.where(top == -float("inf"), 0.0, top) + tl.log(total)
    ratio = tl.exp(row_lse - within) / (1.0 + 2.0 * z_loss * row_lse)
    kept = tl.abs(ratio) <= largest
    value = tl.where(kept, tl.exp(own - within) - ratio, -1.0)
    if CAPPED:
        value *= 1.0 - (own / softcap) * (own / softcap)
    base = probabilities + row * width
    column = label - start
    column = tl.where((column >= 0) & (column < columns), column, -1)
    if kept:
        if column >= 0:
            tl.store(base + column, value.to(probabilities.dtype.element_ty))
    else:
        for offset in range(0, width, BLOCK):
            offsets = offset + tl.arange(0, BLOCK)
            q = tl.where(offsets == column, value, 0.0)
            tl.store(base + offsets, q.to(probabilities.dtype.element_ty), mask=offsets < width)
    factor = tl.where(kept, 1.0 / ratio, 1.0)
    finite = (row_lse > -float("inf")) & (row_lse < float("inf"))
    tl.store(scale + row, tl.where(finite, factor, float("nan")))


@triton.jit
def _scale_rows_kernel(matrix, scale, out, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < width
    factor = tl.load(scale + row)
    # Literal zeros: 0·NaN is NaN. The row need not even be read.
    read = tl.where(factor == 0.0, 0, width)
    value = tl.load(matrix + row * width + offsets, mask=offsets < read, other=0.0)
    value = value.to(tl.float32) * factor
    tl.store(out + row * width + offsets, value.to(out.dtype.element_ty), mask=inside)


class TritonProbabilities:
    """Runs on a GPU, or on the CPU under Triton's interpreter (TRITON_INTERPRET=1).

    Args:
        launch: how the pass over the logits is cut; the default when None.
    """

    def __init__(self, launch: ProbabilityLaunch | None = None) -> None:
        self._launch = launch or LAUNCH

    def probabilities(
        self, logits: Tensor, target: Tensor, shard: Shard, options: CrossEntropyOptions
    ) -> Tensor:
        """See `ProbabilityBackend`."""
        sequence, batch, width = logits.shape
        table = logits.new_empty(1, 3, sequence, batch, dtype=torch.float32)
        _probabilities_kernel[(sequence * batch,)](
            logits,
            target,
            table,
            sequence * batch,
            batch,
            shard.start,
            shard.columns,
            width,
            options.ignore_index,
            *target.stride(),
            options.softcap or 1.0,
            CAPPED=options.softcap is not None,
            BLOCK=min(self._launch.block, triton.next_power_of_2(width)),
            num_warps=self._launch.warps,
        )
        return table

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
        sequence, batch, width = probabilities.shape
        scale = torch.empty_like(lse)
        _subtract_targets_kernel[(sequence * batch,)](
            probabilities,
            table,
            target,
            lse,
            scale,
            sequence * batch,
            batch,
            shard.start,
            shard.columns,
            width,
            options.ignore_index,
            *target.stride(),
            options.softcap or 1.0,
            options.z_loss,
            largest_ratio(probabilities.dtype),
            CAPPED=options.softcap is not None,
            BLOCK=min(1024, triton.next_power_of_2(width)),
            num_warps=1,
        )
        return scale

    def scale_rows(self, matrix: Tensor, scale: Tensor, out: Tensor) -> None:
        """See `ProbabilityBackend`."""
        rows, width = matrix.shape
        block = min(_SCALED_BLOCK, triton.next_power_of_2(width))
        _scale_rows_kernel[(rows, triton.cdiv(width, block))](
            matrix, scale, out, width, BLOCK=block
        )
