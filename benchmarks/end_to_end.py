"""Cost of reweighting and of the cross-entropy on one GPU: the real program, a few wide layers.

A model as wide as one of 1.4 billion parameters, with four of its layers and a vocabulary of
128,256, on Megatron's mock data. Steps without reweighting and with, with core's cross-entropy,
ours, and ours in one operation with the output layer, take turns in one run. Prints tokens a
second, peak memory, and the ratios of the step times with their 95 % bootstrap intervals.

    python benchmarks/end_to_end.py
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch

from benchmarks.interleaved_steps import SKIPPED_BLOCKS, Job, run, summarise, variant
from benchmarks.kernels.record import about, results_file

# Each pair differs in the reweighting alone.
VARIANTS = (
    *("none", "microbatch", "none+fused", "microbatch+fused", "deferred+fused"),
    *("none+layer", "microbatch+layer"),
)
PAIRS = (
    ("microbatch", "none"),
    ("microbatch+fused", "none+fused"),
    ("deferred+fused", "none+fused"),
    ("microbatch+layer", "none+layer"),
    ("none+fused", "none"),
    ("none+layer", "none"),
    ("none+layer", "none+fused"),
)
SEQUENCE, MICRO_BATCH, BATCH = 2048, 8, 32
GPU_FLAGS = (
    "--num-layers 4 --hidden-size 2048 --ffn-hidden-size 5632 --num-attention-heads 16 --bf16 "
    f"--seq-length {SEQUENCE} --max-position-embeddings {SEQUENCE} "
    f"--micro-batch-size {MICRO_BATCH} --global-batch-size {BATCH} --vocab-size 128255"
)
# To see that this script works, not to measure anything.
TINY_FLAGS = (
    "--num-layers 2 --hidden-size 64 --ffn-hidden-size 128 --num-attention-heads 4 "
    "--seq-length 32 --max-position-embeddings 32 --micro-batch-size 8 --global-batch-size 16 "
    "--vocab-size 511"
)
COMMON_FLAGS = (
    "--swiglu --normalization RMSNorm --disable-bias-linear --position-embedding-type rope "
    "--untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0 "
    "--mock-data --tokenizer-type NullTokenizer --lr 1e-4 --clip-grad 1.0 --log-interval 1000000 "
    "--eval-interval 1000000 --eval-iters 1 --num-workers 2 "
    "--no-create-attention-mask-in-dataloader "
    "--reweight-strategy linupper --reweight-temperature 1.0"
)


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=24)
    parser.add_argument(
        "--tiny", action="store_true", help="a run on the CPU that measures nothing"
    )
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    device = torch.device("cpu" if options.tiny else "cuda")
    steps = (SKIPPED_BLOCKS + options.blocks) * len(VARIANTS) + 1
    flags = f"{TINY_FLAGS if options.tiny else GPU_FLAGS} {COMMON_FLAGS} --train-iters {steps}"
    with tempfile.TemporaryDirectory() as folder:
        job = Job(device.type, VARIANTS, Path(folder) / "steps.json")
        flags += f" --device {device.type} --data-cache-path {folder}/cache"
        measured = run(job, 1, flags.split(), Path(folder))
    seconds = measured["seconds"]
    ratios = {f"{name} / {base}": summarise(seconds, VARIANTS, base)[name] for name, base in PAIRS}
    by_variant = {name: _of_variant(name, measured) for name in VARIANTS}
    print(f"\n{'':18}{'tokens/s':>12}{'peak GiB':>10}")
    for name, found in by_variant.items():
        print(f"{name:18}{found['tokens_per_s']:12.0f}{found['peak_bytes'] / 2**30:10.2f}")
    for name, found in ratios.items():
        print(
            f"{name:32}{found['ratio']:.4f} ({found['ratio_low']:.4f} to {found['ratio_high']:.4f})"
        )
    if not options.tiny:
        record = about(device) | {
            "benchmark": "end to end on one GPU",
            "flags": flags,
            "variants": by_variant,
            "ratios": ratios,
        }
        output = options.output or results_file("end_to_end", device)
        output.write_text(json.dumps(record, indent=2) + "\n")
    return 0


def _of_variant(name: str, measured: dict[str, Any]) -> dict[str, float]:
    """Speed at the median step and peak memory over the steps."""
    first = SKIPPED_BLOCKS * len(VARIANTS)
    steps = [
        step for step in range(first, len(measured["seconds"])) if variant(step, VARIANTS) == name
    ]
    seconds = sorted(measured["seconds"][step] for step in steps)
    peaks = measured["peak_bytes"]
    return {
        "tokens_per_s": BATCH * SEQUENCE / seconds[len(seconds) // 2],
        "peak_bytes": max((peaks[step] for step in steps), default=0) if peaks else 0,
    }


if __name__ == "__main__":
    sys.exit(main())
