r"""An output layer and its cross-entropy as one operation, without a backward pass over the logits.

    z = X·Wᵀ + bias,    ce_i as in `cross_entropy`, of z and its target y_i
    dz = diag(v)·Q,     v_i = g_i·s_i,    g_i = ∂L/∂ce_i
    dX = diag(v)·(Q·W),    dW = Qᵀ·(diag(v)·X),    dbias = Qᵀ·v

Q and s are defined in `probabilities`: Q is written over the logits in the forward pass, when the
upstream gradients g, which hold the samples' weights, are not known yet. They touch matrices of the
hidden states' size alone. Three matrix products, 6·N·H·V operations, and 4·N·V elements read or
written beside them. Where the logits do not fit a budget, backward computes them again in splits of
the vocabulary, 8·N·H·V operations.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rw.kernels.cross_entropy import shard_of
from megatron_rw.kernels.linear_autograd import Layer, LinearCrossEntropy
from megatron_rw.kernels.logits_plan import plan_logits, plan_losses
from megatron_rw.kernels.options import CrossEntropyOptions
from megatron_rw.kernels.passes import backend
from megatron_rw.kernels.probabilities import probability_backend
from megatron_rw.kernels.selection import BackendName, default_backend
from megatron_rw.kernels.sums import SampleSums


def linear_weighted_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    tp_group: dist.ProcessGroup | None = None,
    options: CrossEntropyOptions | None = None,
    *,
    bias: Tensor | None = None,
    sequence_parallel: bool = False,
    gradient_accumulation_fusion: bool = False,
    logits_budget: int | None = None,
    backend_name: BackendName | None = None,
) -> Tensor:
    """Cross-entropy of every token, in nats, of the logits `hidden·weightᵀ + bias`.

    The upstream gradient may differ from token to token: sample weights arrive through it. Without
    gradients, as in evaluation, the logits exist a part of the vocabulary at a time.

    Args:
        hidden: `[s, b, h]`, or `[s/tp, b, h]` with `sequence_parallel`; fp32, bf16, fp16, or, in
            the torch backend, fp64.
        weight: `[V/tp, h]`, same dtype; this rank's rows.
        target: `[s, b]` int64, labels in the whole vocabulary, or `options.ignore_index`.
        tp_group: the ranks that hold the vocabulary's rows, in order; None for one.
        options: the variant, without label smoothing. The plain one when None.
        bias: `[V/tp]`, same dtype. Its gradient costs a further read of the logits' buffer.
        sequence_parallel: the ranks of `tp_group` hold parts of the sequence: they are gathered
            first, and the hidden states' gradient is scattered, not all-reduced.
        gradient_accumulation_fusion: add the weight's gradient to `weight.main_grad` as Megatron's
            linear layers do, where the weight has one; `weight.grad_added_to_main_grad` says so.
        logits_budget: bytes that logits and what goes with them may take; see `plan_logits`.
        backend_name: see `default_backend` when None. fp64 always runs in torch then.

    Returns:
        `[s, b]` fp32 (fp64 for fp64). 0 where the label is `ignore_index`, NaN where it is outside
        the vocabulary.

    Raises:
        ValueError: a shape, dtype or option does not fit.
        BudgetError: the budget is too small.
    """
    losses, _ = _linear_cross_entropy(
        hidden,
        weight,
        target,
        None,
        tp_group,
        options,
        bias,
        sequence_parallel,
        gradient_accumulation_fusion,
        logits_budget,
        backend_name,
    )
    return losses


def linear_weighted_cross_entropy_sums(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    loss_mask: Tensor,
    tp_group: dist.ProcessGroup | None = None,
    options: CrossEntropyOptions | None = None,
    *,
    bias: Tensor | None = None,
    sequence_parallel: bool = False,
    gradient_accumulation_fusion: bool = False,
    logits_budget: int | None = None,
    backend_name: BackendName | None = None,
) -> tuple[Tensor, SampleSums]:
    """Cross-entropy of every token and each sample's sums of it.

    Args:
        hidden: as for `linear_weighted_cross_entropy`, as is every argument but one.
        weight: as there.
        target: as there.
        loss_mask: `[s, b]`, 1 where a token counts. One that is masked adds nothing to the sums
            even if its loss is not finite.
        tp_group: as there.
        options: as there.
        bias: as there.
        sequence_parallel: as there.
        gradient_accumulation_fusion: as there.
        logits_budget: as there.
        backend_name: as there.

    Returns:
        `(losses, sums)`, both with gradient: losses as there, sums as `[b]` each.

    Raises:
        ValueError: as there.
        BudgetError: as there.
    """
    return _linear_cross_entropy(
        hidden,
        weight,
        target,
        loss_mask,
        tp_group,
        options,
        bias,
        sequence_parallel,
        gradient_accumulation_fusion,
        logits_budget,
        backend_name,
    )


# Its collectives, and the buffer that it overwrites, are not for a compiler to move.
@torch.compiler.disable
def _linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    loss_mask: Tensor | None,
    tp_group: dist.ProcessGroup | None,
    options: CrossEntropyOptions | None,
    bias: Tensor | None,
    sequence_parallel: bool,
    accumulates: bool,
    logits_budget: int | None,
    backend_name: BackendName | None,
) -> tuple[Tensor, SampleSums]:
    options = options or CrossEntropyOptions()
    sequence_parallel = sequence_parallel and tp_group is not None and tp_group.size() > 1
    parts = tp_group.size() if sequence_parallel and tp_group is not None else 1
    _check(hidden, weight, bias, target, loss_mask, options, parts)
    if backend_name is None:
        double = hidden.dtype == torch.float64
        backend_name = "torch" if double else default_backend(hidden.device)
    if hidden.dtype == torch.float64 and backend_name != "torch":
        raise ValueError(f"the backend {backend_name} has no float64: use torch")
    columns, tokens = weight.shape[0], target.numel()
    differentiable = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (hidden, weight, bias)
    )
    if differentiable:
        plan = plan_logits(
            tokens, columns, hidden.shape[2], hidden.dtype, logits_budget, gathers=sequence_parallel
        )
    else:
        plan = plan_losses(tokens, columns, hidden.dtype, logits_budget)
    layer = Layer(
        tp_group,
        shard_of(columns, tp_group, options),
        options,
        sequence_parallel,
        accumulates,
        plan,
        backend(backend_name),
        probability_backend(backend_name),
    )
    losses, loss_sum, count = LinearCrossEntropy.apply(
        hidden, weight, bias, target, loss_mask, layer
    )
    return losses, SampleSums(loss_sum, count)


def _check(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    loss_mask: Tensor | None,
    options: CrossEntropyOptions,
    parts: int,
) -> None:
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
        if tensor.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(
                f"{name} must be float32, bfloat16, float16 or float64, not {tensor.dtype}: a "
                "quantised output layer has its own products"
            )
        if tensor.dtype != hidden.dtype:
            raise ValueError(f"{name} is {tensor.dtype} and hidden {hidden.dtype}: one is needed")
    if hidden.numel() == 0 or weight.numel() == 0:
        raise ValueError(
            f"hidden {tuple(hidden.shape)} or weight {tuple(weight.shape)} has no elements"
        )
    if loss_mask is not None and loss_mask.shape != target.shape:
        raise ValueError(
            f"loss_mask must be [s, b] as the target, {tuple(target.shape)}, not "
            f"{tuple(loss_mask.shape)}"
        )
    if options.label_smoothing:
        raise ValueError(
            "the fused output layer has no label smoothing: use vocab_parallel_cross_entropy"
        )
