"""Which documents are held out, by a seeded hash of their tokens.

The hash of a document is as good as a random number, and the same for every copy of the document.
So a fraction of the documents is those with hashes in that fraction of the range, and a number of
documents is those with the smallest hashes.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_rw.errors import UserError

SETS = ("train", "valid", "test")
_HASHES = 1 << 20  # read at a time
_NONE = np.empty(0, np.uint64)


@dataclass(frozen=True)
class Share:
    """How much to hold out of each domain; at most one of the two is not 0."""

    fraction: float = 0.0  # About this fraction of the documents.
    documents: int = 0  # This number of documents, and the copies of the last of them.


@dataclass(frozen=True)
class HeldOut:
    """What is held out of all domains."""

    below: int = 0  # Documents with smaller hashes are for validation.
    last: int = 0  # The number of largest hashes that are for test, out of 2^64.
    # [hashes], sorted: more hashes that are for validation.
    valid: NDArray[np.uint64] = field(default_factory=lambda: _NONE)
    # [hashes], sorted: more hashes that are for test.
    test: NDArray[np.uint64] = field(default_factory=lambda: _NONE)

    def sets(self, hashes: NDArray[np.uint64]) -> NDArray[np.intp]:
        """Returns the position in `SETS` of the set of each document, [documents]."""
        valid = (hashes < np.uint64(self.below)) | _among(hashes, self.valid)
        # From the other end of the range, so that two fractions have nothing in common.
        test = (~hashes < np.uint64(self.last)) | _among(hashes, self.test)
        return np.where(valid, 1, np.where(test, 2, 0))


def choose(hashes: Mapping[str, Path], valid: Share, test: Share) -> HeldOut:
    """Chooses what to hold out.

    What is held out of one domain is held out of all, so that no copy of it is trained on. `hashes`
    maps a domain to a file of its documents' hashes, uint64 each. Raises a `UserError` if a domain
    would have no document left to train on, or none in a set.
    """
    held_out = HeldOut(below=int(valid.fraction * 2**64), last=int(test.fraction * 2**64))
    if valid.documents:
        without_test = replace(held_out, last=0)  # the number takes precedence over the fraction
        held_out = replace(held_out, valid=_of_each(hashes, valid.documents, without_test))
    if test.documents:
        held_out = replace(held_out, test=_of_each(hashes, test.documents, held_out))
    asked = [True, valid != Share(), test != Share()]
    for domain, path in hashes.items():
        counts = np.zeros(len(SETS), np.int64)
        for block in read_hashes(path):
            counts += np.bincount(held_out.sets(block), minlength=len(SETS))
        empty = [name for name, on, n in zip(SETS, asked, counts, strict=True) if on and not n]
        if empty:
            raise UserError(
                f"the domain '{domain}', of {counts.sum():,} documents, would have none in "
                f"{' and '.join(empty)}; hold out {'less' if 'train' in empty else 'more'}, a "
                "number of each domain (--valid-documents, --test-documents), or split it by itself"
            )
    return held_out


def read_hashes(path: Path) -> Iterator[NDArray[np.uint64]]:
    """Yields the hashes of a file, uint64 each, a million at a time."""
    with path.open("rb") as file:
        while len(block := np.fromfile(file, np.uint64, _HASHES)):
            yield block


def _of_each(hashes: Mapping[str, Path], count: int, taken: HeldOut) -> NDArray[np.uint64]:
    found = [_smallest(path, count, taken) for path in hashes.values()]
    return np.unique(np.concatenate(found))


def _smallest(path: Path, count: int, taken: HeldOut) -> NDArray[np.uint64]:
    """Returns the fewest smallest hashes of a domain that at least `count` documents have."""
    kept, times = _NONE, np.empty(0, np.int64)
    for block in read_hashes(path):
        free = block[taken.sets(block) == 0]
        if len(kept) == count:
            free = free[free <= kept[-1]]
        kept, place = np.unique(np.concatenate([kept, free]), return_inverse=True)
        weights = np.concatenate([times, np.ones(len(free), np.int64)])
        times = np.zeros(len(kept), np.int64)
        np.add.at(times, place, weights)
        # A hash that is dropped is larger than `count` others and cannot be needed later.
        kept, times = kept[:count], times[:count]
    return kept[: int(np.searchsorted(np.cumsum(times), count)) + 1]


def _among(hashes: NDArray[np.uint64], chosen: NDArray[np.uint64]) -> NDArray[np.bool_]:
    if len(chosen) == 0:
        return np.zeros(len(hashes), np.bool_)
    place = np.minimum(np.searchsorted(chosen, hashes), len(chosen) - 1)
    found: NDArray[np.bool_] = chosen[place] == hashes
    return found
