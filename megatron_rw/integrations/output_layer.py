"""Computes the output layer of core's GPT model and its cross-entropy as one operation.

Core's model gives its last hidden states to an `output_processor`, if there is one, instead of
computing logits and a loss itself. The heads of multi-token prediction still compute logits,
because core counts how many of their predictions are correct.
"""

from __future__ import annotations

import functools
from typing import Any

from megatron.core.tensor_parallel import ColumnParallelLinear
from torch import Tensor

from megatron_rw.errors import UserError
from megatron_rw.integrations.cross_entropy import mask_of, with_sums
from megatron_rw.kernels import (
    BudgetError,
    LogitsPlan,
    SampleSums,
    linear_weighted_cross_entropy,
    linear_weighted_cross_entropy_sums,
    plan_logits,
)


class FusedOutputLayer:
    """An output processor of core's `GPTModel`: computes token losses from hidden states.

        model(tokens, position_ids, mask, labels=labels, output_processor=FusedOutputLayer())

    `logits_budget` are the bytes that logits may take, see `kernels.plan_logits`.
    """

    def __init__(self, logits_budget: int | None = None) -> None:
        self._logits_budget = logits_budget

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
            losses, sums = output_layer(scale_logits(hidden_states), weight=output_weight)
        finally:
            del output_layer.forward
        # Core returns contiguous losses.
        losses = losses.transpose(0, 1).contiguous()
        return losses if sums is None else with_sums(losses, sums)

    def _losses(
        self, layer: Any, labels: Tensor, hidden: Tensor, weight: Tensor | None = None
    ) -> tuple[Tensor, SampleSums | None]:
        given = {
            "hidden": hidden,
            "weight": layer.weight if weight is None else weight,
            "target": labels.transpose(0, 1),
            "tp_group": layer.tp_group,
            "bias": layer.bias,
            "sequence_parallel": layer.sequence_parallel,
            "gradient_accumulation_fusion": layer.gradient_accumulation_fusion,
            "logits_budget": self._logits_budget,
        }
        mask = mask_of(labels)
        if mask is None:
            return linear_weighted_cross_entropy(**given), None
        return linear_weighted_cross_entropy_sums(**given, loss_mask=mask.transpose(0, 1))


def plan_of(args: Any, budget: int | None) -> LogitsPlan:
    """Returns how the logits of a micro-batch are computed within a budget in bytes.

    It raises `UserError` if --logits-budget-mib is too small. `args` are Megatron's, validated.
    """
    try:
        return plan_logits(
            args.micro_batch_size * args.seq_length // args.context_parallel_size,
            args.padded_vocab_size // args.tensor_model_parallel_size,
            args.hidden_size,
            args.params_dtype,
            budget,
            gathers=args.sequence_parallel,
        )
    except BudgetError as error:
        raise UserError(f"--logits-budget-mib {(budget or 0) >> 20}: {error}.") from error
