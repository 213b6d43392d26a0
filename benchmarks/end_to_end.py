"""Cost of reweighting and of the cross-entropy on one GPU: the real program, a few wide layers.

A model as wide as one of 1.4 billion parameters, with four of its layers and a vocabulary of
128,256, on Megatron's mock data. Steps without reweighting and with, with core's cross-entropy,
ours, and ours in splits of the output layer, take turns in one run, `--rounds` times. Prints tokens
a second, peak memory, and the ratios of the step times with their 95 % bootstrap intervals.

    python benchmarks/end_to_end.py
"""

from __future__ import annotations

import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.interleaved_steps import SKIPPED_BLOCKS, Job, run, summarise, variant
from benchmarks.kernels.record import Result, arguments, print_table

# Each pair differs in the reweighting alone, or in the cross-entropy.
VARIANTS = (
    *("none", "microbatch", "none+fused", "microbatch+fused"),
    *("none+layer", "microbatch+layer"),
)
PAIRS = (
    ("microbatch", "none"),
    ("microbatch+fused", "none+fused"),
    ("microbatch+layer", "none+layer"),
    ("none+fused", "none"),
    ("none+layer", "none"),
)
SEQUENCE, MICRO_BATCH, BATCH = 2048, 8, 32
GPU_FLAGS = (
    "--num-layers 4 --hidden-size 2048 --ffn-hidden-size 5632 --num-attention-heads 16 --bf16 "
    f"--seq-length {SEQUENCE} --max-position-embeddings {SEQUENCE} "
    f"--micro-batch-size {MICRO_BATCH} --global-batch-size {BATCH} --vocab-size 128255"
)
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
    """Measure, write as it goes, print."""
    options = arguments(__doc__, 24).parse_args()
    result = Result("end_to_end", options)
    device = result.device.type
    steps = (SKIPPED_BLOCKS + options.rounds) * len(VARIANTS) + 1
    flags = f"{TINY_FLAGS if options.rehearse else GPU_FLAGS} {COMMON_FLAGS} --train-iters {steps}"
    result.record["flags"] = flags
    with tempfile.TemporaryDirectory() as folder:
        job = Job(device, VARIANTS, Path(folder) / "steps.json")
        flags += f" --device {device} --data-cache-path {folder}/cache"
        save = partial(_save, result)
        save(run(job, 1, flags.split(), Path(folder), save))
    by_variant, ratios = result.record["variants"], result.record["ratios"]
    rows = [
        [name, f"{found['tokens_per_s']:.0f}", f"{found['peak_bytes'] / 2**30:.2f}"]
        for name, found in by_variant.items()
    ]
    print_table(f"{result.record['blocks']} blocks", [["", "tokens/s", "peak GiB"], *rows])
    rows = [
        [name, *(f"{found[what]:.4f}" for what in ("ratio", "ratio_low", "ratio_high"))]
        for name, found in ratios.items()
    ]
    print_table("step times", [["", "ratio", "from", "to"], *rows])
    return 0


def _save(result: Result, measured: dict[str, Any]) -> None:
    """Save and print what the steps so far say."""
    seconds = measured["seconds"]
    blocks = len(seconds) // len(VARIANTS) - SKIPPED_BLOCKS
    if blocks < 1:
        return
    ratios = {f"{name} / {base}": summarise(seconds, VARIANTS, base)[name] for name, base in PAIRS}
    of_variants = {name: _of_variant(name, measured) for name in VARIANTS}
    result.save(blocks=blocks, variants=of_variants, ratios=ratios)
    print(f"{blocks} blocks:", *(f"{name} {x['ratio']:.4f}" for name, x in ratios.items()))


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
