"""Our cross-entropy in the place of core's, where the model asks for its loss.

Core chooses between its own implementations inside that method and has no place for another.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from megatron.core.models.common.language_module.language_module import LanguageModule
from torch import Tensor

from megatron_rw.kernels import vocab_parallel_cross_entropy


def install() -> None:
    """Compute every language model loss, multi-token prediction's too, with our kernels."""
    LanguageModule.compute_language_model_loss = _compute_language_model_loss


@contextlib.contextmanager
def installed() -> Iterator[None]:
    """`install` for a while."""
    original = LanguageModule.compute_language_model_loss
    install()
    try:
        yield
    finally:
        LanguageModule.compute_language_model_loss = original


def _compute_language_model_loss(module: Any, labels: Tensor, logits: Tensor) -> Tensor:
    """`[b, s]` losses from `[b, s]` labels and `[s, b, V/tp]` logits, as core's method."""
    losses = vocab_parallel_cross_entropy(logits, labels.transpose(0, 1), module.tp_group)
    # Contiguous, as core gives it.
    return losses.transpose(0, 1).contiguous()
