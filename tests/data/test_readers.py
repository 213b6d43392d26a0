import gzip
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from backports import zstd
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rw.data.text.chunks import Reading, read, tasks
from megatron_rw.data.text.records import BYTE_ORDER_MARK, Raw
from megatron_rw.data.text.sources import Source, find_sources
from megatron_rw.errors import UserError

# Lines short and long, blank, and with whatever ends one.
LINES = st.lists(
    st.one_of(
        st.binary(max_size=12).map(lambda line: line.replace(b"\n", b"x")),
        st.sampled_from([b"", b"  ", b"\r", b"a" * 30, b"b" * 31, b"c" * 32, b"d" * 200]),
    ),
    max_size=14,
)
LIMIT = 30
CUT = gzip.compress(b"{}\n" * 9999, mtime=0)[:-12]
ANY_FILE = settings(max_examples=60)


def reading(chunk_bytes: int = 1 << 20, limit: int = LIMIT, **changes: Any) -> Reading:
    usual: dict[str, Any] = {"columns": ("text",), "whole_files": False}
    return Reading(chunk_bytes=chunk_bytes, max_line_bytes=limit, **{**usual, **changes})


def documents(source: Source, reading: Reading) -> Iterator[Raw]:
    """All documents of a source in order; a `line` counts from the start of the file."""
    before = 0
    work = tasks([source], reading, 1, lambda _: frozenset())
    for task in sorted(work, key=lambda task: task.number):
        for chunk in read(task, reading):
            for raw in chunk.documents:
                yield replace(raw, line=before + raw.line)
            before += chunk.lines


def write(path: Path, content: bytes) -> Source:
    if path.suffix == ".gz":  # of two members
        half = len(content) // 2
        content = gzip.compress(content[:half]) + gzip.compress(content[half:])
    if path.suffix == ".zst":
        content = zstd.compress(content)
    path.write_bytes(content)
    return find_sources([str(path)])[0]


def expected(content: bytes) -> list[tuple[int, bytes, bool]]:
    """What a file of lines holds, in the plainest way."""
    raws = []
    for number, line in enumerate(content.split(b"\n"), start=1):
        bare = line.rstrip(b"\r")
        if len(bare) > LIMIT:
            raws.append((number, bare[:LIMIT], True))
            continue
        if number == 1:
            bare = bare.removeprefix(BYTE_ORDER_MARK)
        if bare.strip():
            raws.append((number, bare, False))
    return raws


def seen(raws: Iterable[Raw]) -> list[Any]:
    return [
        (raw.line, raw.content[:LIMIT] if isinstance(raw.content, bytes) else None, raw.size > 0)
        for raw in raws
    ]


@ANY_FILE
@given(
    lines=LINES,
    mark=st.sampled_from([b"", BYTE_ORDER_MARK]),
    end=st.sampled_from([b"", b"\n"]),
    suffix=st.sampled_from([".jsonl", ".txt", ".jsonl.gz", ".jsonl.zst"]),
    chunk_bytes=st.integers(1, 90),
    workers=st.sampled_from([1, 4]),
    finished=st.sets(st.integers(0, 8)).map(frozenset),
)
def test_chunks_hold_every_line_once_and_finished_ones_are_not_handed_out(
    tmp_path: Path,
    lines: list[bytes],
    mark: bytes,
    end: bytes,
    suffix: str,
    chunk_bytes: int,
    workers: int,
    finished: frozenset[int],
) -> None:
    content = mark + b"\n".join(lines) + end
    source, how = write(tmp_path / f"in{suffix}", content), reading(chunk_bytes)
    work = sorted(tasks([source], how, workers, lambda _: frozenset()), key=lambda t: t.number)
    found = []
    before, last = 0, []
    for task in work:
        for number, chunk in enumerate(read(task, how), start=max(0, task.number)):
            assert chunk.number == number
            found += [(before + line, *rest) for line, *rest in seen(chunk.documents)]
            before += chunk.lines
            last.append(chunk.last)
    assert found == expected(content)
    assert last == [False] * (len(last) - 1) + [True]
    assert seen(documents(source, how)) == found

    work = list(tasks([source], how, workers, lambda _: finished))
    for task in work:
        assert task.finished == finished if task.number < 0 else task.number not in finished
    # Every byte is told of once, but for what was done already after the last task.
    told = sum(task.skipped_bytes + task.stored_bytes for task in work)
    assert told <= source.size
    if any(task.last or task.number < 0 for task in work):
        assert told == source.size
    if suffix == ".jsonl":
        ends = [0, *(task.end for task in work)]
        skipped = [task.start - end for task, end in zip(work, ends, strict=False)]
        assert [task.skipped_bytes for task in work] == skipped
    assert list(tasks([source], how, workers, lambda _: None)) == []


def test_a_file_is_one_document_or_a_document_a_line(tmp_path: Path) -> None:
    source = write(tmp_path / "in.txt", BYTE_ORDER_MARK + b"one\r\n\ntwo\n")
    assert [raw.content for raw in documents(source, reading())] == [b"one", b"two"]
    whole = reading(whole_files=True)
    assert [raw.content for raw in documents(source, whole)] == [b"one\r\n\ntwo\n"]
    long = write(tmp_path / "long.txt.gz", b"one\n" * 20)
    assert [raw.size for raw in documents(long, whole)] == [80]
    assert list(documents(write(tmp_path / "blank.txt", b" \n\n"), whole)) == []


@ANY_FILE
@given(
    texts=st.lists(st.text(st.characters(codec="utf-8"), max_size=20) | st.none(), max_size=20),
    row_group=st.integers(1, 7),
    chunk_bytes=st.integers(1, 400),
)
def test_parquet_rows_are_documents(
    tmp_path: Path, texts: list[str | None], row_group: int, chunk_bytes: int
) -> None:
    path = tmp_path / "in.parquet"
    table = pa.table({"id": list(range(len(texts))), "text": pa.array(texts, pa.string())})
    pq.write_table(table, path, row_group_size=row_group)
    found = list(documents(find_sources([str(path)])[0], reading(chunk_bytes)))
    assert [(raw.line, raw.content) for raw in found] == [
        (row, {"text": text}) for row, text in enumerate(texts, start=1)
    ]
    with pytest.raises(UserError, match=r"in\.parquet: no column 'body'; it has: id, text"):
        list(documents(find_sources([str(path)])[0], reading(columns=("body",))))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl.gz", CUT, r"damaged gzip data \(C"),
        ("a.jsonl.gz", b"{}\n", r"damaged gzip data \(Not a gzipped file"),
        ("a.jsonl.zst", zstd.compress(b"{}\n" * 9999)[:-5], r"damaged zstd data \("),
        ("a.jsonl.zst", b"{}\n", r"damaged zstd data \("),
        ("a.json", b'\n [{"text": "a"}]', r"is an array, and only JSON lines are read; make lines"),
        ("a.json.gz", gzip.compress(b"[]"), r"is an array, and only JSON lines are read; make"),
        ("a.parquet", b"PAR1 no", r"damaged parquet data \("),
    ],
)
def test_damage_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        list(documents(find_sources([str(path)])[0], reading()))
    assert str(error.value).startswith(f"{path}: ")


@settings(ANY_FILE, max_examples=200)
@given(
    content=st.binary(max_size=300),
    name=st.sampled_from(["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.txt"]),
    head=st.sampled_from(
        [b"", gzip.compress(b"{}\n", mtime=0)[:14], zstd.compress(b"{}")[:6], b"PAR1", b"["]
    ),
    whole=st.booleans(),
)
def test_random_bytes_are_read_or_refused(
    tmp_path: Path, content: bytes, name: str, head: bytes, whole: bool
) -> None:
    path = tmp_path / name
    path.write_bytes(head + content)
    try:
        found = list(documents(find_sources([str(path)])[0], reading(20, whole_files=whole)))
    except UserError as error:
        assert str(error).startswith(f"{path}: ")  # noqa: PT017
    else:
        assert all(raw.line > 0 for raw in found)
