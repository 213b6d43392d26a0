import dataclasses
import struct
import tracemalloc
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rw.data import merge_datasets
from megatron_rw.data.indexed import documents as blocks
from megatron_rw.data.indexed import domains
from megatron_rw.data.indexed.pair import HEADER, PairWriter
from tests.data.datasets import (
    TOKENIZER,
    Document,
    exit_status,
    files,
    read_dataset,
    write_dataset,
    write_directory,
)

IN_TEMPORARY = settings(max_examples=25)
# Few tokens, so that copies are many.
DOCUMENT = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=3), min_size=1, max_size=2)
SHARDS = st.lists(
    st.dictionaries(st.sampled_from("abc"), st.lists(DOCUMENT, min_size=1, max_size=8), min_size=1),
    min_size=1,
    max_size=4,
)


def merge(*flags: object) -> int:
    return exit_status(merge_datasets.main, *flags)


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


@IN_TEMPORARY
@given(shards=SHARDS, dedup=st.booleans(), block_documents=st.integers(1, 9))
def test_shards_are_joined_into_what_core_writes_of_all(
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    shards: list[Mapping[str, list[Document]]],
    dedup: bool,
    block_documents: int,
) -> None:
    monkeypatch.setattr(blocks, "_DOCUMENTS", block_documents)
    monkeypatch.setattr(blocks, "_BYTES", 8)
    tmp_path = tmp_path_factory.mktemp("merge")
    inputs = [write_directory(tmp_path / str(i), shard) for i, shard in enumerate(shards)]
    flags = ["--dedup", "exact"] if dedup else []
    assert merge("--input-dir", *inputs, "--output-dir", tmp_path / "out", *flags) == 0
    expected = joined(without_copies(shards) if dedup else shards)
    expected = {name: documents for name, documents in expected.items() if documents}
    write_directory(tmp_path / "expected", expected)
    assert files(tmp_path / "out") == files(tmp_path / "expected")
    total = sum(len(sequence) for ds in expected.values() for d in ds for sequence in d)
    for line, (name, documents) in zip(
        (tmp_path / "out" / "blend.txt").read_text().splitlines(), expected.items(), strict=True
    ):
        weight, prefix = line.split()
        assert prefix == f"{tmp_path}/out/{name}_text_document"
        tokens = sum(len(sequence) for document in documents for sequence in document)
        assert float(weight) == pytest.approx(tokens / total, rel=1e-5)


@IN_TEMPORARY
@given(
    datasets=st.lists(st.lists(DOCUMENT, min_size=1, max_size=8), min_size=1, max_size=4),
    dtype=st.sampled_from([np.uint16, np.int32]),
    dedup=st.booleans(),
)
def test_datasets_are_joined_into_what_core_writes_of_all(
    tmp_path_factory: pytest.TempPathFactory,
    datasets: list[list[Document]],
    dtype: type[Any],
    dedup: bool,
) -> None:
    tmp_path = tmp_path_factory.mktemp("merge")
    inputs = [write_dataset(tmp_path / str(i), ds, dtype) for i, ds in enumerate(datasets)]
    flags = ["--dedup", "exact"] if dedup else []
    output = tmp_path / "out" / "all"
    assert merge("--input", *inputs, "--output-prefix", output, *flags) == 0
    shards: list[Mapping[str, list[Document]]] = [{"all": documents} for documents in datasets]
    expected = joined(without_copies(shards) if dedup else shards)["all"]
    assert read_dataset(output) == expected
    write_dataset(tmp_path / "expected" / "all", expected, dtype)
    assert files(tmp_path / "out") == files(tmp_path / "expected")


def test_memory_does_not_grow_with_the_documents(tmp_path: Path) -> None:
    count = 150_000
    with PairWriter(tmp_path / "many", np.int32) as writer:
        writer.write_tokens(np.arange(count, dtype=np.int32))
        writer.add_documents(np.ones(count, np.int32))
        writer.finalize()
    peaks = []
    for inputs in (["many"], ["many"] * 6):
        flags = ("--output-prefix", tmp_path / "out", "--overwrite", "--dedup", "exact")
        tracemalloc.start()
        assert merge("--input", *(tmp_path / name for name in inputs), *flags) == 0
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert len(read_dataset(tmp_path / "out")) == count
    assert peaks[1] < peaks[0] + 12_000_000  # a list of 750,000 ints takes 27,000,000


ONE: list[Document] = [[[1, 2, 3]], [[4], [5, 6]]]


def spoiled(tmp_path: Path, spoil: str) -> list[object]:
    """Flags of a merge of two directories, of which the second is spoiled."""
    first = write_directory(tmp_path / "first", {"a": ONE})
    tokenizer = {
        "sha256": dataclasses.replace(TOKENIZER, sha256="cd" * 32, model="t/other.model"),
        "type": dataclasses.replace(TOKENIZER, type="HuggingFaceTokenizer"),
    }.get(spoil, TOKENIZER)
    second = write_directory(tmp_path / "second", {"a": ONE}, tokenizer)
    prefix = second / "a_text_document"
    if spoil == "dtype":
        write_dataset(prefix, ONE, np.int32)
    elif spoil == "cut":
        data = prefix.with_suffix(".bin").read_bytes()
        prefix.with_suffix(".bin").write_bytes(data[:-2])
    elif spoil == "no bin":
        prefix.with_suffix(".bin").unlink()
    elif spoil == "counts":
        write_dataset(prefix, ONE[:1])
    elif spoil == "no file":
        (second / "domains.json").unlink()
    elif spoil == "no json":
        (second / "domains.json").write_text("{")
    elif spoil == "prefix":
        record = domains.DomainRecord("a_text_document", 2, 6, 6)
        domains.DomainsFile(TOKENIZER, {"b": record}).save(second / "domains.json")
    return ["--input-dir", first, second, "--output-dir", tmp_path / "out"]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ("sha256", "second/a_text_document: its tokenizer is t/other.model (sha256 cdcdcd"),
        ("type", "its tokenizer is t/bpe.model (type HuggingFaceTokenizer), and that of"),
        ("dtype", "second/a_text_document: its token ids are int32, and those of"),
        ("cut", "second/a_text_document.bin is cut off: it has 10 bytes"),
        ("no bin", "second/a_text_document.bin: no such file, but its .idx is there"),
        ("counts", "second/a_text_document: has 1 documents of 3 tokens, and domains.json"),
        ("no file", "second: has no domains.json; give a complete directory"),
        ("no json", "second/domains.json: not JSON"),
        ("prefix", "second/a_text_document: is of the domain 'b', and of another one"),
    ],
)
def test_inputs_that_do_not_fit_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], spoil: str, message: str
) -> None:
    assert merge(*spoiled(tmp_path, spoil)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
    if spoil == "sha256":
        inputs = [tmp_path / name / "a_text_document" for name in ("first", "second")]
        assert merge("--input", *inputs, "--output-prefix", tmp_path / "out") == 2
        assert message in capsys.readouterr().err


def change_table(prefix: Path, place: int, value: bytes) -> None:
    data = bytearray(prefix.with_suffix(".idx").read_bytes())
    data[HEADER.size + place : HEADER.size + place + len(value)] = value
    prefix.with_suffix(".idx").write_bytes(data)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (12 + 8, struct.pack("<q", 8), "document 1 does not begin where the lengths"),
        (12 + 24, struct.pack("<q", 1), "the bounds of document 0 do not follow"),
        (12 + 24 + 8, struct.pack("<q", 9), "the bounds of document 0 do not follow"),
        (12 + 24 + 16, struct.pack("<q", 2), "the bounds of document 1 do not follow"),
    ],
)
def test_an_index_that_contradicts_itself_is_named_and_nothing_is_left(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    place: int,
    value: bytes,
    message: str,
) -> None:
    prefix = write_dataset(tmp_path / "in" / "a", ONE)
    change_table(prefix, place, value)
    assert merge("--input", prefix, "--output-prefix", tmp_path / "out" / "a") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {prefix}.idx: {message}")
    assert list((tmp_path / "out").iterdir()) == []


def test_what_is_there_is_replaced_only_when_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = write_directory(tmp_path / "one", {"a": ONE})
    two = write_directory(tmp_path / "two", {"b": ONE})
    for source, target in (
        (["--input-dir", one], ["--output-dir", tmp_path / "out"]),
        (["--input", one / "a_text_document"], ["--output-prefix", tmp_path / "out" / "c"]),
    ):
        assert merge(*source, *target) == 0
        before = files(tmp_path / "out")
        assert merge(*source, *target) == 2
        assert "or --overwrite to replace" in capsys.readouterr().err
        assert files(tmp_path / "out") == before
        assert merge(*source, target[0], source[1], "--overwrite") == 2
        assert "is one of --input" in capsys.readouterr().err
    target = ["--output-dir", tmp_path / "out", "--overwrite"]
    assert merge("--input-dir", two, *target) == 0
    assert sorted(files(tmp_path / "out")) == [
        "b_text_document.bin", "b_text_document.idx", "c.bin", "c.idx", "domains.json",
    ]  # fmt: skip


def test_a_full_disk_is_told_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    one = write_directory(tmp_path / "one", {"a": ONE})
    assert merge("--input-dir", one, "--output-dir", tmp_path / "out") == 2
    assert "0.0 GB are free, and 0.0 are needed; make room" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    "flags",
    [
        "--input a --output-dir b",
        "--input-dir a --output-prefix b",
        "--input a --output-dir b --output-prefix c",
        "--input a",
    ],
)
def test_inputs_and_outputs_are_of_one_kind(capsys: pytest.CaptureFixture[str], flags: str) -> None:
    assert merge(*flags.split()) == 2
    assert "give --input with --output-prefix, or" in capsys.readouterr().err
