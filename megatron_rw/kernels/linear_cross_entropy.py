"""An output layer and its cross-entropy within a budget of memory for the logits.

    z = X·Wᵀ + bias,    ce_i as in `cross_entropy`, of z and its target y_i
    dX = dz·W,    dW = dzᵀ·X,    dbias = Σ_i dz_i

The logits exist a split of the vocabulary at a time, forward and, computed again, backward:
8·N·H·V operations. Splits of the vocabulary, not of the tokens: each then adds to N·H elements of
dX instead of V·H of dW. Where all logits fit, a linear layer and `vocab_parallel_cross_entropy`
take 6·N·H·V.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rw.kernels.cross_entropy import (
    CrossEntropy,
    check_dtype,
    check_labels,
    collected,
    shard_of,
)
from megatron_rw.kernels.linear_autograd import Layer, LinearCrossEntropy
from megatron_rw.kernels.logits_plan import plan_logits
from megatron_rw.kernels.options import CrossEntropyOptions
from megatron_rw.kernels.selection import BackendName, backend, default_backend


# For the reasons of `vocab_parallel_cross_entropy`.
@torch.compiler.disable
def linear_weighted_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    tp_group: dist.ProcessGroup | None = None,
    options: CrossEntropyOptions | None = None,
    *,
    logits_budget: int,
    loss_mask: Tensor | None = None,
    bias: Tensor | None = None,
    sequence_parallel: bool = False,
    gradient_accumulation_fusion: bool = False,
    backend_name: BackendName | None = None,
) -> CrossEntropy:
    """Cross-entropy of every token of the logits `hidden·weightᵀ + bias`.

    The upstream gradient may differ from token to token: sample weights arrive through it. Under
    autocast hidden states, weight and bias are cast as a linear layer's are. `torch.compile`
    breaks its graph around it.

    Args:
        hidden: `[s, b, h]`, or `[s/tp, b, h]` with `sequence_parallel`; fp32, bf16, fp16, or, in
            torch, fp64.
        weight: `[V/tp, h]`, same dtype; this rank's rows.
        target: `[s, b]` integers, labels in the whole vocabulary, or `options.ignore_index`.
        tp_group: the ranks that hold the vocabulary's rows, in order; None for one.
        options: the variant. The plain one when None.
        logits_budget: bytes that logits and what goes with them may take; see `plan_logits`.
        loss_mask: `[s, b]`, 1 where a token counts in its sample's sums. No sums when None.
        bias: `[V/tp]`, same dtype.
        sequence_parallel: the ranks of `tp_group` hold parts of the sequence: they are gathered
            first, and the hidden states' gradient is scattered, not all-reduced.
        gradient_accumulation_fusion: add the weight's gradient to `weight.main_grad` as Megatron's
            linear layers do, where the weight has one; `weight.grad_added_to_main_grad` says so.
        backend_name: see `default_backend` when None.

    Raises:
        ValueError: a shape, dtype or device does not fit.
        BudgetError: the budget is too small.
    """
    options = options or CrossEntropyOptions()
    hidden, weight, bias = _cast(hidden, weight, bias)
    sequence_parallel = sequence_parallel and tp_group is not None and tp_group.size() > 1
    parts = tp_group.size() if sequence_parallel and tp_group is not None else 1
    _check(hidden, weight, bias, target, parts)
    target, loss_mask = check_labels(target, loss_mask, hidden)
    columns, size = weight.shape
    layer = Layer(
        tp_group=tp_group,
        shard=shard_of(columns, tp_group, options),
        options=options,
        sequence_parallel=sequence_parallel,
        accumulates=gradient_accumulation_fusion,
        plan=plan_logits(
            target.numel(), columns, size, hidden.dtype, logits_budget, gathers=sequence_parallel
        ),
        passes=backend(backend_name or default_backend(hidden.device, hidden.dtype)),
    )
    return collected(LinearCrossEntropy.apply(hidden, weight, bias, target, loss_mask, layer))


def _cast(
    hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """As autocast casts the operands of a linear layer, which leaves fp64 alone."""
    kind = hidden.device.type
    if not torch.is_autocast_enabled(kind) or hidden.dtype == torch.float64:
        return hidden, weight, bias
    dtype = torch.get_autocast_dtype(kind)
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def _check(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, parts: int) -> None:
    if hidden.dim() != 3 or target.shape != (hidden.shape[0] * parts, hidden.shape[1]):
        cut = f" (a sequence over {parts} ranks)" if parts > 1 else ""
        raise ValueError(
            f"hidden must be [s, b, h]{cut} and target [s, b], not {tuple(hidden.shape)} and "
            f"{tuple(target.shape)}"
        )
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[2]:
        raise ValueError(
            f"weight must be [v, h] with the {hidden.shape[2]} hidden units of hidden, not "
            f"{tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [v], {weight.shape[0]} values, not {tuple(bias.shape)}")
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        check_dtype(name, tensor)
        if (tensor.dtype, tensor.device) != (hidden.dtype, hidden.device):
            raise ValueError(
                f"{name} is {tensor.dtype} on {tensor.device} and hidden {hidden.dtype} on "
                f"{hidden.device}: they must be alike"
            )
