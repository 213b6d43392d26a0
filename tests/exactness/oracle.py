"""The gradient of one training step in a single process, in fp64, term by term as defined.

A token-wise network (embedding, residual MLP layers, output) in plain torch: no attention, so that
context parallelism can be tested on it without an attention kernel that supports it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
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


def token_losses(p: Parameters, sets: Sequence[Samples]) -> list[Tensor]:
    """`[n, s]` cross-entropies of every micro-batch."""
    losses = []
    for samples in sets:
        x = p["embedding"][samples.tokens]
        for layer in range(LAYERS):
            x = x + functional.gelu(x @ p[f"up.{layer}"].T) @ p[f"down.{layer}"].T
        logits = (x @ p["output"].T).transpose(1, 2)
        losses.append(functional.cross_entropy(logits, samples.labels, reduction="none"))
    return losses


def deferred_weights(losses: list[float], config: ReweightConfig, seen: Range) -> list[float]:
    """exp(h(u)/r)/Σ with u from the range `seen`, clamped; all alike where there is none.

    A loss that is not a number, of a sample without an active token, has no weight.
    """
    scores = []
    for loss in losses:
        if math.isnan(loss):
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


class Oracle:
    """The gradients of a run, one step after the other.

    Attributes:
        seen: For the scope `deferred`, the range of sample losses from the steps before.
    """

    def __init__(self, config: ReweightConfig) -> None:
        self.config = config
        self.seen: Range = None

    def gradient(
        self,
        parameters: Mapping[str, Tensor],
        token_losses: Callable[[Parameters], list[Tensor]],
        masks: Sequence[Tensor],
    ) -> Parameters:
        """That of the next step's objective.

        Args:
            parameters: By name; the gradient is computed in fp64.
            token_losses: Gives one `[n, s]` per micro-batch, over all data-parallel ranks.
            masks: As many, 1 where a token counts.
        """
        leaves = {name: p.detach().double().requires_grad_() for name, p in parameters.items()}
        self._objective(token_losses(leaves), masks).backward()
        return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}

    def _objective(self, losses: Sequence[Tensor], masks: Sequence[Tensor]) -> Tensor:
        """The sum of weight times sample loss, the weights constant; moves on to the next step."""
        config = self.config
        sets: list[list[Tensor | None]] = [
            [(row * m).sum() / m.sum() if m.sum() else None for row, m in zip(*pair, strict=True)]
            for pair in zip(losses, (mask.double() for mask in masks), strict=True)
        ]
        if config.scope != "microbatch":
            sets = [[loss for members in sets for loss in members]]
        total = losses[0].sum() * 0.0
        finite = []
        for members in sets:
            values = [math.nan if loss is None else loss.item() for loss in members]
            finite += [value for value in values if math.isfinite(value)]
            if config.scope == "deferred":
                weights = deferred_weights(values, config, self.seen)
            else:
                settings = (config.strategy, config.temperature, config.delta)
                weights = oracle.weights(values, *settings)
            for weight, loss in zip(weights, members, strict=True):
                if loss is not None:
                    total = total + weight * loss / len(sets)
        # A moving average; a step without samples leaves it as it is.
        if finite:
            latest, decay = (min(finite), max(finite)), config.moment_decay
            low, high = self.seen or latest
            self.seen = (
                decay * low + (1 - decay) * latest[0],
                decay * high + (1 - decay) * latest[1],
            )
        return total
