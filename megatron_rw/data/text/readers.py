"""Reads the documents of a task, chunk by chunk, from any format."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from megatron_rw.data.text.chunks import Reading, Task
from megatron_rw.data.text.records import BYTE_ORDER_MARK, LineReader, Raw, seek_line
from megatron_rw.data.text.sources import Source, damage, damage_errors, open_source, parquet_file
from megatron_rw.errors import UserError

_BATCH_BYTES = 8 << 20
_BLANK = b" \t\r\n"
_END = object()


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
    documents: Iterator[Raw]
    lines: int = 0
    last: bool = False


def read(task: Task, reading: Reading) -> Iterator[Chunk]:
    """Yields the chunks of a task, those that are finished already included.

    Raises:
        UserError: If the file is damaged; the message names the place.
    """
    if task.lines is not None:
        yield Chunk(task.number, iter(task.lines), task.line_count, task.last)
        return
    source = task.source
    with open_source(source) as (stream, _):
        if source.format == "parquet":
            chunk = Chunk(task.number, iter(()), last=task.last)
            chunk.documents = _rows(parquet_file(source, stream), task, reading, chunk)
            yield chunk
        elif task.number >= 0:
            yield _range(stream, task, reading)
        elif reading.by_lines(source):
            yield from _stream(stream, source, reading)
        elif source.format == "txt":
            yield _whole(stream, source, reading)
        else:
            yield from _json(stream, source, reading)


def _range(stream: BinaryIO, task: Task, reading: Reading) -> Chunk:
    chunk = Chunk(task.number, iter(()), last=task.last)
    start = seek_line(stream, task.start, task.end)
    if start is not None:
        lines = LineReader(stream, reading.max_line_bytes, start)
        chunk.documents = _lines(lines, task.end, task.source, chunk)
    return chunk


def _stream(stream: BinaryIO, source: Source, reading: Reading) -> Iterator[Chunk]:
    lines = LineReader(stream, reading.max_line_bytes)
    number = 0
    while not lines.ended:
        chunk = Chunk(number, iter(()))
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


def _whole(stream: BinaryIO, source: Source, reading: Reading) -> Chunk:
    try:
        content = stream.read(reading.max_line_bytes + 1)
        size = 0
        if len(content) > reading.max_line_bytes:
            size = len(content)
            while piece := stream.read(1 << 20):
                size += len(piece)
            content = content[:200]
    except damage_errors(source) as error:
        raise damage(source, 0, error) from error
    content = content.removeprefix(BYTE_ORDER_MARK)
    documents = [Raw(1, content, size)] if content.strip() else []
    return Chunk(0, iter(documents), lines=1, last=True)


def _rows(parquet: Any, task: Task, reading: Reading, chunk: Chunk) -> Iterator[Raw]:
    from pyarrow import ArrowException

    sizes = [parquet.metadata.row_group(group) for group in task.row_groups]
    rows = sum(group.num_rows for group in sizes)
    row_bytes = sum(group.total_byte_size for group in sizes) // max(1, rows)
    batch = min(max(1, _BATCH_BYTES // max(1, row_bytes)), 8192)
    line = 0
    try:
        for table in parquet.iter_batches(
            batch_size=batch, row_groups=list(task.row_groups), columns=list(reading.columns)
        ):
            for record in table.to_pylist():
                line += 1
                yield Raw(line, record, 0)
    except (ArrowException, OSError, UnicodeDecodeError) as error:
        raise damage(task.source, task.start + line, error) from error
    chunk.lines = line


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
        yield Chunk(0, iter(()), last=True)
        return
    elements = ijson.items(guarded, "item" if first == b"[" else "", multiple_values=True)
    number = 0
    while not guarded.ended:
        chunk = Chunk(number, iter(()))
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
