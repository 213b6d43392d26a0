"""Print what the recipes in this folder need, as the table of README.md.

    python examples/paper/estimate.py

Memory and work by Megatron's formulas; time at an assumed utilisation. Nothing is measured, no GPU
is needed.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import sys
from argparse import Namespace
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parents[1]))

# Model FLOPs utilisation, assumed.
MFU = 0.4
# Peak of one H100 SXM in dense TFLOP/s by NVIDIA's data sheet; fp32 without tensor cores.
PEAK_BF16, PEAK_FP32 = 989, 67
HEADER = (
    "| recipe | GPUs | memory of a GPU, GiB | of it activations | tokens | "
    "time at an assumed 40 % |\n|---|--:|--:|--:|--:|--:|"
)


@dataclass(frozen=True)
class Recipe:
    """A file, and what it is for.

    Attributes:
        name: of the file, without .args.
        gpus: that it is for.
        vocabulary: entries, before padding.
    """

    name: str
    gpus: int
    vocabulary: int


RECIPES = (
    Recipe("gpt2-124m", 4, 50257),
    Recipe("gpt2-210m", 4, 50257),
    Recipe("gpt2-294m", 4, 50257),
    Recipe("llama-1.4b", 64, 32000),
    Recipe("llama-7b", 64, 32000),
)


def flags_of(recipe: Recipe) -> list[str]:
    """The file, and in place of data and tokenizer what gives the vocabulary its size."""
    return [
        *(f"@{FOLDER / recipe.name}.args", "--mock-data"),
        *("--tokenizer-type", "NullTokenizer", "--vocab-size", str(recipe.vocabulary)),
    ]


def planned_arguments(flags: list[str], gpus: int) -> Namespace:
    """The arguments of a job of that many GPUs, on a machine that need not have any."""
    from megatron_rw.training.arguments import parse_job_flags

    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(gpus)}
    # Megatron's default, which ours gives up where Transformer Engine is not installed.
    return parse_job_flags(["--transformer-impl", "transformer_engine", *flags], "cuda").megatron


def row(recipe: Recipe) -> str:
    """A row of the table. Once per process: Megatron keeps the arguments."""
    from megatron_rw.platform import select_device

    select_device([])
    from megatron.core.num_microbatches_calculator import get_num_microbatches
    from megatron.training.theoretical_memory_usage import report_theoretical_memory
    from megatron.training.training import num_floating_point_operations

    args = planned_arguments(flags_of(recipe), recipe.gpus)
    with contextlib.redirect_stdout(io.StringIO()):
        _, activations, memory = report_theoretical_memory(args, get_num_microbatches())
    samples = args.train_iters * args.global_batch_size
    peak = PEAK_BF16 if args.bf16 else PEAK_FP32
    seconds = num_floating_point_operations(args, samples) / (recipe.gpus * peak * 1e12 * MFU)
    return (
        f"| `{recipe.name}.args` | {recipe.gpus} | {memory / 1024:.1f} | {activations / 1024:.1f} "
        f"| {samples * args.seq_length / 1e9:.1f} B | {seconds / 3600:.1f} h of {peak} TFLOP/s |"
    )


def main() -> None:
    """Print the table."""
    print(HEADER)
    for recipe in RECIPES:
        # A process each; of one that dies this raises, where a pool of multiprocessing hangs.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            print(pool.submit(row, recipe).result(), flush=True)


if __name__ == "__main__":
    main()
