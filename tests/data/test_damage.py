"""A damaged dataset is named by every tool that reads it."""

import struct
from pathlib import Path
from typing import Any

import pytest

from megatron_rw.data import inspect_dataset, merge_datasets, split_dataset
from megatron_rw.data.indexed.pair import HEADER, MAGIC
from tests.data.datasets import Document, call, overwrite, write_dataset, write_directory

DOCUMENTS: list[Document] = [[[1, 2, 3]], [[4]], [[5, 6]]]


def header(version: int, code: int, sequences: int = 0, bounds: int = 1) -> Any:
    content = HEADER.pack(MAGIC, version, code, sequences, bounds)
    return lambda bin_, idx: idx.write_bytes(content)


def table(place: int, value: int) -> Any:
    """Changes a number in the tables of an index: lengths, offsets, and bounds of documents."""
    return lambda bin_, idx: overwrite(idx, HEADER.size + place, struct.pack("<q", value))


def split_in_two(bin_: Path, idx: Path) -> None:
    """Makes two sequences of a document."""
    write_dataset(bin_.with_suffix(""), [[[1, 2, 3]], [[4], [5, 6]]])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda bin_, idx: bin_.unlink(), "a_text_document.bin: no such file, but its .idx"),
        (lambda bin_, idx: idx.unlink(), "a_text_document.idx: no such file"),
        (lambda bin_, idx: overwrite(idx, 0, b"x"), "a_text_document.idx is no index of a dataset"),
        (
            lambda bin_, idx: idx.write_bytes(b"MMIDIDX"),
            "a_text_document.idx is no index of a data",
        ),
        (header(2, 8), "a_text_document.idx has version 2 and type 8"),
        (header(1, 99), "a_text_document.idx has version 1 and type 99"),
        (header(1, 8, 3, 4), "a_text_document.idx has 34 bytes, and its header tells of 102"),
        (lambda bin_, idx: bin_.write_bytes(bytes(10)), "a_text_document.bin is cut off: it has"),
        (lambda bin_, idx: bin_.write_bytes(bytes(14)), "a_text_document.bin belongs to another"),
        (table(12 + 8, 8), "a_text_document.idx: document 1 does not begin or end where"),
        (table(12 + 24, 1), "a_text_document.idx: document 0 does not begin or end where"),
        (table(12 + 24 + 8, 9), "a_text_document.idx: document 0 does not begin or end where"),
        (table(12 + 24 + 24, 2), "a_text_document.idx: document 2 does not begin or end where"),
        (split_in_two, "a_text_document.idx: has documents of several sequences"),
    ],
)
def test_damage_is_named_and_nothing_is_left(tmp_path: Path, damage: Any, message: str) -> None:
    directory, out = write_directory(tmp_path / "in", {"a": DOCUMENTS}), tmp_path / "out"
    good = write_dataset(tmp_path / "good", DOCUMENTS)
    damage(*(directory / f"a_text_document.{kind}" for kind in ("bin", "idx")))
    for main, *flags in (
        (merge_datasets.main, "--output-dir", out, "--input-dir", directory),
        (split_dataset.main, "--output-dir", out, "--valid-fraction", 0.5, "--input", directory),
    ):
        ended = call(main, *flags, status=2)
        assert message in ended.error
        assert ended.err == ended.error + "\n"
        assert not [path for path in out.rglob("*") if path.is_file()]
    told = call(inspect_dataset.main, directory, good, "--check", status=1).out
    assert message in told[told.index("  PROBLEM: ") :]
    assert told.count("  PROBLEM: ") == 1
    assert f"{good}: domain" in told
