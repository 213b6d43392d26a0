"""The largest token id of a dataset, to compare with the model's vocabulary."""

from __future__ import annotations

import os

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDataset, get_bin_path

from megatron_rw.data.indexed.domains import domain_record

# Reading a terabyte to check it would be the long work that the check is there to spare.
SCAN_BYTES = 64 << 20


def largest_token_id(prefix: str, scan_bytes: int = SCAN_BYTES) -> int:
    """Largest token id of a `.bin/.idx` pair.

    Taken from the `domains.json` beside it where there is one. Otherwise the first `scan_bytes`
    of the tokens are read, so that the result is a lower bound for a larger file; each batch is
    checked again when it is drawn.

    Args:
        prefix: path without `.bin` and `.idx`.
        scan_bytes: how much of the file to read at most.

    Returns:
        The id, -1 for a dataset without tokens.
    """
    record = domain_record(prefix)
    if record is not None:
        return record.max_token_id
    dtype = np.dtype(IndexedDataset(prefix, mmap=False).index.dtype)
    path = get_bin_path(prefix)
    count = min(os.path.getsize(path), scan_bytes) // dtype.itemsize
    if count == 0:
        return -1
    return int(np.fromfile(path, dtype=dtype, count=count).max())
