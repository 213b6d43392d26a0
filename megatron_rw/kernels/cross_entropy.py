"""Cross-entropy over a vocabulary that tensor parallelism cuts, differentiable per token.

    z' = c·tanh(z/c)                                   with a soft-cap c, else z
    lse = log Σ_v exp(z'_v)                            over the whole vocabulary
    ce  = lse − (1−ε')·z'_y − (ε'/V)·Σ_v z'_v + ζ·lse²   ε' = ε·V/(V−1)
    ∂ce/∂z_v = ((1 + 2ζ·lse)·p_v − (1−ε')·[v=y] − ε'/V)·(1 − (z'_v/c)²)

Forward reads the logits once and keeps the log-sum-exp per token. One all-gather of 12 bytes a
token (16 with label smoothing) over the tensor-parallel group joins the shards. Backward reads the
logits again and by default overwrites them with their gradient.
"""

from __future__ import annotations

import functools
import os
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rw.kernels.options import (
    MAX,
    SUM,
    SUM_EXP,
    TARGET,
    CrossEntropyBackend,
    CrossEntropyOptions,
    Shard,
)

BackendName = Literal["torch", "triton"]
BACKEND_VARIABLE = "MEGATRON_RW_KERNELS"


@functools.cache
def backend(name: BackendName) -> CrossEntropyBackend:
    """The backend of that name; imports what it needs."""
    if name == "triton":
        from megatron_rw.kernels.triton_backend import TritonBackend

        return TritonBackend()
    from megatron_rw.kernels.torch_backend import TorchBackend

    return TorchBackend()


def default_backend(device: torch.device) -> BackendName:
    """`MEGATRON_RW_KERNELS` where it is set; otherwise Triton on a GPU and torch elsewhere.

    Raises:
        ValueError: the variable names no backend.
    """
    named = os.environ.get(BACKEND_VARIABLE)
    if named is None:
        return "triton" if device.type == "cuda" else "torch"
    if named not in get_args(BackendName):
        choices = ", ".join(get_args(BackendName))
        raise ValueError(f"{BACKEND_VARIABLE}={named}: choose one of {choices}, or unset it")
    return named  # type: ignore[return-value]


def vocab_parallel_cross_entropy(
    logits: Tensor,
    target: Tensor,
    tp_group: dist.ProcessGroup | None = None,
    options: CrossEntropyOptions | None = None,
    *,
    inplace_backward: bool = True,
    backend_name: BackendName | None = None,
) -> Tensor:
    """Cross-entropy of every token, in nats.

    Args:
        logits: `[s, b, V/tp]` fp32, bf16 or fp16, any strides; this rank's columns.
        target: `[s, b]` int64, labels in the whole vocabulary, or `options.ignore_index`.
        tp_group: the ranks that hold the vocabulary's columns, in order; None for one.
        options: the variant. The plain one when None.
        inplace_backward: write the gradient over the logits. They must not be read afterwards:
            autograd raises if it would, and a second backward pass raises.
        backend_name: see `default_backend` when None.

    Returns:
        `[s, b]` fp32. 0 where the label is `ignore_index`, NaN where it is outside the vocabulary.

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    if logits.dim() != 3 or target.shape != logits.shape[:2]:
        raise ValueError(
            f"logits must be [s, b, v] and target [s, b], not {tuple(logits.shape)} and "
            f"{tuple(target.shape)}"
        )
    if logits.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"logits must be float32, bfloat16 or float16, not {logits.dtype}")
    options = options or CrossEntropyOptions()
    passes = backend(backend_name or default_backend(logits.device))
    shard = _shard(logits.shape[-1], tp_group, options)
    result: Tensor = _CrossEntropy.apply(
        logits, target, tp_group, shard, options, inplace_backward, passes
    )
    return result


def _shard(width: int, group: dist.ProcessGroup | None, options: CrossEntropyOptions) -> Shard:
    rank, size = (0, 1) if group is None else (group.rank(), group.size())
    vocab_size = width * size if options.vocab_size is None else options.vocab_size
    if not width * (size - 1) < vocab_size <= width * size:
        raise ValueError(
            f"vocab_size {vocab_size} does not fit {size} shard(s) of {width} columns: every shard "
            "must hold at least one column that takes part"
        )
    return Shard(rank * width, min(width, vocab_size - rank * width), vocab_size)


def combine(tables: Tensor) -> tuple[Tensor, Tensor]:
    """Join the statistics of all shards.

    Args:
        tables: `[tp, rows, s, b]` fp32, see `CrossEntropyBackend.statistics`.

    Returns:
        `(lse, joined)`: `[s, b]`, and `[rows, s, b]` of which TARGET and SUM are meaningful.
    """
    top = tables[:, MAX].amax(dim=0)
    base = top.masked_fill(top == -torch.inf, 0.0)
    total = (tables[:, SUM_EXP] * torch.exp(tables[:, MAX] - base)).sum(dim=0)
    return base + torch.log(total), tables.sum(dim=0)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        tp_group: dist.ProcessGroup | None,
        shard: Shard,
        options: CrossEntropyOptions,
        inplace_backward: bool,
        passes: CrossEntropyBackend,
    ) -> Tensor:
        counted = target != options.ignore_index
        here = counted & (target >= shard.start) & (target < shard.start + shard.columns)
        local_target = torch.where(here, target - shard.start, -1)
        table = passes.statistics(logits, local_target, shard, options)
        tables = table.unsqueeze(0)
        if tp_group is not None and tp_group.size() > 1:
            size = tp_group.size()
            gathered = table.new_empty(size * table.shape[0], *table.shape[1:])
            dist.all_gather_into_tensor(gathered, table, group=tp_group)
            tables = gathered.view(size, *table.shape)
        lse, joined = combine(tables)
        smoothing = shard.smoothing(options)
        loss = lse - (1.0 - smoothing) * joined[TARGET]
        if smoothing:
            loss = loss - (smoothing / shard.vocab_size) * joined[SUM]
        if options.z_loss:
            loss = loss + options.z_loss * lse.square()
        # Saved as an input, the logits carry their version: whoever changed them in between is
        # found out when the backward pass asks for them.
        ctx.save_for_backward(logits, local_target, lse, counted)
        ctx.shard, ctx.options = shard, options
        ctx.inplace, ctx.passes = inplace_backward, passes
        # A label beyond the vocabulary would pass as a loss without a target.
        known = (target >= 0) & (target < shard.vocab_size)
        return torch.where(counted, torch.where(known, loss, torch.nan), 0.0)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        logits, local_target, lse, counted = ctx.saved_tensors
        out = logits if ctx.inplace else torch.empty_like(logits)
        # A gradient may come expanded or transposed; ignored tokens may even come with NaN.
        scale = torch.where(counted, upstream.float(), 0.0).contiguous()
        with torch.no_grad():
            ctx.passes.gradient(
                logits.detach(), local_target, lse, scale, ctx.shard, ctx.options, out.detach()
            )
        if ctx.inplace:
            # Kernels write behind autograd's back: whoever still wants the logits must be told.
            torch.autograd.graph.increment_version(logits)
        return out.detach(), None, None, None, None, None, None
