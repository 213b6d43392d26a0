"""Forward and backward pass of the fused output layer; see `linear_cross_entropy`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_rw.kernels.logits_plan import LogitsPlan
from megatron_rw.kernels.options import CrossEntropyBackend, CrossEntropyOptions, Shard
from megatron_rw.kernels.passes import join, upstream_of
from megatron_rw.kernels.probabilities import ProbabilityBackend
from megatron_rw.kernels.products import add_product
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
    passes: CrossEntropyBackend
    rows: ProbabilityBackend

    @property
    def splits(self) -> Iterator[slice]:
        """Columns that exist at a time; those of padding alone are left out."""
        step = self.plan.columns
        for start in range(0, self.shard.columns, step):
            yield slice(start, min(start + step, self.shard.columns))

    def within(self, columns: slice) -> Shard:
        """A split as if it were a shard."""
        start = self.shard.start + columns.start
        return Shard(start, columns.stop - columns.start, self.shard.vocab_size)

    def gather(self, hidden: Tensor) -> tuple[Tensor, dist.Work | None]:
        """Start to gather the sequence; what is returned is complete when the work is."""
        if not self.sequence_parallel:
            return hidden, None
        assert self.tp_group is not None
        sequence, *rest = hidden.shape
        whole = torch.empty(
            sequence * self.tp_group.size(), *rest, dtype=hidden.dtype, device=hidden.device
        )
        work = dist.all_gather_into_tensor(
            whole, hidden.contiguous(), group=self.tp_group, async_op=True
        )
        return whole, work

    def reduce(self, gradient: Tensor) -> tuple[Tensor, dist.Work | None]:
        """Start to add up the ranks' gradients of the hidden states, `[s, b, h]`."""
        if self.tp_group is None or self.tp_group.size() == 1:
            return gradient, None
        if not self.sequence_parallel:
            return gradient, dist.all_reduce(gradient, group=self.tp_group, async_op=True)
        sequence, *rest = gradient.shape
        part = gradient.new_empty(sequence // self.tp_group.size(), *rest)
        work = dist.reduce_scatter_tensor(part, gradient, group=self.tp_group, async_op=True)
        return part, work


class LinearCrossEntropy(torch.autograd.Function):
    """Losses `[s, b]`, and sums `[b]` of them and of the mask, None without one."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        loss_mask: Tensor | None,
        layer: Layer,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Keep probabilities, or nothing of the logits' size, as the plan says."""
        whole, gathered = layer.gather(hidden)
        if gathered is not None:
            gathered.wait()
        kept = scale = None
        if layer.plan.keep:
            kept = _logits(whole, weight, bias)
            tables = layer.rows.probabilities(kept, target, layer.shard, layer.options)
        else:
            tables = _statistics(whole, weight, bias, target, layer)
        losses, lse, sums = join(
            tables, target, loss_mask, layer.tp_group, layer.shard, layer.options, layer.passes
        )
        if kept is not None:
            scale = layer.rows.subtract_targets(
                kept, tables, target, lse, layer.shard, layer.options
            )
        ctx.save_for_backward(hidden, weight, bias, target, loss_mask, lse, kept, scale)
        ctx.layer = layer
        # Megatron's buffer of the gradient changes in between, as no saved tensor may.
        ctx.main_grad = getattr(weight, "main_grad", None) if layer.accumulates else None
        ctx.set_materialize_grads(False)
        if sums is None:
            return losses, None, None
        ctx.mark_non_differentiable(sums.tokens)
        return losses, sums.loss_sum, sums.tokens

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, of_losses: Tensor | None, of_sums: Tensor | None, of_tokens: Tensor | None
    ) -> Any:
        """Gradients of hidden states, weight and bias."""
        hidden, weight, bias, target, loss_mask, lse, kept, scale = ctx.saved_tensors
        upstream = upstream_of(of_losses, of_sums, loss_mask)
        if upstream is None:
            return (None,) * 6
        layer: Layer = ctx.layer
        if scale is None:
            scale = (target != layer.options.ignore_index).to(upstream.dtype)
        # 0·NaN is NaN: of a token that is ignored or has no weight nothing may reach a gradient.
        factor = torch.where((upstream == 0) | (scale == 0), 0.0, upstream * scale)
        gradients = _Gradients(layer, factor, weight, bias, ctx.main_grad, ctx.needs_input_grad)
        whole, gathered = layer.gather(hidden)
        if kept is None:
            if gathered is not None:
                gathered.wait()
            of_hidden = gradients.from_splits(whole, target, lse)
        else:
            of_hidden = gradients.from_kept(kept, whole, gathered)
        return of_hidden, gradients.of_weight(), gradients.of_bias, None, None, None


class _Gradients:
    """The products of a backward pass.

    Args:
        layer: what the forward pass had.
        factor: v, `[s, b]`; in splits g, as their Q holds s.
        weight: `[v, h]`.
        bias: `[v]`.
        main_grad: what the weight's gradient is added to, if to anything.
        wanted: whether gradients of hidden states, weight and bias are.
    """

    def __init__(
        self,
        layer: Layer,
        factor: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        main_grad: Tensor | None,
        wanted: Sequence[bool],
    ) -> None:
        self.layer, self.factor, self.weight, self.bias = layer, factor, weight, bias
        self.main_grad = main_grad
        self.of_bias = torch.zeros_like(bias) if bias is not None and wanted[2] else None
        self._wants_hidden, self._wants_weight = wanted[:2]
        self._made: Tensor | None = None
        if self._wants_weight and main_grad is None:
            self._made = torch.empty_like(weight)
            # Of padding, which may be in no split.
            self._made[layer.shard.columns :] = 0

    def from_kept(self, kept: Tensor, whole: Tensor, gathered: dist.Work | None) -> Tensor | None:
        """Gradient of the hidden states.

        Args:
            kept: Q, `[s, b, v]`.
            whole: hidden states, `[s, b, h]`.
            gathered: to wait for before they are read.
        """
        q = kept.flatten(0, 1)
        of_hidden, reduced = None, None
        if self._wants_hidden:
            product = torch.mm(q, self.weight)
            self.layer.rows.scale_rows(product, self.factor.flatten(), product)
            # While the weight's gradient is computed.
            of_hidden, reduced = self.layer.reduce(product.view(whole.shape))
        if gathered is not None:
            gathered.wait()
        if self._wants_weight:
            self._add(slice(0, len(self.weight)), q, self._scaled(whole))
        self._add_bias(slice(0, len(self.weight)), q)
        if reduced is not None:
            reduced.wait()
        return of_hidden

    def from_splits(self, whole: Tensor, target: Tensor, lse: Tensor) -> Tensor | None:
        """Gradient of the hidden states, with the logits computed again.

        Args:
            whole: hidden states, `[s, b, h]`.
            target: `[s, b]`.
            lse: `[s, b]`.
        """
        layer = self.layer
        used = (self.factor != 0).to(self.factor.dtype)
        scaled = self._scaled(whole) if self._wants_weight else None
        total = None
        if self._wants_hidden:
            wide = computed_in(whole.dtype)
            total = torch.zeros(whole.flatten(0, 1).shape, dtype=wide, device=whole.device)
        for columns, logits in _split_logits(whole, self.weight, self.bias, layer):
            shard = layer.within(columns)
            layer.passes.gradient(logits, target, lse, used, shard, layer.options, logits)
            q = logits.flatten(0, 1)
            if total is not None:
                add_product(total, q, self.weight[columns])
            if scaled is not None:
                self._add(columns, q, scaled)
            self._add_bias(columns, q)
        del scaled
        if total is None:
            return None
        product = torch.empty_like(whole)
        layer.rows.scale_rows(total, self.factor.flatten(), product.flatten(0, 1))
        of_hidden, reduced = layer.reduce(product)
        if reduced is not None:
            reduced.wait()
        return of_hidden

    def of_weight(self) -> Tensor | None:
        """Gradient of the weight; where it is in `main_grad`, what autograd shall have instead."""
        if self.main_grad is None or not hasattr(self.weight, "grad_added_to_main_grad"):
            return self._made
        self.weight.grad_added_to_main_grad = True
        # Megatron's hooks want a gradient all the same, and look at its values where they are told
        # to: an embedding that shares the weight adds its own there.
        if getattr(self.weight, "zero_out_wgrad", False):
            return torch.zeros_like(self.weight)
        return torch.empty_like(self.weight)

    def _scaled(self, whole: Tensor) -> Tensor:
        scaled = torch.empty_like(whole).flatten(0, 1)
        self.layer.rows.scale_rows(whole.flatten(0, 1), self.factor.flatten(), scaled)
        return scaled

    def _add(self, columns: slice, q: Tensor, scaled: Tensor) -> None:
        if self._made is not None:
            torch.mm(q.t(), scaled, out=self._made[columns])
        else:
            assert self.main_grad is not None
            add_product(self.main_grad[columns], q.t(), scaled)

    def _add_bias(self, columns: slice, q: Tensor) -> None:
        if self.of_bias is not None:
            torch.mv(q.t(), self.factor.flatten().to(q.dtype), out=self.of_bias[columns])


def _logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None = None
) -> Tensor:
    """`[s, b, v]`; into `out`, `[n, v]`, where it is given."""
    rows = hidden.flatten(0, 1)
    if bias is None:
        made = torch.mm(rows, weight.t(), out=out)
    else:
        made = torch.addmm(bias, rows, weight.t(), out=out)
    return made.view(*hidden.shape[:2], -1)


def _split_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, layer: Layer
) -> Iterator[tuple[slice, Tensor]]:
    """Columns and their logits, `[s, b, ·]`, one after the other in the same memory."""
    tokens = hidden.shape[0] * hidden.shape[1]
    memory = hidden.new_empty(tokens * layer.plan.columns)
    for columns in layer.splits:
        width = columns.stop - columns.start
        out = memory[: tokens * width].view(tokens, width)
        part = None if bias is None else bias[columns]
        yield columns, _logits(hidden, weight[columns], part, out)


def _statistics(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, layer: Layer
) -> Tensor:
    """`[1, 3, s, b]`, with a part of the logits at a time."""
    table: list[Tensor] = []
    for columns, logits in _split_logits(hidden, weight, bias, layer):
        parts = layer.passes.statistics(logits, target, layer.within(columns), layer.options)
        table = [layer.passes.merge(torch.cat([*table, parts]))]
    return table[0]
