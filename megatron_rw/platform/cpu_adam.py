"""AdamW for the CPU platform, with the state layout of apex's FusedAdam."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim.adam import adam
from torch.optim.adamw import adamw


class CPUAdam(torch.optim.Optimizer):
    """Adam, or AdamW with `adam_w_mode`, on fp32, whose step count is kept in the parameter group.

    Megatron's distributed optimizer can only save and reshard that layout. In all else it is
    `torch.optim.AdamW`, whose functional implementation it calls. `capturable` must be False,
    because there are no CUDA graphs on the CPU.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        capturable: bool = False,
    ) -> None:
        if capturable:
            raise ValueError("--optimizer-cuda-graph needs a GPU; drop it to run on the CPU.")
        self.adam_w_mode = adam_w_mode
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Updates every parameter that has a gradient. Megatron never passes a closure."""
        assert closure is None
        update = adamw if self.adam_w_mode else adam
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            # An empty group has no step count, because Megatron compares the groups' counts.
            if not group["params"]:
                continue
            group["step"] = group.get("step", 0) + 1
            for p in params:
                if not self.state[p]:
                    self.state[p]["exp_avg"] = torch.zeros_like(p)
                    self.state[p]["exp_avg_sq"] = torch.zeros_like(p)
            update(
                params,
                [p.grad for p in params],
                [self.state[p]["exp_avg"] for p in params],
                [self.state[p]["exp_avg_sq"] for p in params],
                [],
                [torch.tensor(float(group["step"] - 1)) for _ in params],
                fused=True,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )
