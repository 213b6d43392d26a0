"""Runs the fp64 oracle in `pretrain_gpt_rw.py`, on one process, on its own model and batches.

Before every step the step's micro-batches are drawn, and the oracle's gradient on them and on the
model in fp64 is written to `oracle/NNN.pth` beside Megatron's own gradient dump.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

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


def install() -> None:
    """Puts the oracle before every step."""
    from megatron.core.num_microbatches_calculator import get_num_microbatches
    from megatron.core.utils import unwrap_model
    from megatron.training import get_args, training

    from megatron_rw.training.settings import Settings

    original = training.train_step
    state: dict[str, oracle.Range] = {"seen": None}

    # Under its signature: the program asks for arguments by name.
    @functools.wraps(original)
    def train_step(forward_step: Any, data: Any, model: Any, *rest: Any, **named: Any) -> Any:
        args = get_args()
        config = Settings.of(args, "cpu").reweight
        batches = [next(data) for _ in range(get_num_microbatches())]
        gradient, latest = oracle_gradient(unwrap_model(model[0]), batches, config, state["seen"])
        state["seen"] = oracle.mixed(state["seen"], latest, config.moment_decay)
        folder = Path(args.save) / "oracle"
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(gradient, folder / f"{args.curr_iteration + 1:03d}.pth")
        return original(forward_step, iter(batches), model, *rest, **named)

    training.train_step = train_step
