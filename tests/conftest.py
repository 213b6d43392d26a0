"""Shared fixtures: one thread per process, and a small two-domain dataset."""

from __future__ import annotations

import os

# Before anything imports torch: two cores are shared by up to four ranks.
os.environ["OMP_NUM_THREADS"] = "1"

from pathlib import Path

import numpy as np
import pytest
import torch

# Before Triton's kernels are defined. Where there is a GPU they run on it.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# Tables at the end. Hooks of a folder's own conftest do not run in the process that reports for
# pytest's workers.
pytest_plugins = ["tests.exactness.table", "tests.kernels.resources"]

VOCAB_SIZE = 61
EOD = 60


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two datasets of token ids: `easy` repeats itself, `noise` is random."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    folder = tmp_path_factory.mktemp("corpus")
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
    return folder


@pytest.fixture(scope="session")
def data_flags(corpus: Path) -> list[str]:
    """The two-domain blend and its tokenizer."""
    return [
        "--data-path", "0.5", str(corpus / "easy_text_document"),
        "0.5", str(corpus / "noise_text_document"),
        "--split", "90,5,5", "--data-cache-path", str(corpus / "cache"),
        "--tokenizer-type", "NullTokenizer", "--vocab-size", str(VOCAB_SIZE),
    ]  # fmt: skip
