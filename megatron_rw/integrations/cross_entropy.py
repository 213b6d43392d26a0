"""Our cross-entropy in the place of core's, where the model asks for its loss.

Core chooses between its own implementations inside that method and has no place for another, nor
for a loss mask on the way in and sums on the way out: those ride on the labels and on the losses.
"""

from __future__ import annotations

from typing import Any

from megatron.core.models.common.language_module.language_module import LanguageModule
from torch import Tensor

from megatron_rw.kernels import (
    SampleSums,
    sample_sums,
    vocab_parallel_cross_entropy,
    vocab_parallel_cross_entropy_sums,
)
from megatron_rw.patching import Patch

_MASK, _SUMS = "_megatron_rw_loss_mask", "_megatron_rw_sample_sums"


def patches() -> list[Patch]:
    """What computes every language model loss, multi-token prediction's too, with our kernels."""
    why = "Core chooses among its own implementations inside this method."
    return [Patch(LanguageModule, "compute_language_model_loss", _compute_language_model_loss, why)]


def announce_mask(labels: Tensor, loss_mask: Tensor) -> None:
    """Have the sums of the samples made with the losses of these labels, both `[b, s]`.

    To no effect where core's cross-entropy is in use.
    """
    setattr(labels, _MASK, loss_mask)


def mask_of(labels: Tensor) -> Tensor | None:
    """The mask that was announced for these labels, `[b, s]`."""
    mask: Tensor | None = getattr(labels, _MASK, None)
    return mask


def with_sums(losses: Tensor, sums: SampleSums) -> Tensor:
    """The losses, `[b, s]`, with the sums that were made with them."""
    setattr(losses, _SUMS, sums)
    return losses


def sums_of(token_losses: Tensor, loss_mask: Tensor) -> SampleSums:
    """The sums that were made with the losses, or are made now; both arguments `[b, s]`."""
    made: SampleSums | None = getattr(token_losses, _SUMS, None)
    return sample_sums(token_losses, loss_mask) if made is None else made


def _compute_language_model_loss(module: Any, labels: Tensor, logits: Tensor) -> Tensor:
    """`[b, s]` losses from `[b, s]` labels and `[s, b, V/tp]` logits, as core's method."""
    target, group = labels.transpose(0, 1), module.tp_group
    loss_mask = mask_of(labels)
    # Contiguous, as core gives them.
    if loss_mask is None:
        return vocab_parallel_cross_entropy(logits, target, group).transpose(0, 1).contiguous()
    mask = loss_mask.transpose(0, 1)
    losses, sums = vocab_parallel_cross_entropy_sums(logits, target, mask, group)
    return with_sums(losses.transpose(0, 1).contiguous(), sums)
