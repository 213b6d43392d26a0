"""The cross-entropy as one operator of torch, for graphs that `torch.compile` makes.

Outside of them `cross_entropy` calls its autograd function: an operator defined in Python takes the
host two to three times as long.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rw.kernels.options import CrossEntropyOptions, Shard
from megatron_rw.kernels.passes import backend, forward, upstream_of
from megatron_rw.kernels.selection import BackendName


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    loss_mask: Tensor | None,
    tp_group: dist.ProcessGroup | None,
    shard: Shard,
    options: CrossEntropyOptions,
    name: BackendName,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, and sums that are empty without a mask. The logits stay as they are.

    What the compiler keeps for the backward pass it may also read elsewhere, so there the gradient
    is not written over the logits.
    """
    losses, _, loss_sum, tokens = _cross_entropy(
        logits,
        target,
        loss_mask,
        None if tp_group is None else tp_group.group_name,
        shard.start,
        shard.columns,
        shard.vocab_size,
        options.ignore_index,
        options.z_loss,
        options.label_smoothing,
        options.softcap,
        name,
    )
    return losses, loss_sum, tokens


def _setting(
    start: int,
    columns: int,
    vocab_size: int,
    ignore_index: int,
    z_loss: float,
    label_smoothing: float,
    softcap: float | None,
) -> tuple[Shard, CrossEntropyOptions]:
    options = CrossEntropyOptions(
        ignore_index=ignore_index,
        z_loss=z_loss,
        label_smoothing=label_smoothing,
        softcap=softcap,
    )
    return Shard(start, columns, vocab_size), options


def _named_group(name: str) -> dist.ProcessGroup:
    # What torch's own collectives do in graphs, which hold a group by its name.
    group: dist.ProcessGroup = dist.distributed_c10d._resolve_process_group(name)  # type: ignore
    return group


@torch.library.custom_op("megatron_rw::cross_entropy", mutates_args=())
def _cross_entropy(
    logits: Tensor,
    target: Tensor,
    loss_mask: Tensor | None,
    tp_group: str | None,
    start: int,
    columns: int,
    vocab_size: int,
    ignore_index: int,
    z_loss: float,
    label_smoothing: float,
    softcap: float | None,
    backend_name: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shard, options = _setting(
        start, columns, vocab_size, ignore_index, z_loss, label_smoothing, softcap
    )
    group = None if tp_group is None else _named_group(tp_group)
    passes = backend(cast(BackendName, backend_name))
    losses, lse, sums = forward(logits, target, loss_mask, group, shard, options, passes)
    if sums is None:
        return losses, lse, losses.new_empty(0), losses.new_empty(0)
    # Outputs of an operator share no memory.
    return losses, lse, sums.loss_sum.clone(), sums.tokens.clone()


@_cross_entropy.register_fake
def _(logits: Tensor, target: Tensor, loss_mask: Tensor | None, *_: Any) -> tuple[Tensor, ...]:
    samples = 0 if loss_mask is None else logits.shape[1]
    losses = logits.new_empty(logits.shape[:2], dtype=torch.float32)
    sums = losses.new_empty(samples)
    return losses, torch.empty_like(losses), sums, torch.empty_like(sums)


@torch.library.custom_op("megatron_rw::cross_entropy_gradient", mutates_args=())
def _gradient(
    logits: Tensor,
    target: Tensor,
    lse: Tensor,
    upstream: Tensor,
    start: int,
    columns: int,
    vocab_size: int,
    ignore_index: int,
    z_loss: float,
    label_smoothing: float,
    softcap: float | None,
    backend_name: str,
) -> Tensor:
    shard, options = _setting(
        start, columns, vocab_size, ignore_index, z_loss, label_smoothing, softcap
    )
    out = torch.empty_like(logits)
    passes = backend(cast(BackendName, backend_name))
    passes.gradient(logits, target, lse, upstream, shard, options, out)
    return out


@_gradient.register_fake
def _(logits: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(logits)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, target, loss_mask, _, *ctx.settings = inputs
    _, lse, _, tokens = output
    ctx.save_for_backward(logits, target, loss_mask, lse)
    ctx.mark_non_differentiable(lse, tokens)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, of_losses: Tensor | None, _: Any, of_sums: Tensor | None, __: Any) -> Any:
    logits, target, loss_mask, lse = ctx.saved_tensors
    upstream = upstream_of(of_losses, of_sums if loss_mask is not None else None, loss_mask)
    gradient = None
    if upstream is not None:
        gradient = _gradient(logits, target, lse, upstream, *ctx.settings)
    return gradient, *(None,) * (3 + len(ctx.settings))


_cross_entropy.register_autograd(_backward, setup_context=_setup_context)
