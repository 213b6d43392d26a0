"""Draws and tabulates two runs of the same model: one without reweighting, one with it.

Reads the `metrics.jsonl` that `--log-dir` writes; works on any two runs whose domains agree.
Writes `<output>.png` and `<output>.txt`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

Record = dict[str, Any]
COLOURS = {"baseline": "#888888", "reweighted": "#d1495b"}


@dataclass(frozen=True)
class Run:
    """The records of one run, the later of two for the same iteration."""

    name: str
    train: list[Record]
    validation: list[Record]

    @classmethod
    def load(cls, folder: Path, name: str) -> Run:
        """Read `metrics.jsonl` of a run.

        Raises:
            SystemExit: it is missing or has no validation.
        """
        path = folder / "metrics.jsonl"
        if not path.exists():
            sys.exit(f"error: {path}: no such file; train with --log-dir {folder}")
        records = [json.loads(line) for line in path.read_text().splitlines()]
        by_type: dict[str, dict[int, Record]] = {"train": {}, "validation": {}, "test": {}}
        for record in records:
            by_type[record["type"]][record["iteration"]] = record
        if not by_type["validation"]:
            sys.exit(f"error: {path}: no validation; train with --eval-interval and --eval-iters")
        return cls(name, list(by_type["train"].values()), list(by_type["validation"].values()))

    @property
    def final(self) -> Record:
        """The last validation."""
        return self.validation[-1]

    def curve(self, records: Sequence[Record], *path: str) -> tuple[list[int], list[float]]:
        """Iterations and values of a nested field."""
        found = [(r["iteration"], _get(r, path)) for r in records]
        points = [(iteration, value) for iteration, value in found if value is not None]
        return [i for i, _ in points], [v for _, v in points]


def _get(record: Record, path: Sequence[str]) -> Any:
    value: Any = record
    for key in path:
        if not isinstance(value, dict) or key not in value:
            return None
        value = value[key]
    return value


def mean_over_training(run: Run, domain: str, key: str) -> float:
    """Mean of a domain's field over the logged steps with reweighting."""
    _, values = run.curve(run.train, "reweight", "domains", domain, key)
    return sum(values) / len(values)


def draw(baseline: Run, reweighted: Run, path: Path) -> None:
    """Loss curves, weight against loss, ESS over time, and validation loss by domain."""
    figure, axes = plt.subplots(2, 2, figsize=(11, 7.5), layout="constrained")
    _draw_losses(axes[0, 0], baseline, reweighted)
    _draw_scatter(axes[0, 1], reweighted)
    _draw_ess(axes[1, 0], reweighted)
    _draw_domains(axes[1, 1], baseline, reweighted)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_losses(axes: Axes, baseline: Run, reweighted: Run) -> None:
    for run, role in ((baseline, "baseline"), (reweighted, "reweighted")):
        colour = COLOURS[role]
        axes.plot(*run.curve(run.train, "lm_loss"), color=colour, lw=1, alpha=0.6)
        axes.plot(
            *run.curve(run.validation, "lm_loss"),
            "o-",
            color=colour,
            label=f"{run.name}: validation",
        )
    axes.set(title="Unweighted loss (thin: training)", xlabel="step", ylabel="nats per token")
    axes.legend()


def _draw_scatter(axes: Axes, run: Run) -> None:
    samples = [
        (s["domain"], s["loss"], s["weight"] * record["reweight"]["set_size"])
        for record in run.train[-10:]
        for s in record.get("samples", [])
        if s["loss"] is not None
    ]
    for index, domain in enumerate(sorted({s[0] for s in samples})):
        points = [(loss, weight) for name, loss, weight in samples if name == domain]
        losses, weights = zip(*points, strict=True)
        axes.scatter(losses, weights, s=12, alpha=0.7, color=f"C{index}", label=domain)
    axes.axhline(1, color="black", lw=0.8, ls=":")
    axes.set(
        title=f"Weight against loss ({run.name}, last logged steps)",
        xlabel="sample loss, nats per token",
        ylabel="weight x set size",
    )
    axes.legend()


def _draw_ess(axes: Axes, run: Run) -> None:
    axes.plot(
        *run.curve(run.train, "reweight", "ess"), color=COLOURS["reweighted"], label="whole set"
    )
    for index, domain in enumerate(sorted(run.train[-1]["reweight"]["domains"])):
        share = run.curve(run.train, "reweight", "domains", domain, "weight_share")
        axes.plot(*share, color=f"C{index}", lw=0.9, label=f"weight on {domain}")
    axes.set(
        title=f"Effective sample size and weight shares ({run.name})",
        xlabel="step",
        ylabel="fraction",
        ylim=(0, 1.05),
    )
    axes.legend(fontsize="small")


def _draw_domains(axes: Axes, baseline: Run, reweighted: Run) -> None:
    domains = list(baseline.final["domains"])
    for offset, run, role in ((-0.2, baseline, "baseline"), (0.2, reweighted, "reweighted")):
        losses = [run.final["domains"][name]["lm_loss"] for name in domains]
        bars = axes.bar(
            [i + offset for i in range(len(domains))],
            losses,
            0.4,
            color=COLOURS[role],
            label=run.name,
        )
        axes.bar_label(bars, fmt="%.2f", fontsize="small")
    axes.set_xticks(range(len(domains)), domains)
    axes.set(title="Validation loss by domain, at the end", ylabel="nats per token")
    axes.margins(y=0.15)
    axes.legend(loc="lower right")


def table(baseline: Run, reweighted: Run) -> str:
    """Final validation loss by domain for both runs, and where the weight went."""
    header = (
        f"{'validation loss':<16} {baseline.name:>10} {reweighted.name:>10} {'change':>9} "
        f"{'samples':>9} {'weight':>8}"
    )
    lines = [header, "-" * len(header)]
    for name in baseline.final["domains"]:
        before = baseline.final["domains"][name]["lm_loss"]
        after = reweighted.final["domains"][name]["lm_loss"]
        samples = mean_over_training(reweighted, name, "sample_share")
        weight = mean_over_training(reweighted, name, "weight_share")
        lines.append(
            f"{name:<16} {before:>10.4f} {after:>10.4f} {after - before:>+9.4f} "
            f"{samples:>9.1%} {weight:>8.1%}"
        )
    before, after = baseline.final["lm_loss"], reweighted.final["lm_loss"]
    lines.append(f"{'all':<16} {before:>10.4f} {after:>10.4f} {after - before:>+9.4f}")
    _, ess = reweighted.curve(reweighted.train, "reweight", "ess")
    lines.append(
        f"after {baseline.final['iteration']} steps; nats per token, lower is better; one seed "
        f"each. Mean ESS {sum(ess) / len(ess):.1%}."
    )
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Compare two runs by their metrics.jsonl.")
    parser.add_argument("--baseline", type=Path, required=True, metavar="DIR")
    parser.add_argument("--reweighted", type=Path, required=True, metavar="DIR")
    parser.add_argument("--output", type=Path, required=True, metavar="PREFIX")
    args = parser.parse_args(argv)
    baseline = Run.load(args.baseline, args.baseline.name)
    reweighted = Run.load(args.reweighted, args.reweighted.name)
    text = table(baseline, reweighted)
    args.output.with_suffix(".txt").write_text(text)
    draw(baseline, reweighted, args.output.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
