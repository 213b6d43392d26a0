"""Finds documents that are exact copies of earlier ones, among more than memory holds.

A document is known by a hash of 16 bytes: among 10^10 documents, two different ones share it with
a probability of 10^-19. The hashes go to files by their first bits, so that copies meet in the same
file, and each file is sorted on its own. What stays in memory is a byte per document (1 GB for
10^9) and a bounded piece of one file.
"""

import hashlib
import os
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

HASH_BYTES = 16
# Which half of a hash is the high one does not matter, only that equal hashes have equal halves.
_ENTRY = np.dtype([("high", "<u8"), ("low", "<u8"), ("position", "<i8")])
# Sorting takes the entries themselves, their two keys and an order of them.
_BYTES_PER_SORTED_ENTRY = 3 * _ENTRY.itemsize


def hash_documents(
    tokens: NDArray[Any], lengths: NDArray[np.integer[Any]], key: bytes = b""
) -> NDArray[np.uint8]:
    """Hashes the bytes of each document's tokens: uint8 [documents, 16].

    `tokens` [tokens] are those of the documents, one after the other, and `lengths` [documents] how
    many each has. `key` has at most 64 bytes; another key gives other hashes.
    """
    view = memoryview(np.ascontiguousarray(tokens).view(np.uint8))
    ends = np.cumsum(lengths, dtype=np.int64) * tokens.itemsize
    digests = bytearray()
    start = 0
    for end in ends.tolist():
        digests += hashlib.blake2b(view[start:end], digest_size=HASH_BYTES, key=key).digest()
        start = end
    return np.frombuffer(digests, np.uint8).reshape(-1, HASH_BYTES)


class DuplicateFinder:
    """Collects the hashes of documents and tells which are copies; a context manager.

    It needs 24 bytes of disk per document in the directory until the context is left. There are at
    most 65,536 buckets, each a file, which are open at the same time. `memory_bytes` is about how
    much is sorted at a time, and `total` the number of documents added.
    """

    def __init__(self, directory: Path, buckets: int = 256, memory_bytes: int = 512 << 20) -> None:
        self._buckets = buckets
        self._sorted_entries = max(1, memory_bytes // _BYTES_PER_SORTED_ENTRY)
        self._directory = directory
        self._files: dict[int, BinaryIO] = {}
        self.total = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Removes its files."""
        for file in self._files.values():
            file.close()
            os.unlink(file.name)

    def add(self, hashes: NDArray[np.uint8]) -> None:
        """Adds the hashes of the next documents, uint8 [documents, 16].

        The first of several copies, in the order of the calls, is no duplicate.
        """
        halves = np.ascontiguousarray(hashes).view("<u8")
        entries = np.empty(len(hashes), _ENTRY)
        entries["high"], entries["low"] = halves[:, 0], halves[:, 1]
        entries["position"] = np.arange(self.total, self.total + len(hashes))
        buckets = (entries["high"] >> np.uint64(48)) * np.uint64(self._buckets) >> np.uint64(16)
        order = np.argsort(buckets, kind="stable")  # within a bucket they stay in order
        starts = np.searchsorted(buckets[order], np.arange(1, self._buckets))
        for bucket, piece in enumerate(np.split(entries[order], starts)):
            if len(piece):
                if bucket not in self._files:
                    path = self._directory / f"hashes-{bucket:05}"
                    self._files[bucket] = path.open("wb")
                self._files[bucket].write(piece.tobytes())
        self.total += len(hashes)

    def duplicates(self) -> NDArray[np.bool_]:
        """Tells which documents, [total], have the hash of an earlier one.

        Nothing is added afterwards.
        """
        found = np.zeros(self.total, np.bool_)
        for file in self._files.values():
            file.close()
            entries = os.path.getsize(file.name) // _ENTRY.itemsize
            parts = -(-entries // self._sorted_entries)
            for part in range(parts):
                self._find(file.name, part, parts, found)
        return found

    def _find(self, path: str, part: int, parts: int, found: NDArray[np.bool_]) -> None:
        """Finds the copies among a bucket's hashes that leave `part` on division by `parts`."""
        firsts = [np.empty(0, _ENTRY)]
        with open(path, "rb") as file:
            while len(entries := np.fromfile(file, _ENTRY, self._sorted_entries)):
                mine = entries[entries["low"] % np.uint64(parts) == part]
                # Copies are left out here already, so that a page that a crawl met a billion times
                # takes no memory.
                firsts.append(_without_copies(mine, found))
        _without_copies(np.concatenate(firsts), found)


def _without_copies(entries: NDArray[Any], found: NDArray[np.bool_]) -> NDArray[Any]:
    """Marks all but the first of equal hashes as found, and returns the first ones in order."""
    high, low = entries["high"], entries["low"]
    order = np.lexsort((low, high))  # stable: of equal ones, the earliest comes first
    high, low = high[order], low[order]
    copy = np.zeros(len(entries), np.bool_)
    copy[order[1:]] = (high[1:] == high[:-1]) & (low[1:] == low[:-1])
    found[entries["position"][copy]] = True
    return entries[~copy]
