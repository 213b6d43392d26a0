import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset

from megatron_rw.data.indexed.pair import CODES, Index, PairWriter
from megatron_rw.errors import UserError
from tests.data.datasets import Document, files, write_dataset

# Documents, of which each is a sequence of some token ids.
DOCUMENTS = st.lists(
    st.lists(st.lists(st.integers(0, 400), min_size=1, max_size=6), min_size=1, max_size=1),
    min_size=1,
    max_size=12,
)


def add(writer: PairWriter, documents: list[Document], dtype: type[Any]) -> None:
    sequences = [sequence for document in documents for sequence in document]
    writer.write_tokens(np.array(list(itertools.chain.from_iterable(sequences)), dtype))
    writer.add_documents(np.array([len(sequence) for sequence in sequences]))


def test_types_are_those_of_core() -> None:
    assert {dtype.value: DType.dtype_from_code(dtype.value) for dtype in DType} == CODES


@given(documents=DOCUMENTS, dtype=st.sampled_from([np.uint16, np.int32]), cut=st.integers(0, 12))
def test_a_pair_has_the_bytes_that_core_writes_and_is_read_as_core_reads_it(
    tmp_path: Path, documents: list[Document], dtype: type[Any], cut: int
) -> None:
    write_dataset(tmp_path / "core" / "a", documents, dtype)
    (tmp_path / "ours").mkdir(exist_ok=True)
    with (
        pytest.MonkeyPatch.context() as context,
        PairWriter(tmp_path / "ours" / "a", dtype) as writer,
    ):
        context.setattr("megatron_rw.data.indexed.pair._BLOCK", 3)
        for part in (documents[:cut], documents[cut:]):
            if part:
                add(writer, part, dtype)
        writer.finalize()
    assert files(tmp_path / "ours") == files(tmp_path / "core")
    index, core = Index.open(tmp_path / "ours" / "a"), IndexedDataset(f"{tmp_path}/core/a")
    assert index.dtype == dtype
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
