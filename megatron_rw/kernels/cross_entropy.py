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

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rw.kernels import compiled
from megatron_rw.kernels.options import (
    CrossEntropyBackend,
    CrossEntropyOptions,
    Shard,
)
from megatron_rw.kernels.passes import backend, forward, upstream_of
from megatron_rw.kernels.selection import BackendName, default_backend
from megatron_rw.kernels.sums import SampleSums


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
            autograd raises if it would, and a second backward pass raises. Not done in a graph of
            `torch.compile`.
        backend_name: see `default_backend` when None.

    Returns:
        `[s, b]` fp32. 0 where the label is `ignore_index`, NaN where it is outside the vocabulary.

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    losses, _ = _cross_entropy(
        logits, target, None, tp_group, options, inplace_backward, backend_name
    )
    return losses


def vocab_parallel_cross_entropy_sums(
    logits: Tensor,
    target: Tensor,
    loss_mask: Tensor,
    tp_group: dist.ProcessGroup | None = None,
    options: CrossEntropyOptions | None = None,
    *,
    inplace_backward: bool = True,
    backend_name: BackendName | None = None,
) -> tuple[Tensor, SampleSums]:
    """Cross-entropy of every token and each sample's sums of it, without another pass over either.

    Args:
        logits: as for `vocab_parallel_cross_entropy`, as is every argument but one.
        target: as there.
        loss_mask: `[s, b]`, 1 where a token counts. One that is masked adds nothing to the sums
            even if its loss is not finite.
        tp_group: as there.
        options: as there.
        inplace_backward: as there.
        backend_name: as there.

    Returns:
        `(losses, sums)`, both with gradient: losses as there, sums as `[b]` each.

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    return _cross_entropy(
        logits, target, loss_mask, tp_group, options, inplace_backward, backend_name
    )


def _cross_entropy(
    logits: Tensor,
    target: Tensor,
    loss_mask: Tensor | None,
    tp_group: dist.ProcessGroup | None,
    options: CrossEntropyOptions | None,
    inplace_backward: bool,
    backend_name: BackendName | None,
) -> tuple[Tensor, SampleSums]:
    _check(logits, target, loss_mask)
    options = options or CrossEntropyOptions()
    shard = shard_of(logits.shape[-1], tp_group, options)
    name = backend_name or default_backend(logits.device)
    if torch.compiler.is_compiling():
        losses, loss_sum, tokens = compiled.cross_entropy(
            logits, target, loss_mask, tp_group, shard, options, name
        )
    else:
        losses, loss_sum, tokens = _CrossEntropy.apply(
            logits, target, loss_mask, tp_group, shard, options, inplace_backward, backend(name)
        )
    return losses, SampleSums(loss_sum, tokens)


def _check(logits: Tensor, target: Tensor, loss_mask: Tensor | None) -> None:
    if logits.dim() != 3 or target.shape != logits.shape[:2]:
        raise ValueError(
            f"logits must be [s, b, v] and target [s, b], not {tuple(logits.shape)} and "
            f"{tuple(target.shape)}"
        )
    if logits.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"logits must be float32, bfloat16 or float16, not {logits.dtype}")
    if logits.numel() == 0:
        raise ValueError(f"logits of shape {tuple(logits.shape)} have no elements")
    if loss_mask is not None and loss_mask.shape != target.shape:
        raise ValueError(
            f"loss_mask must be [s, b] as the target, {tuple(target.shape)}, not "
            f"{tuple(loss_mask.shape)}"
        )


def shard_of(width: int, group: dist.ProcessGroup | None, options: CrossEntropyOptions) -> Shard:
    """This rank's part of the vocabulary.

    Args:
        width: columns of every rank, padding included.
        group: the tensor-parallel ranks; None for one.
        options: says which columns take part.

    Raises:
        ValueError: a rank would have none.
    """
    rank, size = (0, 1) if group is None else (group.rank(), group.size())
    vocab_size = width * size if options.vocab_size is None else options.vocab_size
    if not width * (size - 1) < vocab_size <= width * size:
        raise ValueError(
            f"vocab_size {vocab_size} does not fit {size} shard(s) of {width} columns: every shard "
            "must hold at least one column that takes part"
        )
    return Shard(rank * width, min(width, vocab_size - rank * width), vocab_size)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        loss_mask: Tensor | None,
        tp_group: dist.ProcessGroup | None,
        shard: Shard,
        options: CrossEntropyOptions,
        inplace_backward: bool,
        passes: CrossEntropyBackend,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        losses, lse, sums = forward(logits, target, loss_mask, tp_group, shard, options, passes)
        # Saved as an input, the logits carry their version: whoever changed them in between is
        # found out when the backward pass asks for them.
        ctx.save_for_backward(logits, target, loss_mask, lse)
        ctx.shard, ctx.options = shard, options
        ctx.inplace, ctx.passes = inplace_backward, passes
        ctx.set_materialize_grads(False)
        if sums is None:
            return losses, None, None
        ctx.mark_non_differentiable(sums.tokens)
        return losses, sums.loss_sum, sums.tokens

    @staticmethod
    def backward(
        ctx: Any, of_losses: Tensor | None, of_sums: Tensor | None, of_tokens: Tensor | None
    ) -> Any:
        logits, target, loss_mask, lse = ctx.saved_tensors
        upstream = upstream_of(of_losses, of_sums, loss_mask)
        if upstream is None:
            return (None,) * 8
        out = logits if ctx.inplace else torch.empty_like(logits)
        with torch.no_grad():
            ctx.passes.gradient(
                logits.detach(), target, lse, upstream, ctx.shard, ctx.options, out.detach()
            )
        if ctx.inplace:
            # Kernels write behind autograd's back: whoever still wants the logits must be told.
            torch.autograd.graph.increment_version(logits)
        return out.detach(), *(None,) * 7
