"""AdamW for the CPU platform, with the state layout of apex's FusedAdam."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim.adam import adam
from torch.optim.adamw import adamw


class CPUAdam(torch.optim.Optimizer):
    """Adam or AdamW whose step count lives in the parameter group.

    The arithmetic is torch's own functional implementation; only where the step count is kept
    differs from `torch.optim.AdamW`. Megatron's distributed optimizer saves and reshards that
    layout alone.

    Args:
        params: parameters or parameter groups, fp32.
        lr: learning rate.
        betas: decay rates of the first and second moment.
        eps: added to the denominator.
        weight_decay: decoupled when `adam_w_mode`, otherwise added to the gradient.
        adam_w_mode: AdamW (decoupled weight decay) rather than Adam.
        capturable: must be False; there are no CUDA graphs on the CPU.
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
        """Update every parameter that has a gradient.

        Args:
            closure: not supported; Megatron never passes one.
        """
        assert closure is None
        update = adamw if self.adam_w_mode else adam
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            # An empty group must not count steps: Megatron compares the counts of the others.
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
