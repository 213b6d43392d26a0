"""Reads the documents of a task, chunk by chunk, from any format."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from megatron_rw.data.text.records import BYTE_ORDER_MARK, LineReader, Raw, seek_line
from megatron_rw.data.text.sources import (
    STANDARD_INPUT,
    Source,
    damage,
    damage_errors,
    open_source,
    parquet_file,
)
from megatron_rw.errors import UserError

_BATCH_BYTES = 8 << 20
_BLANK = b" \t\r\n"
_END = object()


@dataclass(frozen=True)
class Reading:
    """How documents are read; the same for every source.

    Attributes:
        chunk_bytes: About how many bytes of text make a chunk.
        max_line_bytes: Bytes of the longest line that is taken.
        columns: The fields that are read, the text first.
        whole_files: Whether a .txt file is one document, rather than each of its lines.
    """

    chunk_bytes: int
    max_line_bytes: int
    columns: tuple[str, ...]
    whole_files: bool

    def by_lines(self, source: Source) -> bool:
        """Tells whether each line of the source is a document."""
        return source.format == "jsonl" or (source.format == "txt" and not self.whole_files)

    def only_from_start(self, source: Source) -> bool:
        """Tells whether the source cannot be entered in the middle."""
        if source.format == "parquet":
            return False
        special = source.compression is not None or source.path == STANDARD_INPUT
        return special or not self.by_lines(source)


@dataclass(frozen=True)
class Task:
    """Work for one worker: one chunk, or all of a source.

    Attributes:
        number: The chunk's number; -1 for all chunks of the source, one after the other.
        finished: Numbers of the chunks that are there already, if the task is a whole source.
        start: First byte at which a line of the chunk may begin; for Parquet the first row.
        end: The byte after the last one.
        row_groups: Parquet's row groups of the chunk.
        lines: The documents themselves, if only one process can read the source.
        line_count: Number of lines that those were, blank ones included.
        last: Whether this is the source's last chunk; unknown for a whole source.
        stored_bytes: Bytes of the source that the task reads, for the progress.
        skipped_bytes: Bytes between the task before and this one that were done already.
    """

    source: Source
    number: int
    finished: frozenset[int] = frozenset()
    start: int = 0
    end: int = 0
    row_groups: tuple[int, ...] = ()
    lines: tuple[Raw, ...] | None = field(default=None, repr=False)
    line_count: int = 0
    last: bool = False
    stored_bytes: int = 0
    skipped_bytes: int = 0


@dataclass
class Chunk:
    """The documents of one chunk.

    Attributes:
        number: Its place in the source, from 0.
        documents: Must be read to the end before the next chunk is asked for.
        lines: Number of lines in it, blank ones included; known at the end of `documents`.
        last: Whether it is the source's last one; known at the end of `documents`.
    """

    number: int
    documents: Iterator[Raw] = field(default_factory=lambda: iter(()))
    lines: int = 0
    last: bool = False


def read(task: Task, reading: Reading) -> Iterator[Chunk]:
    """Yields the chunks of a task, those that are finished already included.

    Raises:
        UserError: If the file is damaged; the message names the place.
    """
    source = task.source
    chunk = Chunk(task.number, lines=task.line_count, last=task.last)
    if task.lines is not None:
        chunk.documents = iter(task.lines)
        yield chunk
        return
    with open_source(source) as (stream, _):
        if source.format == "parquet":
            chunk.documents = _rows(parquet_file(source, stream), task, reading, chunk)
            yield chunk
        elif task.number >= 0:
            start = seek_line(stream, task.start, task.end)
            if start is not None:
                lines = LineReader(stream, reading.max_line_bytes, start)
                chunk.documents = _lines(lines, task.end, source, chunk)
            yield chunk
        elif reading.by_lines(source):
            yield from read_lines(stream, source, reading)
        elif source.format == "txt":
            yield Chunk(0, _whole(stream, source, reading), lines=1, last=True)
        else:
            yield from _json(stream, source, reading)


def read_lines(stream: BinaryIO, source: Source, reading: Reading) -> Iterator[Chunk]:
    """Yields the chunks of a file of lines that is read from its start."""
    lines = LineReader(stream, reading.max_line_bytes)
    number = 0
    while not lines.ended:
        chunk = Chunk(number)
        chunk.documents = _lines(lines, (number + 1) * reading.chunk_bytes, source, chunk)
        yield chunk
        number += 1


def _lines(lines: LineReader, end: int, source: Source, chunk: Chunk) -> Iterator[Raw]:
    try:
        yield from lines.until(end)
    except damage_errors(source) as error:
        raise damage(source, lines.total, error) from error
    chunk.lines = lines.lines
    chunk.last = chunk.last or lines.ended


def _whole(stream: BinaryIO, source: Source, reading: Reading) -> Iterator[Raw]:
    size = 0
    try:
        content = stream.read(reading.max_line_bytes + 1)
        if len(content) > reading.max_line_bytes:
            size = len(content)
            while piece := stream.read(1 << 20):
                size += len(piece)
    except damage_errors(source) as error:
        raise damage(source, 0, error) from error
    content = content.removeprefix(BYTE_ORDER_MARK)
    if content.strip():
        yield Raw(1, content[:200] if size else content, size)


def _rows(parquet: Any, task: Task, reading: Reading, chunk: Chunk) -> Iterator[Raw]:
    from pyarrow import ArrowException

    groups = [parquet.metadata.row_group(group) for group in task.row_groups]
    rows = sum(group.num_rows for group in groups)
    row_bytes = sum(group.total_byte_size for group in groups) // max(1, rows)
    batch = min(max(1, _BATCH_BYTES // max(1, row_bytes)), 8192)
    try:
        for table in parquet.iter_batches(
            batch_size=batch, row_groups=list(task.row_groups), columns=list(reading.columns)
        ):
            for record in table.to_pylist():
                chunk.lines += 1
                yield Raw(chunk.lines, record, 0)
    except (ArrowException, OSError, UnicodeDecodeError) as error:
        raise damage(task.source, task.start + chunk.lines, error) from error


def _json(stream: BinaryIO, source: Source, reading: Reading) -> Iterator[Chunk]:
    """Yields the chunks of a `.json` file: an array of objects, or objects one after the other."""
    try:
        import ijson
    except ImportError as error:
        raise UserError(
            f"{source.path}: reading it needs a package; run: pip install ijson, or rename it to "
            ".jsonl if each of its lines is an object"
        ) from error
    guarded = _Guarded(stream, source, reading.max_line_bytes)
    try:
        first = guarded.first()
    except damage_errors(source) as error:
        raise damage(source, 0, error) from error
    if not first:  # an empty file, which ijson takes for one that is cut off
        yield Chunk(0, last=True)
        return
    elements = ijson.items(guarded, "item" if first == b"[" else "", multiple_values=True)
    number = 0
    while not guarded.ended:
        chunk = Chunk(number)
        chunk.documents = _elements(elements, guarded, reading.chunk_bytes, chunk)
        yield chunk
        number += 1


class _Guarded:
    """A stream for ijson that refuses an element that is too long, and tells where it is."""

    def __init__(self, stream: BinaryIO, source: Source, limit: int) -> None:
        self._stream = stream
        self._limit = limit
        self._head = b""
        self.source = source
        self.position = 0
        self.element = 0
        self.element_start = 0
        self.ended = False

    def first(self) -> bytes:
        """Returns the first byte that is no white space, and leaves it in the stream."""
        while piece := self._stream.read(1 << 16):
            if stripped := piece.removeprefix(BYTE_ORDER_MARK).lstrip(_BLANK):
                self._head = stripped
                return stripped[:1]
        return b""

    def read(self, size: int) -> bytes:
        if size == 0:
            return b""
        piece, self._head = self._head[:size], self._head[size:]
        piece = piece or self._stream.read(size)
        self.position += len(piece)
        if self.position - self.element_start > self._limit + (2 << 16):
            raise UserError(
                f"{self.source.path}: element {self.element + 1} is longer than "
                f"--max-line-bytes {self._limit}; split the document"
            )
        return piece


def _elements(elements: Any, guarded: _Guarded, chunk_bytes: int, chunk: Chunk) -> Iterator[Raw]:
    import ijson

    source = guarded.source
    size = 0
    try:
        # The size is that of the elements, since how far ijson has read depends on its buffer.
        while size < chunk_bytes:
            element = next(elements, _END)
            if element is _END:
                guarded.ended = chunk.last = True
                return
            guarded.element += 1
            guarded.element_start = guarded.position
            chunk.lines += 1
            record = element if isinstance(element, dict) else {}
            size += 1 + sum(len(value) for value in record.values() if isinstance(value, str))
            other = b"" if record else json.dumps(element, default=str).encode("utf-8", "replace")
            yield Raw(chunk.lines, record or other, 0)
    except (ijson.JSONError, UnicodeDecodeError, *damage_errors(source)) as error:
        raise damage(source, guarded.element, error) from error
