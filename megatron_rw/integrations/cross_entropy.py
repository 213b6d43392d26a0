"""Replaces core's cross-entropy by ours.

A language model of core calls its method `compute_language_model_loss(labels, logits)`, which has
no argument for the loss mask and returns losses only. Our kernels need the mask, and return the
sums by sample with the losses. Both therefore travel as attributes on tensors:

1. The forward step calls `announce_mask(labels, loss_mask)` before it calls the model.
2. The model calls our cross-entropy (or our output layer), which reads `mask_of(labels)` and
   returns `losses_with_sums` of what the kernels return.
3. The loss function calls `sums_of(losses, loss_mask)`. It computes the sums from the losses if
   core's cross-entropy was in use, which sets no attribute.
"""

from typing import Any

from megatron.core.models.common.language_module.language_module import LanguageModule
from torch import Tensor

from megatron_rw.errors import UserError
from megatron_rw.kernels import (
    CrossEntropy,
    CrossEntropyOptions,
    SampleSums,
    sample_sums,
    vocab_parallel_cross_entropy,
)
from megatron_rw.patching import Patch

_MASK, _SUMS = "_megatron_rw_loss_mask", "_megatron_rw_sample_sums"
_ENTROPY = "_megatron_rw_entropy"


def patches(entropy: bool = False) -> list[Patch]:
    """Returns what computes all language model losses, multi-token prediction's too, with ours.

    With `entropy`, `entropy_of` has those of the predictions.
    """
    why = "Core chooses among its own implementations inside this method."
    options = CrossEntropyOptions(entropy=entropy)

    def compute_language_model_loss(self: Any, labels: Tensor, logits: Tensor) -> Tensor:
        """Computes `[b, s]` losses from `[b, s]` labels and `[s, b, V/tp]` logits."""
        target, mask = labels.transpose(0, 1), mask_of(labels)
        return losses_with_sums(
            vocab_parallel_cross_entropy(logits, target, self.tp_group, options, loss_mask=mask)
        )

    return [Patch(LanguageModule, "compute_language_model_loss", compute_language_model_loss, why)]


def announce_mask(labels: Tensor, loss_mask: Tensor) -> None:
    """Attaches a loss mask to labels, both `[b, s]`, for our cross-entropy."""
    setattr(labels, _MASK, loss_mask)


def mask_of(labels: Tensor) -> Tensor | None:
    """Returns the mask that was attached to labels, `[b, s]`, as kernels take it: `[s, b]`."""
    mask: Tensor | None = getattr(labels, _MASK, None)
    return None if mask is None else mask.transpose(0, 1)


def losses_with_sums(made: CrossEntropy) -> Tensor:
    """Returns the losses as core does, `[b, s]` and contiguous, with their sums if there are."""
    losses = made.losses.transpose(0, 1).contiguous()
    if made.sums is not None:
        setattr(losses, _SUMS, made.sums)
    if made.entropy is not None:
        setattr(losses, _ENTROPY, made.entropy.transpose(0, 1).contiguous())
    return losses


def sums_of(token_losses: Tensor, loss_mask: Tensor) -> SampleSums:
    """Returns the sums that were attached to losses, or computes them; both `[b, s]`."""
    made: SampleSums | None = getattr(token_losses, _SUMS, None)
    return sample_sums(token_losses, loss_mask) if made is None else made


def entropy_of(token_losses: Tensor) -> Tensor:
    """Returns the entropies that were attached to losses, `[b, s]` fp32, nats."""
    made: Tensor | None = getattr(token_losses, _ENTROPY, None)
    if made is None:
        raise UserError(
            "the entropy of predictions is computed by our cross-entropy, which the model did not "
            "call: apply megatron_rw.integrations.cross_entropy.patches(entropy=True)."
        )
    return made
