"""Cost of reweighting: step time in every scope over step time without, interleaved in one run.

Runs the real program on the quick start's model and data (`make quickstart` first): once with its
own batch, one micro-batch a rank, and once with that batch cut into two. With one, the scope
`global` is `microbatch` and left out. Then, without reweighting, with core's cross-entropy,
torch's, ours, and ours in one operation with the output layer. Last, with each choice beyond the
paper, in the scopes `microbatch` and `deferred`, and without reweighting but with bare all-reduces
between forward and backward pass. Prints the median over blocks of steps of a step's time over that
of another, and a 95 % bootstrap interval, and writes both as JSON.

    make bench-step-time
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np
import torch

from benchmarks.interleaved_steps import ALL_REDUCES, CHOICES, SKIPPED_BLOCKS, Job, run, summarise
from benchmarks.kernels.record import about, device_name

# By micro-batches a rank.
VARIANTS = {
    1: ("none", "microbatch", "deferred"),
    2: ("none", "microbatch", "global", "deferred"),
}
CROSS_ENTROPIES = ("none", "none+torch", "none+fused", "none+layer")
BLOCKS = 240
# Of all choices, which are many.
CHOICE_BLOCKS = 100
# The batch is the quick start's own.
PROCESSES, BATCH_SIZE = 2, 32


def choices_in(scope: str) -> tuple[str, ...]:
    """Variants of all choices; our cross-entropy computes the entropy."""
    named = (f"{scope}:{name}" + "+fused" * (name == "entropy") for name in CHOICES if name)
    bare = [f"none:{name}" for name in ALL_REDUCES] if scope == "microbatch" else []
    return ("none", scope, *named, *bare)


def choice_flags(folder: Path) -> list[str]:
    """What the run of the choices is given: snapshots and a static weight for each document."""
    folder.mkdir(exist_ok=True)
    domains = json.loads((ROOT / "quickstart/data/train/domains.json").read_text())["domains"]
    for domain in domains.values():
        weights = np.ones(domain["documents"], dtype=np.float32)
        np.save(folder / f"{Path(domain['prefix']).name}.npy", weights)
    flags = ["--reweight-signal", "progress", "--reweight-snapshot-interval", "1000"]
    return [*flags, "--reweight-sample-weights", str(folder), "--num-workers", "0"]


def measure(
    micro_batches: int,
    variants: tuple[str, ...],
    blocks: int = BLOCKS,
    extra: Sequence[str] = (),
) -> list[float]:
    """Seconds of the steps of one run."""
    from examples.quickstart import run as quickstart

    out = ROOT / "quickstart"
    job = Job("cpu", variants, out / "step_time.json")
    steps = (SKIPPED_BLOCKS + blocks) * len(variants) + 1
    flags = quickstart.training_flags(out, out / "runs" / "step_time")
    # Neither evaluation nor a checkpoint may fall between two steps that are compared.
    flags += ["--train-iters", str(steps), "--eval-interval", str(10 * steps), "--eval-iters", "1"]
    micro_batch_size = str(BATCH_SIZE // PROCESSES // micro_batches)
    flags += ["--global-batch-size", str(BATCH_SIZE), "--micro-batch-size", micro_batch_size]
    flags += [*quickstart.RUNS["linupper"], *extra]
    seconds: list[float] = run(job, PROCESSES, flags, out)["seconds"]
    return seconds


def show(name: str, base: str, found: dict[str, float]) -> None:
    """One ratio on a line."""
    print(
        f"{name:>28} / {base}: {found['ratio']:.4f} "
        f"(95 % interval {found['ratio_low']:.4f} to {found['ratio_high']:.4f})",
        flush=True,
    )


def scopes(result: dict[str, Any]) -> None:
    """The scopes with either batch shape."""
    for micro_batches, variants in VARIANTS.items():
        summary = summarise(measure(micro_batches, variants), variants)
        result[f"micro_batches_{micro_batches}"] = summary
        print(
            f"{micro_batches} micro-batch(es) a rank, {summary['blocks']} blocks; a step without "
            f"reweighting takes {summary['median_step_ms_none']:.0f} ms"
        )
        for scope in variants[1:]:
            show(scope, "none", summary[scope])


def cross_entropies(result: dict[str, Any]) -> None:
    """Our cross-entropies against core's and torch's."""
    seconds = measure(1, CROSS_ENTROPIES)
    print("cross-entropy, one micro-batch a rank, no reweighting")
    for kind, label in (("fused", "fused_cross_entropy_over"), ("layer", "fused_layer_over")):
        result[label] = {
            base: summarise(seconds, CROSS_ENTROPIES, variant)[f"none+{kind}"]
            for base, variant in (("core", "none"), ("torch", "none+torch"))
        }
        for name, found in result[label].items():
            show(kind, name, found)


def choices(result: dict[str, Any]) -> None:
    """Every choice beyond the paper, with one micro-batch."""
    extra = choice_flags(ROOT / "quickstart" / "sample_weights")
    for scope in ("microbatch", "deferred"):
        variants = choices_in(scope)
        summary = summarise(measure(1, variants, CHOICE_BLOCKS, extra), variants)
        result[f"choices_{scope}"] = summary
        print(f"choices in {scope}, one micro-batch a rank, {summary['blocks']} blocks")
        for name in variants[1:]:
            show(name, "none", summary[name])


PARTS = {"scopes": scopes, "cross-entropy": cross_entropies, "choices": choices}


def main() -> int:
    """Measure all parts or one, print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--only", choices=PARTS, help="measure one part, and leave the other figures as they are"
    )
    options = parser.parse_args()
    result_file = ROOT / "benchmarks" / "results" / "step_time.json"
    if not (ROOT / "quickstart" / "data" / "train" / "domains.json").exists():
        print("error: no quick-start data; run make quickstart first", file=sys.stderr)
        return 2
    result: dict[str, Any] = about(torch.device("cpu")) | {
        "benchmark": "step time by scope over none, and by cross-entropy, quick-start model",
        "command": "make bench-step-time",
        "machine": f"{device_name(torch.device('cpu'))}, {PROCESSES} processes",
    }
    if options.only:
        result = json.loads(result_file.read_text()) | result
    for part, measures in PARTS.items():
        if options.only in (None, part):
            measures(result)
    result_file.write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
