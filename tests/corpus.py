"""A small two-domain dataset of token ids."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

VOCAB_SIZE = 61
EOD = 60


def write_corpus(folder: Path) -> None:
    """Two datasets: `easy` repeats itself, `noise` is random."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    for name in ("easy", "noise"):
        prefix = folder / f"{name}_text_document"
        builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
        for _ in range(200):
            length = int(rng.integers(20, 120))
            if name == "easy":
                document = (np.arange(length) + rng.integers(0, 8)) % 8
            else:
                document = rng.integers(0, EOD, length)
            ids = torch.from_numpy(np.append(document, EOD).astype(np.int64))
            builder.add_document(ids, [len(ids)])
        builder.finalize(f"{prefix}.idx")


def flags_of(folder: Path) -> list[str]:
    """The blend and its tokenizer."""
    return [
        "--data-path", "0.5", str(folder / "easy_text_document"),
        "0.5", str(folder / "noise_text_document"),
        "--split", "90,5,5", "--data-cache-path", str(folder / "cache"),
        "--tokenizer-type", "NullTokenizer", "--vocab-size", str(VOCAB_SIZE),
    ]  # fmt: skip
