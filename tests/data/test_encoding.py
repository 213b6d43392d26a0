"""What becomes of documents, with a tokenizer whose ids can be read off the text."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import DType
from numpy.typing import NDArray

from megatron_rw.command_line import parse
from megatron_rw.data.encoding import Encoder
from megatron_rw.data.indexed.parts import Store, join, write_rejects
from megatron_rw.data.preprocess_config import PreprocessConfig
from megatron_rw.data.text.chunks import tasks
from megatron_rw.data.text.sources import Source, find_sources, shard_of
from megatron_rw.data.tokenizers.library_tokenizer import optimal_dtype
from megatron_rw.data.workers import run_unordered
from megatron_rw.errors import UserError
from tests.data.conftest import write_texts
from tests.data.datasets import Document, read_dataset

EOD = 0


class FakeTokenizer:
    """Makes a token of each number in a text."""

    eod = EOD

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[Any]]:
        dtype = optimal_dtype(self.vocab_size)
        if any("fail" in text for text in texts):
            raise ValueError("too many steps")
        return [
            np.array([int(word) for word in text.split() if word.isdecimal()], dtype)
            for text in texts
        ]

    def detokenize(self, ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))


def made_of(
    texts: list[str], directory: Path, vocab_size: int = 1000, flags: str = ""
) -> list[Document]:
    """The documents that come of some texts, as core reads them."""
    sources = find_sources([str(write_texts(directory / "in.jsonl", texts))])
    usual = "--input in.jsonl --domain d --tokenizer-type ByteLevelTokenizer --output-dir out "
    config = parse(PreprocessConfig, (usual + flags).split(), "")
    store = Store(directory, sources)
    encoder = Encoder(config, FakeTokenizer(vocab_size), 1 << 20, store)
    store.prepare()
    for task in tasks(sources, encoder.reading, 1, lambda _: frozenset()):
        encoder(task)
    out = directory / "joined"
    out.mkdir(exist_ok=True)
    join(store, out, encoder.dtype, False)
    write_rejects(store, directory / "rejects.jsonl")
    return read_dataset(out / "d_text_document", encoder.dtype)


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65499, np.uint16), (65500, np.int32)])
def test_the_vocabulary_chooses_the_dtype(
    tmp_path: Path, vocab_size: int, dtype: type[Any]
) -> None:
    assert optimal_dtype(vocab_size) is DType.optimal_dtype(vocab_size) is dtype
    largest = vocab_size - 1
    assert made_of([f"1 {largest}"], tmp_path, vocab_size) == [[[1, largest]]]


def test_text_that_makes_no_token_or_fails_is_rejected(tmp_path: Path) -> None:
    assert made_of(["1", "fail", "2", "none", "3"], tmp_path) == [[[1]], [[2]], [[3]]]
    rejects = [json.loads(line) for line in (tmp_path / "rejects.jsonl").open()]
    assert [(reject["line"], reject["kind"]) for reject in rejects] == [
        (2, "tokenizer failed"), (4, "no tokens"),
    ]  # fmt: skip
    assert rejects[0]["reason"] == "too many steps"


@pytest.mark.parametrize("eod", [True, False])
def test_every_document_ends_in_the_end_of_document_if_asked(tmp_path: Path, eod: bool) -> None:
    ending = [EOD] * eod
    made = made_of(["1 2", "3"], tmp_path, flags="--append-eod" * eod)
    assert made == [[[1, 2, *ending]], [[3, *ending]]]


def fail(task: int) -> int:
    if task == 3:
        raise UserError("three")
    return task * 10


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_results_come_with_their_tasks_and_errors_are_passed_on(workers: int) -> None:
    done = dict(run_unordered(lambda task: task * 10, iter(range(30)), workers))
    assert done == {task: task * 10 for task in range(30)}
    with pytest.raises(UserError, match="three"):
        list(run_unordered(fail, iter(range(30)), workers))


@given(sizes=st.lists(st.integers(0, 9), min_size=1, max_size=30), count=st.integers(1, 12))
def test_shards_hold_every_file_once_and_none_is_empty(sizes: list[int], count: int) -> None:
    sources = [Source(f"{i}.jsonl", "jsonl", None, size, "") for i, size in enumerate(sizes)]
    if count > len(sizes):
        with pytest.raises(UserError, match=f"there are {len(sizes)} files"):
            shard_of(sources, f"0/{count}")
        return
    shards = [shard_of(sources, f"{index}/{count}") for index in range(count)]
    assert all(shards)
    assert [source for shard in shards for source in shard] == sources
    equal = [Source(f"{i}.jsonl", "jsonl", None, 10, "") for i in range(3 * count)]
    assert [len(shard_of(equal, f"{i}/{count}")) for i in range(count)] == [3] * count
