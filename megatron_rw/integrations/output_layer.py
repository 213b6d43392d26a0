"""The output layer of core's GPT model and its cross-entropy in one operation.

Core's model gives its last hidden states to an `output_processor`, where there is one, instead of
computing logits and a loss itself. Multi-token prediction is not touched by it: those heads compute
logits, of which core also counts the correct ones.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
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
    """Token losses from hidden states: an output processor of core's `GPTModel`.

        model(tokens, position_ids, mask, labels=labels, output_processor=FusedOutputLayer())

    Args:
        logits_budget: bytes that logits may take, see `kernels.plan_logits`; None for no limit.
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
        """Called by the model.

        Args:
            hidden_states: `[s, b, h]`, or this rank's part of the sequence.
            output_layer: the module, for its weight and its layout.
            output_weight: the embedding's weight where it is shared, else None.
            labels: `[b, s]`; without them the model is asked for its logits.
            scale_logits: multiplies by a constant, for models that are parametrised so.
            runtime_gather_output: of the logits.

        Returns:
            `[b, s]` losses in nats.

        Raises:
            UserError: the layer is of a kind that has products of its own.
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
        forward = functools.partial(self._losses, output_layer, labels)
        # Through the module's call: its hooks wait until its parameters are gathered.
        with _forward_of(output_layer, forward):
            # Of scaled hidden states the logits are scaled.
            losses, sums = output_layer(scale_logits(hidden_states), weight=output_weight)
        # Contiguous, as core gives them.
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


@contextlib.contextmanager
def _forward_of(module: Any, forward: Any) -> Iterator[None]:
    """Have a call of the module run `forward`."""
    module.forward = forward
    try:
        yield
    finally:
        del module.forward


def plan_of(args: Any, budget: int | None) -> LogitsPlan:
    """How the logits of a micro-batch are computed within a budget.

    Args:
        args: Megatron's arguments, validated.
        budget: Bytes that logits may take; None for no limit.

    Raises:
        UserError: If the budget is too small.
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
