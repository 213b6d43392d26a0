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

from megatron_rw.kernels import Weighting
from megatron_rw.reweighting import ReweightConfig, weighting_at
from tests.reweighting import oracle

VOCAB, HIDDEN, FFN, LAYERS = 24, 8, 16, 4
BINS = 4096
Parameters = dict[str, Tensor]


def parameters(seed: int) -> Parameters:
    """fp64 parameters that fp32 represents exactly."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"embedding": (VOCAB, HIDDEN), "output": (VOCAB, HIDDEN)}
    for layer in range(LAYERS):
        shapes |= {f"up.{layer}": (FFN, HIDDEN), f"down.{layer}": (HIDDEN, FFN)}
    return {n: (torch.randn(*s, generator=generator) * 0.7).double() for n, s in shapes.items()}


@dataclass(frozen=True)
class Samples:
    """`[n, s]` each: tokens, labels, and a mask that is 1 where a label counts.

    And of each label the number of its document, the loss of a reference, and a static weight.
    """

    tokens: Tensor
    labels: Tensor
    mask: Tensor
    documents: Tensor | None = None
    reference: Tensor | None = None
    weights: Tensor | None = None

    def __getitem__(self, rows: slice) -> Samples:
        return Samples(*(None if part is None else part[rows] for part in vars(self).values()))  # type: ignore[arg-type]


def token_logits(p: Parameters, samples: Samples) -> Tensor:
    """`[n, s, V]` of a micro-batch."""
    x = p["embedding"][samples.tokens]
    for layer in range(LAYERS):
        x = x + functional.gelu(x @ p[f"up.{layer}"].T) @ p[f"down.{layer}"].T
    return x @ p["output"].T


def token_losses(p: Parameters, sets: Sequence[Samples]) -> list[Tensor]:
    """`[n, s]` cross-entropies of every micro-batch."""
    return [
        functional.cross_entropy(
            token_logits(p, samples).transpose(1, 2), samples.labels, reduction="none"
        )
        for samples in sets
    ]


def token_signals(
    p: Mapping[str, Tensor], sets: Sequence[Samples], config: ReweightConfig
) -> list[Tensor]:
    """`[n, s]` signals of every micro-batch, NaN where there is none."""
    p = {name: value.detach().double() for name, value in p.items()}
    losses = token_losses(p, sets)
    if config.signal == "loss":
        return losses
    if config.signal == "entropy":
        logits = [token_logits(p, samples).log_softmax(dim=-1) for samples in sets]
        return [-(log.exp() * log).sum(dim=-1) for log in logits]
    pairs = zip(losses, sets, strict=True)
    excess = [loss - samples.reference.double() for loss, samples in pairs]  # type: ignore[union-attr]
    return [-signal if config.signal == "progress" else signal for signal in excess]


@dataclass
class Unit:
    """What competes for weight: its loss with gradient, its signal and its base weight."""

    loss: Tensor
    signal: float
    base: float


def units_of(
    losses: Tensor, signals: Tensor, samples: Samples, config: ReweightConfig
) -> list[Unit]:
    """The units of a micro-batch that have an active token, one after the other."""
    found = []
    for row in range(len(losses)):
        tokens: dict[int, list[int]] = {}
        for t in range(losses.shape[1]):
            place = {"sequence": 0, "token": t}.get(config.unit)
            if place is None:
                place = int(samples.documents[row, t])  # type: ignore[index]
            if samples.mask[row, t]:
                tokens.setdefault(place, []).append(t)
        for members in tokens.values():
            values = [float(signals[row, t]) for t in members]
            known = [value for value in values if math.isfinite(value)]
            base = 1.0
            if samples.weights is not None and config.sample_weights is not None:
                base = math.fsum(samples.weights[row, members].tolist()) / len(members)
            base *= len(members) if config.normalizer == "token" else 1
            signal = math.fsum(known) / len(known) if known else 0.0
            found.append(Unit(losses[row, members].mean(), signal, base))
    return found


def plan_of(units: Sequence[Unit], how: Weighting, config: ReweightConfig) -> oracle.Plan:
    """The plan of a set; of its histogram where units are not gathered and ends do not do."""
    members = [unit for unit in units if unit.base > 0]
    signals, base = [u.signal for u in members], [u.base for u in members]
    searches = how.strategy == "topk" or how.range == "quantile" or how.target_ess or how.max_weight
    if config.unit == "sequence" or not searches:
        return oracle.plan(signals, how, base, [1.0] * len(base))
    low, high = min(signals), max(signals)
    width = (high - low) / (BINS - 1)
    counts, mass = [0.0] * BINS, [0.0] * BINS
    for signal, b in zip(signals, base, strict=True):
        place = BINS - 1 if signal >= high else min(int((signal - low) / width), BINS - 2)
        counts[place] += 1
        mass[place] += b
    edges = [low + width * max(place - 0.01, 0.0) for place in range(BINS - 1)] + [high]
    rows = [row for row in zip(edges, mass, counts, strict=True) if row[2]]
    return oracle.plan([r[0] for r in rows], how, [r[1] for r in rows], [r[2] for r in rows])


def planned_weights(units: Sequence[Unit], how: Weighting, plan: oracle.Plan) -> list[float]:
    """Base times exp(h/r) by a plan, normalised."""
    weights = [unit.base * oracle.planned(unit.signal, how, plan) for unit in units]
    return [weight / math.fsum(weights) for weight in weights]


class Oracle:
    """The gradients of a run, one step after the other.

    Attributes:
        seen: For the scope `deferred`, the plan that the steps before have left.
    """

    def __init__(self, config: ReweightConfig) -> None:
        self.config = config
        self.seen = oracle.EMPTY_PLAN
        self.step = 0

    def gradient(
        self,
        parameters: Mapping[str, Tensor],
        token_losses: Callable[[Parameters], list[Tensor]],
        sets: Sequence[Samples],
        signals: Sequence[Tensor] | None = None,
    ) -> Parameters:
        """That of the next step's objective.

        Args:
            parameters: By name; the gradient is computed in fp64.
            token_losses: Gives one `[n, s]` per micro-batch, over all data-parallel ranks.
            sets: As many micro-batches.
            signals: As many `[n, s]`; those of the losses where None.
        """
        leaves = {name: p.detach().double().requires_grad_() for name, p in parameters.items()}
        losses = token_losses(leaves)
        if signals is None:
            signals = [loss.detach() for loss in losses]
        self._objective(losses, signals, sets).backward()
        return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}

    def _objective(
        self, losses: Sequence[Tensor], signals: Sequence[Tensor], sets: Sequence[Samples]
    ) -> Tensor:
        """The sum of weight times loss, the weights constant; moves on to the next step."""
        config, how = self.config, weighting_at(self.config, self.step)
        parts = [units_of(*part, config) for part in zip(losses, signals, sets, strict=True)]
        if config.scope != "microbatch":
            parts = [[unit for part in parts for unit in part]]
        total = losses[0].sum() * 0.0
        for units in filter(None, parts):
            if config.scope == "deferred":
                weights = planned_weights(units, how, self.seen)
            elif config.unit != "sequence":
                weights = planned_weights(units, how, plan_of(units, how, config))
            else:
                signal, base = [u.signal for u in units], [u.base for u in units]
                weights = oracle.weights(signal, how, None, base)
            for weight, unit in zip(weights, units, strict=True):
                total = total + weight * unit.loss / len(parts)
            # A moving average; a step without units leaves it as it is.
            latest, decay = plan_of(units, how, config), config.moment_decay
            if not math.isfinite(self.seen[0]):
                self.seen = latest
            pairs = zip(self.seen, latest, strict=True)
            self.seen = tuple(decay * old + (1 - decay) * new for old, new in pairs)  # type: ignore[assignment]
        self.step += 1
        return total
