"""Cost of reweighting: step time in every scope over step time without, interleaved in one run.

Runs the real program on the quick start's model and data (`make quickstart` first): once with its
own batch, one micro-batch a rank, and once with that batch cut into two. With one, the scope
`global` is `microbatch` and left out. Then, without reweighting, with core's cross-entropy,
torch's, ours, and ours in one operation with the output layer. Prints the median over blocks of
steps of a step's time over that of another, and a 95 % bootstrap interval, and writes both as JSON.

    make bench-step-time
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch

from benchmarks.interleaved_steps import SKIPPED_BLOCKS, Job, run, summarise
from benchmarks.kernels.record import about, device_name

# By micro-batches a rank.
VARIANTS = {
    1: ("none", "microbatch", "deferred"),
    2: ("none", "microbatch", "global", "deferred"),
}
CROSS_ENTROPIES = ("none", "none+torch", "none+fused", "none+layer")
# All orders equally often.
BLOCKS = 240
# The batch is the quick start's own.
PROCESSES, BATCH_SIZE = 2, 32


def measure(micro_batches: int, variants: tuple[str, ...]) -> list[float]:
    """Seconds of the steps of one run."""
    from examples.quickstart import run as quickstart

    out = ROOT / "quickstart"
    job = Job("cpu", variants, out / "step_time.json")
    steps = (SKIPPED_BLOCKS + BLOCKS) * len(variants) + 1
    flags = quickstart.training_flags(out, out / "runs" / "step_time")
    # Neither evaluation nor a checkpoint may fall between two steps that are compared.
    flags += ["--train-iters", str(steps), "--eval-interval", str(10 * steps), "--eval-iters", "1"]
    micro_batch_size = str(BATCH_SIZE // PROCESSES // micro_batches)
    flags += ["--global-batch-size", str(BATCH_SIZE), "--micro-batch-size", micro_batch_size]
    flags += quickstart.RUNS["linupper"]
    seconds: list[float] = run(job, PROCESSES, flags, out)["seconds"]
    return seconds


def show(name: str, base: str, found: dict[str, float]) -> None:
    """One ratio on a line."""
    print(
        f"{name:>12} / {base}: {found['ratio']:.4f} "
        f"(95 % interval {found['ratio_low']:.4f} to {found['ratio_high']:.4f})",
        flush=True,
    )


def main() -> int:
    """Measure both batch shapes and the cross-entropies, print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--only-cross-entropy", action="store_true", help="leave the other figures as they are"
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
    if options.only_cross_entropy:
        result = json.loads(result_file.read_text()) | result
    for micro_batches, variants in () if options.only_cross_entropy else VARIANTS.items():
        summary = summarise(measure(micro_batches, variants), variants)
        result[f"micro_batches_{micro_batches}"] = summary
        print(
            f"{micro_batches} micro-batch(es) a rank, {summary['blocks']} blocks; a step without "
            f"reweighting takes {summary['median_step_ms_none']:.0f} ms"
        )
        for scope in variants[1:]:
            show(scope, "none", summary[scope])
    seconds = measure(1, CROSS_ENTROPIES)
    print("cross-entropy, one micro-batch a rank, no reweighting")
    for kind, label in (("fused", "fused_cross_entropy_over"), ("layer", "fused_layer_over")):
        result[label] = {
            base: summarise(seconds, CROSS_ENTROPIES, variant)[f"none+{kind}"]
            for base, variant in (("core", "none"), ("torch", "none+torch"))
        }
        for name, found in result[label].items():
            show(kind, name, found)
    result_file.write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
