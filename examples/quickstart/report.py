"""Draws two runs of the same model, one without reweighting and one with it.

Reads the `metrics.jsonl` that `--log-dir` writes. What `tools/compare_runs.py` says of the runs is
the result; this shows what the method did. Writes `--output`, a picture.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

Record = Mapping[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    parser = argparse.ArgumentParser(description="Draw what reweighting did.")
    parser.add_argument("--baseline", type=Path, required=True, metavar="DIR")
    parser.add_argument("--reweighted", type=Path, required=True, metavar="DIR")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.png")
    args = parser.parse_args(argv)
    draw(records(args.baseline), records(args.reweighted), args.reweighted.name, args.output)
    return 0


def records(folder: Path) -> dict[str, dict[int, Record]]:
    """A run's records by type and iteration; the later of two for the same iteration counts."""
    found: dict[str, dict[int, Record]] = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        found.setdefault(record["type"], {})[record["iteration"]] = record
    return found


def draw(
    baseline: Mapping[str, Mapping[int, Record]],
    reweighted: Mapping[str, Mapping[int, Record]],
    name: str,
    path: Path,
) -> None:
    """Draws weight against loss, weight by domain, and the differences from the baseline."""
    mpl.rcParams["axes.titlesize"] = 11
    figure, axes = plt.subplots(2, 2, figsize=(11, 7.5), layout="constrained")
    colours = {domain: f"C{i}" for i, domain in enumerate(_domains(baseline))}
    steps = list(reweighted["train"].values())
    _draw_weights(axes[0, 0], steps, colours)
    _draw_shares(axes[0, 1], steps, colours)
    before, after = baseline["validation"], reweighted["validation"]
    common = sorted(before.keys() & after.keys())
    differences = {
        domain: [_loss(after[at], domain) - _loss(before[at], domain) for at in common]
        for domain in colours
    }
    losses = {domain: _loss(before[common[-1]], domain) for domain in colours}
    _draw_curves(axes[1, 0], common, differences, name, colours)
    _draw_domains(axes[1, 1], losses, differences, name, colours)
    axes[1, 1].set_title(
        f"The same after step {common[-1]}, and the baseline's loss\n"
        "One run each: this cannot tell better from luck"
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _domains(run: Mapping[str, Mapping[int, Record]]) -> list[str]:
    return sorted(next(iter(run["validation"].values()))["domains"])


def _draw_weights(axes: Axes, steps: Sequence[Record], colours: Mapping[str, str]) -> None:
    """Weights are relative to the losses of their step, so that each step has its own curve."""
    for step in steps[-10:-1]:
        axes.scatter(*_points(step, step["samples"]), s=6, color="#cccccc", label="_")
    for domain, colour in colours.items():
        samples = [s for s in steps[-1]["samples"] if s["domain"] == domain]
        axes.scatter(*_points(steps[-1], samples), s=22, color=colour, label=domain)
    axes.axhline(1, color="black", lw=0.8, ls=":")
    axes.set(
        title=f"Weights in step {steps[-1]['iteration']} (grey: the nine logged before)\n"
        "Each step has its own curve: losses are scaled to the step's range",
        xlabel="sample loss, nats per token",
        ylabel="weight x set size",
    )
    axes.legend(fontsize="small")


def _points(step: Record, samples: Sequence[Record]) -> tuple[list[float], list[float]]:
    size = step["reweight"]["set_size"]
    kept = [(s["loss"], s["weight"] * size) for s in samples if s["loss"] is not None]
    return [loss for loss, _ in kept], [weight for _, weight in kept]


def _draw_shares(axes: Axes, steps: Sequence[Record], colours: Mapping[str, str]) -> None:
    for domain, colour in colours.items():
        points = [
            (step["iteration"], ratio)
            for step in steps
            if (ratio := step["reweight"]["domains"].get(domain, {}).get("weight_ratio"))
        ]
        axes.plot(*zip(*points, strict=True), color=colour, lw=1.2, label=domain)
    axes.axhline(1, color="black", lw=0.8, ls=":")
    axes.set(
        title="Share of the weight over share of the samples\nAbove 1, a domain weighs more",
        xlabel="step",
        ylabel="ratio",
    )


def _draw_curves(
    axes: Axes,
    steps: Sequence[int],
    differences: Mapping[str, Sequence[float]],
    name: str,
    colours: Mapping[str, str],
) -> None:
    for domain, colour in colours.items():
        axes.plot(steps, differences[domain], "o-", color=colour, label=domain)
    axes.axhline(0, color="black", lw=0.8, ls=":")
    axes.set(
        title=f"Validation loss of {name} minus that of the baseline\nBelow 0, {name} is better",
        xlabel="step",
        ylabel="nats per token",
    )


def _draw_domains(
    axes: Axes,
    losses: Mapping[str, float],
    differences: Mapping[str, Sequence[float]],
    name: str,
    colours: Mapping[str, str],
) -> None:
    """Draws the last differences, with the baseline's losses."""
    for row, (domain, colour) in enumerate(colours.items()):
        difference = differences[domain][-1]
        axes.plot([0, difference], [row, row], color=colour, lw=2)
        axes.plot(difference, row, "o", color=colour, ms=9)
        axes.annotate(
            f"{difference:+.3f} of {losses[domain]:.2f}",
            (difference, row),
            xytext=(0, 9),
            textcoords="offset points",
            ha="center",
        )
    axes.axvline(0, color="black", lw=0.8, ls=":")
    axes.set_yticks(range(len(colours)), list(colours))
    axes.margins(x=0.25, y=0.25)
    axes.set_xlabel(f"nats per token, {name} minus baseline")


def _loss(record: Record, domain: str) -> float:
    return float(record["domains"][domain]["lm_loss"])


if __name__ == "__main__":
    sys.exit(main())
