"""Makes one sample go bad in the real program."""

from __future__ import annotations

import functools
import os
from typing import Any

import numpy as np
import torch

MARK = 59


def spoil(**bad: Any) -> None:
    """Lets the sample at `position` go bad in the logged `iterations`.

    `what` does: `activations` (NaN out of the embedding), `loss` (infinite, its gradient finite),
    `large` (the loss, by 400 nats), `gradient` (NaN out of the backward pass of the second layer,
    on `rank`). The sample's tokens and labels are all `MARK`, in every run: that is how the model
    knows it.
    """
    _mark(bad)
    if bad["what"] is not None:
        {"activations": _activations, "gradient": _gradient}.get(bad["what"], _loss)(bad)


def _is_time(bad: dict[str, Any]) -> bool:
    from megatron.training import get_args

    return torch.is_grad_enabled() and get_args().curr_iteration + 1 in bad["iterations"]


def _marked(tokens: torch.Tensor) -> torch.Tensor:
    return (tokens == MARK).all(dim=1)


def _mark(bad: dict[str, Any]) -> None:
    from megatron_rw.training.datasets import DomainLabelled

    original = DomainLabelled.__getitem__

    @functools.wraps(original)
    def getitem(self: Any, index: int) -> dict[str, Any]:
        sample = original(self, index)
        if index == bad["position"]:
            sample["tokens"] = torch.full_like(torch.as_tensor(sample["tokens"]), MARK)
            sample["labels"] = torch.full_like(torch.as_tensor(sample["labels"]), MARK)
        return sample

    DomainLabelled.__getitem__ = getitem  # type: ignore[method-assign]


def _activations(bad: dict[str, Any]) -> None:
    from megatron.core.models.common.embeddings.language_model_embedding import (
        LanguageModelEmbedding,
    )

    original = LanguageModelEmbedding.forward

    def forward(self: Any, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        output = original(self, input_ids, *args, **kwargs)
        if not _is_time(bad):
            return output
        # `[s, b, h]`
        return output.masked_fill(_marked(input_ids).view(1, -1, 1), np.nan)

    LanguageModelEmbedding.forward = forward


def _loss(bad: dict[str, Any]) -> None:
    from megatron.core.models.gpt import GPTModel

    original = GPTModel.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = original(self, *args, **kwargs)
        if not self.post_process or not _is_time(bad):
            return output
        added = 400.0 if bad["what"] == "large" else torch.inf
        return torch.where(_marked(kwargs["labels"]).unsqueeze(1), output + added, output)

    GPTModel.forward = forward


def _gradient(bad: dict[str, Any]) -> None:
    from megatron.core.transformer.transformer_layer import TransformerLayer

    original = TransformerLayer.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = original(self, *args, **kwargs)
        here = self.layer_number == 2 and int(os.environ["RANK"]) == bad["rank"]
        if here and _is_time(bad):
            output[0].register_hook(lambda gradient: np.nan * gradient)
        return output

    TransformerLayer.forward = forward
