import hashlib
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_rw.data.text.dedup import DuplicateFinder, hash_documents

# Few values in each half, so that hashes are equal, equal in one half, or share a bucket.
HALF = st.sampled_from([0, 1, 2, 1 << 48, (1 << 48) + 1, 3 << 62, (1 << 64) - 1])
HASHES = st.lists(st.tuples(HALF, HALF), max_size=60)


def copies(hashes: list[tuple[int, int]]) -> list[bool]:
    first: dict[tuple[int, int], int] = {}
    return [first.setdefault(value, place) != place for place, value in enumerate(hashes)]


@given(
    hashes=HASHES,
    cuts=st.lists(st.integers(0, 60), max_size=4),
    buckets=st.sampled_from([1, 2, 3, 7]),
    memory_bytes=st.sampled_from([0, 72, 150, 1000, 1 << 20]),
    bounds=st.tuples(st.integers(0, 60), st.integers(0, 60)),
)
def test_all_but_the_first_of_equal_hashes_are_duplicates(
    tmp_path: Path,
    hashes: list[tuple[int, int]],
    cuts: list[int],
    buckets: int,
    memory_bytes: int,
    bounds: tuple[int, int],
) -> None:
    rows = np.array(hashes, "<u8").reshape(-1, 2).view(np.uint8)
    with DuplicateFinder(tmp_path, buckets, memory_bytes) as finder:
        for part in np.split(rows, sorted(cuts)):
            finder.add(part)
        found = finder.duplicates()
    assert finder.total == len(found) == len(hashes)
    assert found.slice(0, len(hashes)).tolist() == copies(hashes)
    start, stop = sorted(min(bound, len(hashes)) for bound in bounds)
    assert found.slice(start, stop).tolist() == copies(hashes)[start:stop]
    assert found.count() == sum(copies(hashes))
    assert list(tmp_path.iterdir()) == []


@given(
    documents=st.lists(st.lists(st.integers(0, 3), max_size=4), max_size=20),
    key=st.sampled_from([b"", b"1"]),
)
def test_documents_are_known_by_the_bytes_of_their_tokens(
    documents: list[list[int]], key: bytes
) -> None:
    arrays = [np.array(document, np.uint16) for document in documents]
    tokens = np.concatenate([np.empty(0, np.uint16), *arrays])
    hashes = hash_documents(tokens, np.array([len(array) for array in arrays]), key)
    assert [row.tobytes() for row in hashes] == [
        hashlib.blake2b(array.tobytes(), digest_size=16, key=key).digest() for array in arrays
    ]


@pytest.mark.parametrize("distinct", [1, 1 << 40])
def test_memory_does_not_grow_with_the_documents(tmp_path: Path, distinct: int) -> None:
    rng = np.random.default_rng(0)
    limit, documents = 2 << 20, 700_000
    with DuplicateFinder(tmp_path, 2, limit) as finder:
        for _ in range(70):
            finder.add(rng.integers(0, distinct, (documents // 70, 2), "<u8").view(np.uint8))
        tracemalloc.start()
        found = finder.duplicates()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert found.count() == (documents - 1 if distinct == 1 else 0)
    assert 24 * documents > 8 * limit  # else the bound would say nothing
    assert peak < 2 * limit + documents / 8
