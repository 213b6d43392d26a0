"""Reading from URLs, of files that are as the packages of object stores make them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.spec import AbstractBufferedFile

from megatron_rw.data.text import chunks
from tests.data.conftest import Preprocess, make_texts, write_texts
from tests.data.datasets import datasets


class StoreError(Exception):
    """As the packages' own errors, no OSError."""


class RangedFile(AbstractBufferedFile):
    """What s3fs, gcsfs and fsspec's HTTP give: ranges of bytes are fetched."""

    def _fetch_range(self, start: int, end: int) -> bytes:
        content: bytes = self.fs.store[self.path].getvalue()[start:end]
        return content


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[MemoryFileSystem]:
    open_whole = MemoryFileSystem._open

    def open_ranged(
        system: MemoryFileSystem, path: str, mode: str, block_size: int | None, **options: Any
    ) -> Any:
        if mode != "rb":
            return open_whole(system, path, mode, block_size, **options)
        assert block_size is not None
        assert block_size < 8 << 20  # s3fs fetches 50 MB at a time unless told
        return RangedFile(system, path, mode, block_size)

    system = fsspec.filesystem("memory")
    monkeypatch.setattr(MemoryFileSystem, "_open", open_ranged)
    yield system
    system.rm("/bucket", recursive=True)


@pytest.fixture
def inputs(tmp_path: Path, bucket: MemoryFileSystem) -> list[Path]:
    """Local files, read as lines, whole and by rows, which are in the bucket as well."""
    texts = make_texts(160, 3)
    paths = [
        write_texts(tmp_path / "in" / "a.jsonl", texts[:60]),
        write_texts(tmp_path / "in" / "b.jsonl.gz", texts[60:100]),
        tmp_path / "in" / "c.parquet",
    ]
    pq.write_table(pa.table({"text": texts[100:]}), paths[2], row_group_size=7)
    for path in paths:
        bucket.pipe(f"/bucket/{path.name}", path.read_bytes())
    bucket.pipe("/bucket/readme.md", b"no data")
    return paths


@pytest.mark.parametrize(("pattern", "workers"), [("", 1), ("/*.*", 2)])
def test_what_is_read_is_what_local_files_hold(
    tmp_path: Path,
    inputs: list[Path],
    run: Preprocess,
    pattern: str,
    workers: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(chunks, "_SMALLEST", 1000)
    run(f"memory://bucket{pattern}", tmp_path / "url", workers=workers)
    run(inputs, tmp_path / "file", workers=workers)
    assert datasets(tmp_path / "url") == datasets(tmp_path / "file")


def test_a_store_that_hangs_up_is_an_error_and_nothing_is_lost(
    tmp_path: Path, bucket: MemoryFileSystem, run: Preprocess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "_SMALLEST", 20_000)
    monkeypatch.setattr("megatron_rw.data.text.streams._BLOCK_BYTES", 50_000)
    local = write_texts(tmp_path / "a.jsonl", make_texts(1000, 4))
    bucket.pipe("/bucket/a.jsonl", local.read_bytes())
    fetch = RangedFile._fetch_range

    def hang_up(file: RangedFile, start: int, end: int) -> bytes:
        if start > 100_000:
            raise StoreError("the store hung up")
        return fetch(file, start, end)

    with monkeypatch.context() as context:
        context.setattr(RangedFile, "_fetch_range", hang_up)
        refused = run("memory://bucket/a.jsonl", tmp_path / "url", status=2)
    assert refused.error == "error: memory:///bucket/a.jsonl: the store hung up"
    assert "going on from" in run("memory://bucket/a.jsonl", tmp_path / "url").err
    run(local, tmp_path / "file")
    assert datasets(tmp_path / "url") == datasets(tmp_path / "file")


def test_a_url_that_nothing_opens_is_an_error(
    tmp_path: Path, bucket: MemoryFileSystem, run: Preprocess, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.pipe("/bucket/a.md", b"no data")
    refused = run("memory://bucket", tmp_path / "out", status=2).error
    assert "--input memory://bucket: no file to read in it; the suffixes there: .md" in refused

    def ask(system: MemoryFileSystem, path: str) -> bool:
        raise StoreError("no credentials")

    with monkeypatch.context() as context:
        context.setattr(MemoryFileSystem, "isdir", ask)
        refused = run("memory://bucket", tmp_path / "out", status=2).error
    assert refused == "error: --input memory://bucket: no credentials"
