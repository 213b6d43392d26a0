"""Print what the recipes in this folder need, as the table of README.md.

    python examples/paper/estimate.py

Memory, work and checkpoints by Megatron's formulas (`tools/preflight.py --estimate` prints one
recipe's with what they leave out); time at an assumed utilisation. Nothing is measured, no GPU is
needed.
"""

from __future__ import annotations

import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parents[1]))

# Model FLOPs utilisation, assumed.
MFU = 0.4
HEADER = (
    "| recipe | GPUs | memory of a GPU, GiB | of it activations | checkpoint, GiB | tokens | "
    "time at an assumed 40 % |\n|---|--:|--:|--:|--:|--:|--:|"
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


def row(recipe: Recipe) -> str:
    """A row of the table. Once per process: Megatron keeps the arguments."""
    from megatron_rw.platform import select_device

    select_device([])
    from megatron_rw.preflight.estimate import PEAK_TFLOPS, estimate, planned_arguments
    from megatron_rw.preflight.facts import GIB

    needed = estimate(planned_arguments(flags_of(recipe), recipe.gpus))
    assert needed is not None
    return (
        f"| `{recipe.name}.args` | {recipe.gpus} | {needed.memory_bytes / GIB:.1f} "
        f"| {needed.activation_bytes / GIB:.1f} | {needed.checkpoint_bytes / GIB:.1f} "
        f"| {needed.tokens / 1e9:.1f} B "
        f"| {needed.hours(None, MFU):.1f} h of {PEAK_TFLOPS[needed.bits]:g} TFLOP/s |"
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
