"""`pretrain_gpt_rw.py` on one process, with the gradient of the fp64 oracle in place of its own.

The oracle computes it on the program's model and micro-batches. The program goes on with it, so
that its norm is logged and Adam's state in the checkpoint has it, as in a run without the oracle.
"""

from __future__ import annotations

import functools
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional

from tests.exactness import oracle


def token_losses(model: torch.nn.Module, batches: list[Any], p: oracle.Parameters) -> list[Tensor]:
    """Of the micro-batches, from the model's own logits with other parameters."""
    losses = []
    for batch in batches:
        inputs = (batch["tokens"], batch["position_ids"], None)
        logits = torch.func.functional_call(model, p, inputs).transpose(1, 2)
        assert logits.dtype == torch.float64
        losses.append(functional.cross_entropy(logits, batch["labels"], reduction="none"))
    return losses


def main() -> None:
    """Run the program with the oracle in every step."""
    from megatron.core.num_microbatches_calculator import get_num_microbatches
    from megatron.core.utils import unwrap_model
    from megatron.training import get_args, training

    import pretrain_gpt_rw
    from megatron_rw.training.settings import Settings

    original = training.train_step
    gradients: oracle.Oracle | None = None

    # Under its signature: the program asks for arguments by name.
    @functools.wraps(original)
    def train_step(
        forward_step: Any, data: Any, model: Any, optimizer: Any, *rest: Any, **named: Any
    ) -> Any:
        nonlocal gradients
        gradients = gradients or oracle.Oracle(Settings.of(get_args(), "cpu").reweight)
        batches = [next(data) for _ in range(get_num_microbatches())]
        network = unwrap_model(model[0])
        gradient = gradients.gradient(
            dict(network.named_parameters()),
            functools.partial(token_losses, network, batches),
            [oracle.Samples(*(b[k] for k in ("tokens", "labels", "loss_mask"))) for b in batches],
        )
        step = optimizer.step

        def step_with_oracle() -> Any:
            for name, parameter in network.named_parameters():
                parameter.main_grad.copy_(gradient[name])
            return step()

        with mock.patch.object(optimizer, "step", step_with_oracle):
            return original(forward_step, iter(batches), model, optimizer, *rest, **named)

    training.train_step = train_step
    pretrain_gpt_rw.main()
