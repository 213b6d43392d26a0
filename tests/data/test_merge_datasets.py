import dataclasses
import tracemalloc
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rw.data import merge_datasets
from megatron_rw.data.indexed import documents as blocks
from megatron_rw.data.indexed.domains import DomainsFile
from megatron_rw.data.indexed.pair import Index, PairWriter
from tests.data.datasets import (
    TOKENIZER,
    Document,
    Ended,
    call,
    datasets,
    fresh,
    read_dataset,
    record,
    write_dataset,
    write_directory,
)

# Few tokens, so that copies are many.
DOCUMENT = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=3), min_size=1, max_size=1)
SHARDS = st.lists(
    st.dictionaries(st.sampled_from("abc"), st.lists(DOCUMENT, min_size=1, max_size=8), min_size=1),
    min_size=1,
    max_size=4,
)


def merge(*flags: object, status: int = 0) -> Ended:
    return call(merge_datasets.main, *flags, status=status)


def joined(shards: Sequence[Mapping[str, list[Document]]]) -> dict[str, list[Document]]:
    names = dict.fromkeys(name for shard in shards for name in shard)
    return {name: [d for shard in shards for d in shard.get(name, [])] for name in names}


def without_copies(shards: list[Mapping[str, list[Document]]]) -> list[dict[str, list[Document]]]:
    seen: set[tuple[int, ...]] = set()
    kept: list[dict[str, list[Document]]] = []
    for shard in shards:
        kept.append({name: [] for name in shard})
        for name, documents in shard.items():
            for document in documents:
                tokens = tuple(token for sequence in document for token in sequence)
                if tokens not in seen:
                    seen.add(tokens)
                    kept[-1][name].append(document)
    return kept


@settings(max_examples=25)
@given(
    shards=SHARDS,
    dedup=st.booleans(),
    dtype=st.sampled_from([np.uint16, np.int32]),
    block_documents=st.integers(1, 9),
)
def test_inputs_are_joined_into_what_core_writes_of_all(
    tmp_path: Path,
    shards: list[Mapping[str, list[Document]]],
    dedup: bool,
    dtype: type[Any],
    block_documents: int,
) -> None:
    tmp_path = fresh(tmp_path)
    out, core = tmp_path / "out", tmp_path / "core"
    inputs = [write_directory(tmp_path / str(i), shard, dtype) for i, shard in enumerate(shards)]
    flags = ["--dedup", "exact"] if dedup else []
    with pytest.MonkeyPatch.context() as context:
        context.setattr(blocks, "_DOCUMENTS", block_documents)
        context.setattr(blocks, "_BYTES", 8)
        merge("--input-dir", *inputs, "--output-dir", out, *flags)
    expected = joined(without_copies(shards) if dedup else shards)
    expected = {name: documents for name, documents in expected.items() if documents}
    write_directory(core, expected, dtype)
    assert datasets(out) == datasets(core)
    counts = [record(name, documents).tokens for name, documents in expected.items()]
    blend = (out / "blend.txt").read_text().split()
    assert blend[1::2] == [f"{out}/{name}_text_document" for name in expected]
    assert list(map(float, blend[::2])) == pytest.approx(
        [n / sum(counts) for n in counts], rel=1e-5
    )


def test_memory_does_not_grow_with_the_documents(tmp_path: Path) -> None:
    count = 150_000
    with PairWriter(tmp_path / "a", np.int32) as writer:
        writer.write_tokens(np.arange(count, dtype=np.int32))
        writer.add_documents(np.ones(count, np.int32))
        DomainsFile(TOKENIZER, {"a": writer.finalize()}).save(tmp_path / "domains.json")
    peaks = []
    for inputs in ([tmp_path], [tmp_path] * 6):
        flags = ("--output-dir", tmp_path / "out", "--overwrite", "--dedup", "exact")
        tracemalloc.start()
        merge("--input-dir", *inputs, *flags)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert len(Index.open(tmp_path / "out" / "a").lengths) == count
    assert peaks[1] < peaks[0] + 12_000_000  # a list of 750,000 ints takes 27,000,000


ONE: list[Document] = [[[1, 2, 3]], [[4, 5, 6]]]


def make(directory: Path, **changes: Any) -> None:
    made_by = dataclasses.replace(TOKENIZER, **changes)
    write_directory(directory, {"a": ONE}, tokenizer=made_by)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda d: make(d, sha256="cd" * 32, model="t/other.model"),
            "second/a_text_document: its tokenizer is t/other.model (sha256 cdcdcd",
        ),
        (
            lambda d: make(d, type="HuggingFaceTokenizer"),
            "its tokenizer is t/bpe.model (type HuggingFaceTokenizer), and that of",
        ),
        (
            lambda d: write_dataset(d / "a_text_document", ONE, np.int32),
            "second/a_text_document: its token ids are int32, and those of",
        ),
        (
            lambda d: write_dataset(d / "a_text_document", ONE[:1]),
            "second/a_text_document: has 1 documents of 3 tokens, and domains.json",
        ),
        (
            lambda d: DomainsFile(TOKENIZER, {"b": record("a", ONE)}).save(d / "domains.json"),
            "second/a_text_document: is of the domain 'b', and of another one",
        ),
        (
            lambda d: DomainsFile(TOKENIZER, {}).save(d / "domains.json"),
            "second/domains.json: lists no domains; give a directory that has some",
        ),
    ],
)
def test_inputs_that_do_not_fit_are_named(tmp_path: Path, spoil: Any, message: str) -> None:
    inputs = [write_directory(tmp_path / name, {"a": ONE}) for name in ("first", "second")]
    spoil(inputs[1])
    refused = merge("--input-dir", *inputs, "--output-dir", tmp_path / "out", status=2)
    assert message in refused.error
    assert not (tmp_path / "out").exists()


def test_what_is_there_is_replaced_when_asked(tmp_path: Path) -> None:
    one, two = (write_directory(tmp_path / name, {name: ONE}) for name in "ab")
    out = tmp_path / "out"
    for _ in range(2):
        merge("--input-dir", one, "--output-dir", out, "--overwrite")
    merge("--input-dir", two, "--output-dir", out, "--overwrite")
    names = ["b_text_document.bin", "b_text_document.idx", "domains.json"]
    assert sorted(datasets(out)) == names
    assert read_dataset(out / "b_text_document") == ONE


def test_a_full_disk_is_told_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10))
    one = write_directory(tmp_path / "one", {"a": ONE})
    refused = merge("--input-dir", one, "--output-dir", tmp_path / "out", status=2)
    assert "0.0 GB are free, and 0.0 are needed; make room" in refused.error
    assert list((tmp_path / "out").iterdir()) == []
