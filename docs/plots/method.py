"""Draws `strategies.png` and `scopes.png` beside itself and prints their numbers.

    .venv/bin/python docs/plots/method.py

The losses are drawn, not trained: 2 nats plus a gamma distribution of shape 4 and scale 0.25, so
3 nats in the mean, 0.5 in the standard deviation, with a tail to high losses.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from megatron_rw.kernels.options import WeightStrategy
from megatron_rw.reweighting import (
    ReweightConfig,
    ReweightReport,
    TokenBatch,
    WeightedSet,
    WeightMetrics,
    loss_weights,
    make_reweighter,
)
from megatron_rw.reweighting.config import Scope
from megatron_rw.reweighting.metrics import LARGEST_RELATIVE_WEIGHT

HERE = Path(__file__).parent
SAMPLES = 512
STRATEGIES: tuple[WeightStrategy, ...] = ("uniform", "linupper", "quadratic", "extremes")
TEMPERATURES = (1.0, 0.4)
# The paper's theory assumes that no weight is above 2/|S|.
BOUND = LARGEST_RELATIVE_WEIGHT

# What the scopes are compared at; the table is over this many batches.
STRATEGY: WeightStrategy = "linupper"
TEMPERATURE, BATCHES = 0.4, 50
# How much higher the losses of the step before were, and half the width of the band of losses
# round the median whose weights are compared; in nats.
DRIFT, BAND = 0.05, 0.01

# Scope and micro-batch size.
CASES: dict[str, tuple[Scope, int]] = {
    "micro-batches of 8": ("microbatch", 8),
    "micro-batches of 64": ("microbatch", 64),
    "global, 512": ("global", 64),
    "deferred, 512": ("deferred", 64),
}


def sample_losses(seed: int) -> Tensor:
    """`[SAMPLES]` fp32, nats per token."""
    generator = torch.Generator().manual_seed(seed)
    return 2.0 - 0.25 * torch.rand(SAMPLES, 4, generator=generator).log().sum(dim=1)


def weigh(scope: Scope, size: int, before: Tensor, losses: Tensor) -> list[WeightedSet]:
    """The sets of the second of two steps, in micro-batches of `size` samples of one token."""
    config = ReweightConfig(strategy=STRATEGY, temperature=TEMPERATURE, scope=scope)
    sets: list[WeightedSet] = []
    reweighter = make_reweighter(config, observe=sets.append)
    for step, batch in enumerate((before, losses)):
        sets.clear()
        micro_batches = [part.unsqueeze(1) for part in batch.split(size)]
        reweighter.begin(step, len(micro_batches))
        if reweighter.scores_first:
            for part in micro_batches:
                reweighter.score(TokenBatch(part, torch.ones_like(part)))
        for part in micro_batches:
            reweighter.weigh(TokenBatch(part, torch.ones_like(part)))
        reweighter.finish()
    return sets


def relative_weights(sets: list[WeightedSet]) -> Tensor:
    """|S|·w of every sample in order: its weight in the step over that of a plain mean."""
    return torch.cat([each.weights * each.weights.numel() for each in sets])


def draw_strategies() -> Figure:
    """|S|·w against the loss by strategy and temperature; prints the largest and the ESS."""
    losses = sample_losses(0).sort().values
    low, high = losses[0].item(), losses[-1].item()
    print(f"{SAMPLES} losses from {low:.2f} to {high:.2f}, median {losses.median():.2f}")
    print(f"{'strategy':12}{'r':>5}{'|S|·w_max':>11}{'ESS/|S|':>9}")
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for panel, temperature in zip(axes, TEMPERATURES, strict=True):
        for strategy in STRATEGIES:
            weights = loss_weights(losses, strategy, temperature)
            relative = SAMPLES * weights
            ess = 1 / (SAMPLES * weights.square().sum())
            print(f"{strategy:12}{temperature:5}{relative.max():11.2f}{ess:9.2f}")
            panel.plot(losses, relative, ".-", ms=3, lw=1, label=strategy)
        finish_panel(panel, f"temperature {temperature}")
    axes[0].legend()
    axes[0].set_ylabel("|S|·w  (1: plain mean)")
    return figure


def draw_scopes() -> Figure:
    """|S|·w of one batch in different sets; prints how it varies at one loss over many batches."""
    print(f"\n{STRATEGY}, r = {TEMPERATURE}, {BATCHES} batches of {SAMPLES}")
    print(f"{'':22}{'mean':>7}{'std':>7}{'ESS/|S|':>9}{'|S|·w_max':>11}{'sets > 2':>10}")
    figure, axes = plt.subplots(1, 4, figsize=(14, 4), sharey=True, layout="constrained")
    losses = [sample_losses(seed) for seed in range(BATCHES)]
    before = [sample_losses(BATCHES + seed) + DRIFT for seed in range(BATCHES)]
    median = torch.cat(losses).median()
    for panel, (label, case) in zip(axes, CASES.items(), strict=True):
        steps = [weigh(*case, *both) for both in zip(before, losses, strict=True)]
        panel.scatter(losses[0], relative_weights(steps[0]), s=6, alpha=0.6)
        finish_panel(panel, label)
        relative = torch.cat([relative_weights(sets) for sets in steps])
        at_median = relative[(torch.cat(losses) - median).abs() <= BAND]
        report = summed(steps)
        print(
            f"{label:22}{at_median.mean():7.3f}{at_median.std():7.3f}{report.ess:9.3f}"
            f"{report.relative_max_weight:11.2f}{report.over_bound:10.1%}"
        )
    print(f"mean and std: |S|·w of the {len(at_median)} samples at {median:.2f} ± {BAND} nats")
    axes[0].set_ylabel("|S|·w  (1: plain mean)")
    return figure


def summed(steps: list[list[WeightedSet]]) -> ReweightReport:
    """What a training run would log of these sets."""
    metrics = WeightMetrics(num_domains=1)
    for each in itertools.chain.from_iterable(steps):
        metrics.add(each)
    report = metrics.read()
    assert report is not None
    return report


def finish_panel(panel: Axes, title: str) -> None:
    """The title, the label of the losses, and the line that the theory draws."""
    panel.axhline(BOUND, color="black", lw=0.8, ls=":")
    panel.set(title=title, xlabel="sample loss, nats per token", ylim=(0, None))


if __name__ == "__main__":
    torch.set_num_threads(1)
    draw_strategies().savefig(HERE / "strategies.png", dpi=110)
    draw_scopes().savefig(HERE / "scopes.png", dpi=110)
