"""Cross-entropy over a vocabulary that tensor parallelism cuts, differentiable per token.

    lse = log Σ_v exp(z_v)      over the whole vocabulary
    ce  = lse − z_y             ∂ce/∂z_v = p_v − [v=y]
    H   = lse − Σ_v p_v·z_v     the prediction's entropy, where asked for

Forward reads the logits once and keeps the log-sum-exp per token. One all-gather of 12 bytes a
token (16 with the entropy) over the tensor-parallel group joins the shards. Backward reads the
logits again and by default overwrites them with their gradient.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_rw.kernels.options import Backend, Combined, CrossEntropyOptions, Shard
from megatron_rw.kernels.selection import BackendName, backend, default_backend
from megatron_rw.kernels.sums import SampleSums

LOGIT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class CrossEntropy(NamedTuple):
    """What a cross-entropy returns.

    Attributes:
        losses: `[s, b]` fp32 (fp64 for fp64), nats, with gradient. 0 where the label is
            `ignore_index`, NaN where it is outside the vocabulary.
        sums: of each sample's losses and mask, `[b]` each, the losses' with gradient; None without
            a mask. A masked token adds nothing even if its loss is not finite.
        entropy: `[s, b]`, same dtype, nats, without gradient; None unless `options.entropy`.
    """

    losses: Tensor
    sums: SampleSums | None
    entropy: Tensor | None


# A compiler must not move the collectives, nor the writes over the logits.
@torch.compiler.disable
def vocab_parallel_cross_entropy(
    logits: Tensor,
    target: Tensor,
    tp_group: dist.ProcessGroup | None = None,
    options: CrossEntropyOptions | None = None,
    *,
    loss_mask: Tensor | None = None,
    inplace_backward: bool = True,
    backend_name: BackendName | None = None,
) -> CrossEntropy:
    """Cross-entropy of every token, and each sample's sums of it, in one pass over the logits.

    Autocast has no effect. `torch.compile` breaks its graph around it.

    Args:
        logits: `[s, b, V/tp]` fp32, bf16, fp16 or, in torch, fp64, any strides; this rank's
            columns.
        target: `[s, b]` integers, labels in the whole vocabulary, or `options.ignore_index`.
        tp_group: the ranks that hold the vocabulary's columns, in order; None for one.
        options: the variant. The plain one when None.
        loss_mask: `[s, b]`, 1 where a token counts in its sample's sums. No sums when None.
        inplace_backward: write the gradient over the logits. They must not be read afterwards:
            autograd raises if it would, and a second backward pass raises. Logits that share
            memory among themselves, as expanded ones do, are left alone.
        backend_name: see `default_backend` when None.

    Raises:
        ValueError: a shape, dtype or device does not fit.
    """
    if logits.dim() != 3 or logits.shape[:2] != target.shape:
        raise ValueError(
            f"logits must be [s, b, v] and target [s, b], not {tuple(logits.shape)} and "
            f"{tuple(target.shape)}"
        )
    check_dtype("logits", logits)
    target, loss_mask = check_labels(target, loss_mask, logits)
    options = options or CrossEntropyOptions()
    shard = shard_of(logits.shape[-1], tp_group, options)
    passes = backend(backend_name or default_backend(logits.device, logits.dtype))
    inplace = inplace_backward and not _overlaps(logits)
    return collected(
        _CrossEntropy.apply(logits, target, loss_mask, tp_group, shard, options, inplace, passes)
    )


def check_dtype(name: str, tensor: Tensor) -> None:
    """Refuse what is not of a dtype of logits, or empty.

    Raises:
        ValueError: it is.
    """
    if tensor.dtype not in LOGIT_DTYPES:
        raise ValueError(
            f"{name} must be float32, bfloat16, float16 or float64, not {tensor.dtype}"
        )
    if tensor.numel() == 0:
        raise ValueError(f"{name} of shape {tuple(tensor.shape)} has no elements")


def check_labels(
    target: Tensor, loss_mask: Tensor | None, source: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Labels as int64, and the mask in the dtype of the losses.

    Args:
        target: `[s, b]`.
        loss_mask: `[s, b]`.
        source: what the losses are made from.

    Raises:
        ValueError: a shape, dtype or device does not fit.
    """
    if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
        raise ValueError(f"target must hold labels, integers, not {target.dtype}")
    if loss_mask is not None and loss_mask.shape != target.shape:
        raise ValueError(
            f"loss_mask must be [s, b] as the target, {tuple(target.shape)}, not "
            f"{tuple(loss_mask.shape)}"
        )
    for name, tensor in (("target", target), ("loss_mask", loss_mask)):
        if tensor is not None and tensor.device != source.device:
            raise ValueError(f"{name} must be on {source.device}, not on {tensor.device}")
    if loss_mask is not None:
        loss_mask = loss_mask.to(torch.promote_types(source.dtype, torch.float32))
    return target.long(), loss_mask


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


def join_shards(
    table: Tensor,
    target: Tensor,
    loss_mask: Tensor | None,
    tp_group: dist.ProcessGroup | None,
    shard: Shard,
    options: CrossEntropyOptions,
    passes: Backend,
) -> Combined:
    """Losses, log-sum-exps and sums from this rank's statistics, `[options.rows, s, b]`."""
    tables = table.unsqueeze(0)
    if tp_group is not None and tp_group.size() > 1:
        mine, tables = tables, table.new_empty(tp_group.size(), *table.shape)
        dist.all_gather_into_tensor(tables, mine, group=tp_group)
    return passes.combine(tables, target, shard, options, loss_mask)


def upstream_of(
    of_losses: Tensor | None, of_sums: Tensor | None, loss_mask: Tensor | None
) -> Tensor | None:
    """Gradient of each token's loss, `[s, b]` fp32 (fp64 where the losses are).

    From those of the losses and of the sums; None where there are neither.
    """
    upstream = of_losses
    if of_sums is not None:
        assert loss_mask is not None
        # 0·NaN is NaN: a masked token has no gradient, whatever its sample's.
        spread = torch.where(loss_mask > 0, loss_mask * of_sums, 0.0)
        upstream = spread if upstream is None else upstream + spread
    return upstream


def _overlaps(tensor: Tensor) -> bool:
    """Whether two elements may share memory: not all strides step over what lies below."""
    reach = 0
    dimensions = zip(tensor.stride(), tensor.shape, strict=True)
    for stride, size in sorted(pair for pair in dimensions if pair[1] > 1):
        if stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


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
        inplace: bool,
        passes: Backend,
    ) -> tuple[Tensor | None, ...]:
        with torch.autocast(logits.device.type, enabled=False):
            table = passes.statistics(logits, target, shard, options)
            made = join_shards(table, target, loss_mask, tp_group, shard, options, passes)
        # Saved as an input, the logits carry their version: whoever changed them in between is
        # found out when the backward pass asks for them.
        ctx.save_for_backward(logits, target, loss_mask, made.lse)
        ctx.shard, ctx.options, ctx.inplace, ctx.passes = shard, options, inplace, passes
        return outputs(ctx, made)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_losses: Tensor | None, of_sums: Tensor | None, *_: Any) -> Any:
        logits, target, loss_mask, lse = ctx.saved_tensors
        upstream = upstream_of(of_losses, of_sums, loss_mask)
        if upstream is None:
            return (None,) * 8
        out = logits if ctx.inplace else torch.empty_like(logits)
        with torch.autocast(logits.device.type, enabled=False):
            ctx.passes.gradient(
                logits.detach(), target, lse, upstream, ctx.shard, ctx.options, out.detach()
            )
        if ctx.inplace:
            # Kernels write behind autograd's back: whoever still wants the logits must be told.
            torch.autograd.graph.increment_version(logits)
        return out.detach(), *(None,) * 7


def collected(made: tuple[Any, ...]) -> CrossEntropy:
    """What an autograd function's `outputs` are for the caller."""
    losses, loss_sum, tokens, entropy = made
    return CrossEntropy(losses, None if tokens is None else SampleSums(loss_sum, tokens), entropy)


def outputs(ctx: Any, made: Combined) -> tuple[Tensor | None, ...]:
    """What an autograd function returns: losses, their sums, tokens, entropy; two with gradient."""
    loss_sum, tokens = made.sums or (None, None)
    ctx.mark_non_differentiable(*(x for x in (tokens, made.entropy) if x is not None))
    ctx.set_materialize_grads(False)
    return made.losses, loss_sum, tokens, made.entropy
