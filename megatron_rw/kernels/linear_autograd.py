"""Forward and backward pass of the fused output layer; see `linear_cross_entropy`."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_rw.kernels.cross_entropy import join_shards, outputs, upstream_of
from megatron_rw.kernels.logits_plan import LogitsPlan
from megatron_rw.kernels.options import Backend, CrossEntropyOptions, Shard
from megatron_rw.kernels.products import add_product
from megatron_rw.kernels.torch_backend import join_tables
from megatron_rw.kernels.torch_pieces import computed_in


@dataclass(frozen=True)
class Layer:
    """What a call's forward and backward pass have in common."""

    tp_group: dist.ProcessGroup | None
    shard: Shard
    options: CrossEntropyOptions
    sequence_parallel: bool
    accumulates: bool
    plan: LogitsPlan
    passes: Backend

    def gather(self, hidden: Tensor) -> Tensor:
        """Hidden states of the whole sequence."""
        if not self.sequence_parallel:
            return hidden
        assert self.tp_group is not None
        sequence, *rest = hidden.shape
        whole = hidden.new_empty(sequence * self.tp_group.size(), *rest)
        dist.all_gather_into_tensor(whole, hidden.contiguous(), group=self.tp_group)
        return whole

    def reduce(self, gradient: Tensor) -> Tensor:
        """The sum of the ranks' gradients of the hidden states, or this rank's part of it."""
        if self.tp_group is None or self.tp_group.size() == 1:
            return gradient
        if not self.sequence_parallel:
            dist.all_reduce(gradient, group=self.tp_group)
            return gradient
        sequence, *rest = gradient.shape
        part = gradient.new_empty(sequence // self.tp_group.size(), *rest)
        dist.reduce_scatter_tensor(part, gradient, group=self.tp_group)
        return part

    def logits(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Iterator[tuple[slice, Shard, Tensor]]:
        """Columns, these as a shard, and their logits `[s, b, ·]`, all in the same memory.

        Columns of padding alone may be left out.
        """
        rows = hidden.flatten(0, 1)
        memory = rows.new_empty(len(rows) * self.plan.columns)
        for start in range(0, self.shard.columns, self.plan.columns):
            columns = slice(start, min(start + self.plan.columns, self.shard.columns))
            width = columns.stop - start
            out = memory[: len(rows) * width].view(len(rows), width)
            if bias is None:
                torch.mm(rows, weight[columns].t(), out=out)
            else:
                torch.addmm(bias[columns], rows, weight[columns].t(), out=out)
            shard = Shard(self.shard.start + start, width, self.shard.vocab_size)
            yield columns, shard, out.view(*hidden.shape[:2], width)


class LinearCrossEntropy(torch.autograd.Function):
    """Losses `[s, b]`, sums `[b]` of them and of the mask, and entropy `[s, b]`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        loss_mask: Tensor | None,
        layer: Layer,
    ) -> tuple[Tensor | None, ...]:
        """Keep nothing of the logits' size."""
        tables: list[Tensor] = []
        with torch.autocast(hidden.device.type, enabled=False):
            for _, shard, logits in layer.logits(layer.gather(hidden), weight, bias):
                tables.append(layer.passes.statistics(logits, target, shard, layer.options))
                tables = [join_tables(torch.stack(tables), layer.options)]
            made = join_shards(
                tables[0],
                target,
                loss_mask,
                layer.tp_group,
                layer.shard,
                layer.options,
                layer.passes,
            )
        ctx.save_for_backward(hidden, weight, bias, target, loss_mask, made.lse)
        ctx.layer = layer
        # Not a saved tensor: Megatron adds to this buffer between forward and backward, which
        # autograd would refuse.
        ctx.main_grad = getattr(weight, "main_grad", None) if layer.accumulates else None
        return outputs(ctx, made)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_losses: Tensor | None, of_sums: Tensor | None, *_: Any) -> Any:
        """Gradients of hidden states, weight and bias."""
        hidden, weight, bias, target, loss_mask, lse = ctx.saved_tensors
        upstream = upstream_of(of_losses, of_sums, loss_mask)
        if upstream is None:
            return (None,) * 6
        layer: Layer = ctx.layer
        wants_hidden, wants_weight, wants_bias, *_ = ctx.needs_input_grad
        with torch.autocast(hidden.device.type, enabled=False):
            whole = layer.gather(hidden)
            of_weight = torch.empty_like(weight) if ctx.main_grad is None and wants_weight else None
            of_bias = torch.empty_like(bias) if wants_bias else None
            for made in (of_weight, of_bias):
                if made is not None:
                    # Padding may be in no split, and its gradient is 0.
                    made[layer.shard.columns :] = 0
            rows = whole.flatten(0, 1)
            total = torch.zeros_like(rows, dtype=computed_in(rows.dtype)) if wants_hidden else None
            # Hidden states of a token without gradient may be NaN, and 0·NaN is NaN.
            without = (upstream == 0) | (target == layer.options.ignore_index)
            counted = rows.masked_fill(without.reshape(-1, 1), 0.0) if wants_weight else rows
            for columns, shard, logits in layer.logits(whole, weight, bias):
                layer.passes.gradient(logits, target, lse, upstream, shard, layer.options, logits)
                gradient = logits.flatten(0, 1)
                if total is not None:
                    add_product(total, gradient, weight[columns])
                if of_weight is not None:
                    torch.mm(gradient.t(), counted, out=of_weight[columns])
                elif wants_weight:
                    add_product(ctx.main_grad[columns], gradient.t(), counted)
                if of_bias is not None:
                    torch.sum(gradient, dim=0, out=of_bias[columns])
            # The whole sequence's gradient in the hidden states' dtype takes their place.
            del logits, gradient, counted, rows
            of_hidden = None
            if total is not None:
                of_hidden = layer.reduce(total.to(hidden.dtype).view(whole.shape))
        if wants_weight and ctx.main_grad is not None:
            of_weight = _stand_in(weight)
        return of_hidden, of_weight, of_bias, None, None, None


def _stand_in(weight: Tensor) -> Tensor | None:
    """What autograd gets in place of the gradient that was added to `main_grad`."""
    if not hasattr(weight, "grad_added_to_main_grad"):
        return None
    weight.grad_added_to_main_grad = True
    # Megatron's hooks want a gradient all the same. They read its values only where an embedding
    # shares the weight and adds its own gradient to it.
    make = torch.zeros_like if getattr(weight, "zero_out_wgrad", False) else torch.empty_like
    return make(weight)
