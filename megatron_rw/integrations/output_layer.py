"""Computes the output layer of core's GPT model and its cross-entropy within a memory budget.

Core's model gives its last hidden states to an `output_processor`, if there is one, instead of
computing logits and a loss itself. The heads of multi-token prediction still compute logits,
because core counts how many of their predictions are correct.
"""

import functools
from typing import Any

from megatron.core.tensor_parallel import ColumnParallelLinear
from torch import Tensor

from megatron_rw.errors import UserError
from megatron_rw.integrations.cross_entropy import losses_with_sums, mask_of
from megatron_rw.integrations.logit_scale import STRIDE, LogitScale
from megatron_rw.kernels import (
    BudgetError,
    CrossEntropy,
    CrossEntropyOptions,
    LogitsPlan,
    linear_weighted_cross_entropy,
    plan_logits,
)

# What flags do, by the names of their arguments, that the fused output layer would silently ignore,
# or was not tested with.
CONFLICTS = {
    "fp8_output_proj": "computes the output layer in FP8, with products of its own",
    "defer_embedding_wgrad_compute": "takes the output layer's weight gradient out of its backward "
    "pass",
    "use_megatron_fsdp": "gathers the output layer's weight for its own products alone",
    "use_torch_fsdp2": "gathers the output layer's weight for its own products alone",
    "fp16_lm_cross_entropy": "asks for losses in 16 bits",
    "perform_rl_step": "wants the logits",
    "gtp_weight_remat_size": "cuts the output layer's weight again",
    "logits_load_dir": "compares the logits with others",
}


class FusedOutputLayer:
    """An output processor of core's `GPTModel`: computes token losses from hidden states.

        processor = FusedOutputLayer(1 << 30)
        model(tokens, position_ids, mask, labels=labels, output_processor=processor)

    `logits_budget` are the bytes that logits may take, see `kernels.plan_logits`. With `entropy`,
    `cross_entropy.entropy_of` has those of the predictions. `logit_scale` is given the losses of
    scaled logits in an evaluation.
    """

    def __init__(
        self, logits_budget: int, entropy: bool = False, logit_scale: LogitScale | None = None
    ) -> None:
        self._logits_budget = logits_budget
        self._options = CrossEntropyOptions(entropy=entropy)
        self._logit_scale = logit_scale

    def __call__(
        self,
        *,
        hidden_states: Tensor,
        output_layer: Any,
        output_weight: Tensor | None,
        labels: Tensor | None,
        scale_logits: Any,
        runtime_gather_output: bool | None = None,
        **_: Any,
    ) -> Tensor:
        """Returns `[b, s]` losses in nats, or logits where there are no labels; the model calls it.

        The hidden states are `[s, b, h]`, or this rank's part of the sequence, and the labels
        `[b, s]`. There is an `output_weight` if it is the embedding's, which the two share.
        `scale_logits` multiplies logits by a constant.
        """
        if labels is None:
            logits, _ = output_layer(
                hidden_states, weight=output_weight, runtime_gather_output=runtime_gather_output
            )
            return scale_logits(logits).transpose(0, 1).contiguous()
        if type(output_layer) is not ColumnParallelLinear:
            raise UserError(
                f"the output layer is a {type(output_layer).__name__}, which has matrix products "
                "of its own: --fused-linear-cross-entropy takes core's ColumnParallelLinear."
            )
        # The module itself is called, because its hooks wait until its parameters are gathered.
        output_layer.forward = functools.partial(self._losses, output_layer, labels)
        try:
            # Scaling the hidden states scales the logits.
            made = output_layer(scale_logits(hidden_states), weight=output_weight)
        finally:
            del output_layer.forward
        # Hooks of the module may have made a plain tuple of it.
        return losses_with_sums(CrossEntropy(*made))

    def _losses(
        self, layer: Any, labels: Tensor, hidden: Tensor, weight: Tensor | None = None
    ) -> CrossEntropy:
        weight = layer.weight if weight is None else weight
        mask = mask_of(labels)
        if self._logit_scale is not None and not layer.training and mask is not None:
            some = hidden[::STRIDE]
            self._logit_scale.add(
                labels,
                lambda scale, target: self._made(layer, some * scale, weight, target, None).losses,
                parts=layer.tp_group.size() if layer.sequence_parallel else 1,
            )
        return self._made(layer, hidden, weight, labels.transpose(0, 1), mask)

    def _made(
        self, layer: Any, hidden: Tensor, weight: Tensor, target: Tensor, mask: Tensor | None
    ) -> CrossEntropy:
        return linear_weighted_cross_entropy(
            hidden,
            weight,
            target,
            layer.tp_group,
            logits_budget=self._logits_budget,
            options=self._options,
            loss_mask=mask,
            bias=layer.bias,
            sequence_parallel=layer.sequence_parallel,
            gradient_accumulation_fusion=layer.gradient_accumulation_fusion,
        )


def plan_of(args: Any, budget: int) -> LogitsPlan:
    """Returns how the logits of the largest micro-batch are computed within a budget in bytes.

    It raises `UserError` if --logits-budget-mib is too small. `args` are Megatron's, validated.
    """
    samples = max(args.micro_batch_size, args.eval_micro_batch_size)
    try:
        return plan_logits(
            samples * args.seq_length // args.context_parallel_size,
            args.padded_vocab_size // args.tensor_model_parallel_size,
            args.hidden_size,
            args.params_dtype,
            budget,
            gathers=args.sequence_parallel,
        )
    except BudgetError as error:
        raise UserError(f"--logits-budget-mib {budget >> 20}: {error}.") from error
