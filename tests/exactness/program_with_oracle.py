"""`pretrain_gpt_rw.py` on one process, with the gradient of the fp64 oracle in place of its own.

The oracle computes it on the program's model and micro-batches. The program goes on with it, so
that its norm is logged and Adam's state in the checkpoint has it, as in a run without the oracle.
"""

from __future__ import annotations

import functools
from typing import Any
from unittest import mock

import torch
from torch.nn import functional

from tests.exactness import oracle


def oracle_gradient(
    model: torch.nn.Module, batches: list[dict[str, Any]], config: Any, seen: oracle.Range
) -> tuple[oracle.Parameters, oracle.Range]:
    """Gradient by parameter name; the oracle's objective over the model's own logits in fp64."""
    leaves = {
        name: parameter.detach().double().requires_grad_()
        for name, parameter in model.named_parameters()
    }
    losses, masks = [], []
    for batch in batches:
        inputs = (batch["tokens"], batch["position_ids"], None)
        logits = torch.func.functional_call(model, leaves, inputs)
        assert logits.dtype == torch.float64
        losses.append(
            functional.cross_entropy(logits.transpose(1, 2), batch["labels"], reduction="none")
        )
        masks.append(batch["loss_mask"].double())
    total, latest = oracle.objective(losses, masks, config, seen)
    total.backward()
    return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}, latest


def main() -> None:
    """Run the program with the oracle in every step."""
    from megatron.core.num_microbatches_calculator import get_num_microbatches
    from megatron.core.utils import unwrap_model
    from megatron.training import get_args, training

    import pretrain_gpt_rw
    from megatron_rw.training.settings import Settings

    original = training.train_step
    seen: oracle.Range = None

    # Under its signature: the program asks for arguments by name.
    @functools.wraps(original)
    def train_step(
        forward_step: Any, data: Any, model: Any, optimizer: Any, *rest: Any, **named: Any
    ) -> Any:
        nonlocal seen
        config = Settings.of(get_args(), "cpu").reweight
        batches = [next(data) for _ in range(get_num_microbatches())]
        network = unwrap_model(model[0])
        gradient, latest = oracle_gradient(network, batches, config, seen)
        seen = oracle.mixed(seen, latest, config.moment_decay)
        step = optimizer.step

        def step_with_oracle() -> Any:
            for name, parameter in network.named_parameters():
                parameter.main_grad.copy_(gradient[name])
            return step()

        with mock.patch.object(optimizer, "step", step_with_oracle):
            return original(forward_step, iter(batches), model, optimizer, *rest, **named)

    training.train_step = train_step
    pretrain_gpt_rw.main()
