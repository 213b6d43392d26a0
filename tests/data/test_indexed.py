import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset

from megatron_rw.data.indexed import pair as indexed
from megatron_rw.data.indexed.pair import Index, PairWriter
from megatron_rw.errors import UserError
from tests.data.datasets import write_dataset

# Documents, of which each is some sequences, of which each is some token ids.
DOCUMENTS = st.lists(
    st.lists(st.lists(st.integers(0, 400), min_size=1, max_size=6), min_size=1, max_size=4),
    min_size=1,
    max_size=12,
)


def add(writer: PairWriter, documents: list[list[list[int]]], dtype: type[Any]) -> None:
    sequences = [sequence for document in documents for sequence in document]
    writer.write_tokens(np.array(list(itertools.chain.from_iterable(sequences)), dtype))
    writer.add_documents(
        np.array([len(sequence) for sequence in sequences]),
        np.array([len(document) for document in documents]),
    )


def pair(prefix: Path) -> tuple[bytes, bytes]:
    return indexed.bin_path(prefix).read_bytes(), indexed.idx_path(prefix).read_bytes()


def test_types_are_those_of_core() -> None:
    assert {dtype.value: DType.dtype_from_code(dtype.value) for dtype in DType} == indexed.CODES


@given(documents=DOCUMENTS, dtype=st.sampled_from([np.uint16, np.int32]), cut=st.integers(0, 12))
def test_a_pair_has_the_bytes_that_core_writes(
    tmp_path: Path, documents: list[list[list[int]]], dtype: type[Any], cut: int
) -> None:
    write_dataset(tmp_path / "core", documents, dtype)
    with PairWriter(tmp_path / "ours", dtype) as writer:
        for part in (documents[:cut], documents[cut:]):
            if part:
                add(writer, part, dtype)
        writer.finalize()
    assert pair(tmp_path / "ours") == pair(tmp_path / "core")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "core.bin", "core.idx", "ours.bin", "ours.idx",
    ]  # fmt: skip


@given(documents=DOCUMENTS)
def test_an_index_reads_as_core_reads_it(tmp_path: Path, documents: list[list[list[int]]]) -> None:
    write_dataset(tmp_path / "core", documents, np.uint16)
    index, core = Index.open(tmp_path / "core"), IndexedDataset(str(tmp_path / "core"))
    assert index.documents == len(documents)
    assert index.lengths.tolist() == core.sequence_lengths.tolist()
    assert index.offsets.tolist() == core.index.sequence_pointers.tolist()
    assert index.bounds.tolist() == core.document_indices.tolist()


def test_pieces_are_copied_between_what_is_written(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(np.arange(100, dtype=np.uint16).tobytes())
    with PairWriter(tmp_path / "out", np.uint16) as writer, source.open("rb") as file:
        writer.write_tokens(np.array([7, 8], np.uint16))
        writer.copy_tokens(file, 20, 6)
        writer.write_tokens(np.array([9], np.uint16))
        writer.copy_tokens(file, 198, 2)
        writer.add_documents(np.array([2, 3, 1, 1]))
        writer.finalize()
    ids = np.fromfile(tmp_path / "out.bin", np.uint16).tolist()
    assert ids == [7, 8, 10, 11, 12, 9, 99]


def test_a_piece_beyond_the_end_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(bytes(10))
    with (
        pytest.raises(UserError, match="source: ends 2 bytes too early"),
        PairWriter(tmp_path / "out", np.uint16) as writer,
        source.open("rb") as file,
    ):
        writer.copy_tokens(file, 4, 8)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_tokens_without_a_document_are_a_mistake(tmp_path: Path) -> None:
    with PairWriter(tmp_path / "out", np.uint16) as writer:
        writer.write_tokens(np.array([1], np.uint16))
        with pytest.raises(RuntimeError, match="2 bytes, and its documents 0 tokens"):
            writer.finalize()
        with pytest.raises(TypeError, match="token ids are int64, and the dataset's uint16"):
            writer.write_tokens(np.array([1]))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file; give a dataset's path without"),
        (b"MMIDIDX", "is no index of a dataset"),
        (b"PK" + bytes(60), "is no index of a dataset"),
        (indexed.HEADER.pack(indexed.MAGIC, 2, 8, 0, 1), "version 2 and type 8"),
        (
            indexed.HEADER.pack(indexed.MAGIC, 1, 99, 0, 1),
            "version 1 and type 99",
        ),
        (
            indexed.HEADER.pack(indexed.MAGIC, 1, 8, 3, 4),
            "34 bytes, and its header tells of 102",
        ),
    ],
)
def test_a_bad_index_is_named(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "a.idx").write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        Index.open(tmp_path / "a")
    assert str(error.value).startswith((f"{tmp_path}/a.idx", f"data path {tmp_path}/a: "))
