"""The gradient of one training step in a single process, in fp64, term by term as defined.

A token-wise network (embedding, residual MLP layers, output) in plain torch: no attention, so that
context parallelism can be tested on it without an attention kernel that supports it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from megatron_rw.reweighting import ReweightConfig
from tests.reweighting import oracle

VOCAB, HIDDEN, FFN, LAYERS = 24, 8, 16, 4
Parameters = dict[str, Tensor]
Range = tuple[float, float] | None


def parameters(seed: int) -> Parameters:
    """fp64 parameters that fp32 represents exactly."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"embedding": (VOCAB, HIDDEN), "output": (VOCAB, HIDDEN)}
    for layer in range(LAYERS):
        shapes |= {f"up.{layer}": (FFN, HIDDEN), f"down.{layer}": (HIDDEN, FFN)}
    return {n: (torch.randn(*s, generator=generator) * 0.7).double() for n, s in shapes.items()}


@dataclass(frozen=True)
class Samples:
    """`[n, s]` each: tokens, labels, and a mask that is 1 where a label counts."""

    tokens: Tensor
    labels: Tensor
    mask: Tensor

    def __getitem__(self, rows: slice) -> Samples:
        return Samples(self.tokens[rows], self.labels[rows], self.mask[rows])


def token_losses(p: Parameters, samples: Samples) -> Tensor:
    """`[n, s]` cross-entropy."""
    x = p["embedding"][samples.tokens]
    for layer in range(LAYERS):
        x = x + functional.gelu(x @ p[f"up.{layer}"].T) @ p[f"down.{layer}"].T
    return functional.cross_entropy(
        (x @ p["output"].T).transpose(1, 2), samples.labels, reduction="none"
    )


def deferred_weights(losses: Sequence[float | None], config: ReweightConfig, seen: Range) -> list:
    """exp(h(u)/r)/Σ with u from the range `seen`, clamped; all alike where there is none."""
    scores = []
    for loss in losses:
        if loss is None:
            scores.append(-math.inf)
        elif seen is None or seen[1] - seen[0] < oracle.COLLAPSED_RANGE:
            scores.append(0.0)
        else:
            u = 2 * config.delta * (loss - seen[0]) / (seen[1] - seen[0]) - config.delta
            u = min(max(u, -config.delta), config.delta)
            scores.append(oracle.score(u, config.strategy, config.delta))
    unnormalised = [math.exp(h / config.temperature) for h in scores]
    total = math.fsum(unnormalised)
    return [w / total if total else 0.0 for w in unnormalised]


def step_gradient(
    p: Parameters, sets: Sequence[Samples], config: ReweightConfig, seen: Range = None
) -> tuple[Parameters, Range]:
    """Gradient of the step's objective with constant weights, and the range of its losses.

    Args:
        p: fp64 parameters.
        sets: the step's micro-batches, each over all data-parallel ranks.
        config: scope and strategy.
        seen: for the scope `deferred`, the range from the steps before.
    """
    leaves = {name: value.clone().requires_grad_() for name, value in p.items()}
    sample_losses = []
    for samples in sets:
        ce, mask = token_losses(leaves, samples), samples.mask.double()
        sample_losses.append(
            [
                (row * m).sum() / m.sum() if m.sum() else None
                for row, m in zip(ce, mask, strict=True)
            ]
        )
    if config.scope != "microbatch":
        sample_losses = [[loss for losses in sample_losses for loss in losses]]
    objective = torch.zeros((), dtype=torch.float64)
    for losses in sample_losses:
        values = [None if loss is None else loss.item() for loss in losses]
        if config.scope == "deferred":
            weights = deferred_weights(values, config, seen)
        else:
            active = [value is not None for value in values]
            weights = oracle.weights(
                [value or 0.0 for value in values],
                config.strategy,
                config.temperature,
                config.delta,
                active,
            )
        for weight, loss in zip(weights, losses, strict=True):
            if loss is not None:
                objective = objective + weight * loss / len(sample_losses)
    if objective.requires_grad:
        objective.backward()
    finite = [loss.item() for losses in sample_losses for loss in losses if loss is not None]
    gradients = {
        name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        for name, leaf in leaves.items()
    }
    return gradients, (min(finite), max(finite)) if finite else None
