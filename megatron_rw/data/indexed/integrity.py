"""Quick checks of a `.bin/.idx` pair: whether it is whole, its token ids, and its fingerprint."""

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from megatron_rw.data.indexed.pair import REMEDY, Index, bin_path, idx_path
from megatron_rw.errors import UserError

# What a fingerprint reads of each file: enough to tell datasets apart, little on a remote disk.
_BLOCKS, _BLOCK_BYTES = 16, 4096
# Reading a terabyte would take as long as the work that a check is there to spare.
SCAN_BYTES = 64 << 20


def check_pair(prefix: str) -> int:
    """Checks that index and tokens are whole and belong together. Reads some 60 bytes.

    Returns the number of sequences, which are the documents unless those are split. Raises a
    `UserError` if they are not.
    """
    index, tokens = Index.open(prefix), bin_path(prefix)
    if len(index.lengths) == 0:
        raise UserError(f"data path {prefix}: {idx_path(prefix)} lists no documents; leave it out")
    end = int(index.offsets[-1]) + int(index.lengths[-1]) * index.dtype.itemsize
    there = os.path.getsize(tokens)
    if there != end:
        wrong = "is cut off" if there < end else "belongs to another index"
        raise UserError(
            f"data path {prefix}: {tokens} {wrong}: it has {there:,} bytes, and its index tells of "
            f"{end:,}; {REMEDY}"
        )
    return len(index.lengths)


def largest_token_id(prefix: str | Path, scan_bytes: int = SCAN_BYTES) -> int:
    """Returns the largest token id in the first `scan_bytes` of a dataset's tokens, -1 of none.

    For a larger file that is a lower bound; each batch is checked again when it is drawn.
    """
    dtype, path = Index.open(prefix).dtype, bin_path(prefix)
    count = min(os.path.getsize(path), scan_bytes) // dtype.itemsize
    return int(np.fromfile(path, dtype, count).max()) if count else -1


def fingerprint(prefix: str) -> str:
    """Returns a digest of both files, 16 hexadecimal digits, that does not read them whole.

    It covers their sizes and blocks spread evenly over them. So it notices other data, a corpus
    that was tokenized again or another order, but not a few altered tokens in a large file.
    """
    digest = hashlib.sha256()
    for path in (idx_path(prefix), bin_path(prefix)):
        size = os.path.getsize(path)
        digest.update(size.to_bytes(8, "little"))
        last = max(0, size - _BLOCK_BYTES)
        with open(path, "rb") as stream:
            for block in range(_BLOCKS):
                stream.seek(last * block // (_BLOCKS - 1))
                digest.update(stream.read(_BLOCK_BYTES))
    return digest.hexdigest()[:16]


def fingerprints(prefixes: Sequence[str], workers: int = 16) -> dict[str, str]:
    """Returns the fingerprint of every dataset, by absolute prefix."""
    with ThreadPoolExecutor(workers) as pool:
        found = pool.map(fingerprint, prefixes)
        return {os.path.abspath(p): f for p, f in zip(prefixes, found, strict=True)}
