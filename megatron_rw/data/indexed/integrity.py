"""Whether a `.bin/.idx` pair is whole, and whether it is still the one that it was."""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import BinaryIO

import numpy as np

from megatron_rw.data.indexed.pair import CODES, HEADER, MAGIC, VERSION, bin_path, idx_path

_LENGTH, _OFFSET, _BOUND = struct.Struct("<i"), struct.Struct("<q"), struct.Struct("<q")
_REMEDY = "copy both files again, or make them again with tools/preprocess_data.py"

# Of each file, besides its size: enough to tell datasets apart, and little on a remote disk.
_BLOCKS, _BLOCK_BYTES = 16, 4096


class DataError(ValueError):
    """A dataset is damaged, or not the one that it was; the message names it and the remedy."""


def check_pair(prefix: str) -> int:
    """See that index and tokens are whole and belong together. Reads some 60 bytes.

    Args:
        prefix: path without `.bin` and `.idx`; both exist.

    Returns:
        How many sequences it holds, which are its documents unless those are split.

    Raises:
        DataError: they are not.
        OSError: they cannot be read.
    """
    index_path, tokens_path = idx_path(prefix), bin_path(prefix)
    size = os.path.getsize(index_path)
    with open(index_path, "rb") as index:
        header = index.read(HEADER.size)
        if len(header) < HEADER.size or not header.startswith(MAGIC):
            raise DataError(f"data path {prefix}: {index_path} is no index of a dataset; {_REMEDY}")
        _, version, code, sequences, bounds = HEADER.unpack(header)
        if version != VERSION or code not in CODES:
            raise DataError(
                f"data path {prefix}: {index_path} has version {version} and type {code}, which "
                f"are unknown; {_REMEDY}"
            )
        tables = sequences * (_LENGTH.size + _OFFSET.size) + bounds * _BOUND.size
        # A multimodal dataset has a byte more per sequence.
        if size not in (HEADER.size + tables, HEADER.size + tables + sequences):
            raise DataError(
                f"data path {prefix}: {index_path} has {size:,} bytes, and its header tells of "
                f"{HEADER.size + tables:,}; {_REMEDY}"
            )
        if sequences == 0:
            raise DataError(f"data path {prefix}: {index_path} lists no documents; leave it out")
        end = _end_of_tokens(index, sequences, np.dtype(CODES[code]).itemsize)
    there = os.path.getsize(tokens_path)
    if there != end:
        cut = "is cut off" if there < end else "belongs to another index"
        raise DataError(
            f"data path {prefix}: {tokens_path} {cut}: it has {there:,} bytes, and its index tells "
            f"of {end:,}; {_REMEDY}"
        )
    return int(sequences)


def _end_of_tokens(index: BinaryIO, sequences: int, itemsize: int) -> int:
    lengths = HEADER.size
    offsets = lengths + sequences * _LENGTH.size
    index.seek(lengths + (sequences - 1) * _LENGTH.size)
    (length,) = _LENGTH.unpack(index.read(_LENGTH.size))
    index.seek(offsets + (sequences - 1) * _OFFSET.size)
    (offset,) = _OFFSET.unpack(index.read(_OFFSET.size))
    return int(offset + length * itemsize)


def fingerprint(prefix: str) -> str:
    """A digest of both files that does not read them whole.

    It covers their sizes and blocks spread evenly over them, so that other data, a re-tokenized
    corpus or another order is noticed, and a few altered tokens in a large file are not.

    Args:
        prefix: path without `.bin` and `.idx`.

    Returns:
        16 hexadecimal digits.

    Raises:
        OSError: they cannot be read.
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
    """The fingerprint of every dataset, by absolute prefix."""
    with ThreadPoolExecutor(workers) as pool:
        found = pool.map(fingerprint, prefixes)
        return {os.path.abspath(p): f for p, f in zip(prefixes, found, strict=True)}


def changed(saved: dict[str, str], mine: dict[str, str]) -> list[str]:
    """Datasets that were there under the same path, and were others.

    Args:
        saved: by absolute prefix, of the checkpoint.
        mine: of this run. Paths that only one of the two has are no change: a corpus may be
            moved, and a blend may be altered on purpose.
    """
    return [prefix for prefix in mine if saved.get(prefix, mine[prefix]) != mine[prefix]]
