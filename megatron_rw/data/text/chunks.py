"""Cuts the inputs into chunks, and reads the documents of a chunk from any format.

A chunk is a run of documents of one source, which a worker turns into one part of the output, and
its number tells its place in the source. The cuts depend on the source and `chunk_bytes` alone, so
that parts made by any number of workers, in any order, before or after an interruption, are the
same.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, BinaryIO

from megatron_rw.data.text.records import BYTE_ORDER_MARK, LineReader, Raw, seek_line
from megatron_rw.data.text.sources import Source
from megatron_rw.data.text.streams import (
    STANDARD_INPUT,
    damage,
    open_stream,
    parquet_file,
)
from megatron_rw.errors import UserError

_SMALLEST, _LARGEST = 1 << 20, 16 << 20
_BATCH_BYTES = 8 << 20


@dataclass(frozen=True)
class Reading:
    """How documents are read; the same for every source."""

    chunk_bytes: int  # About how many bytes of text make a chunk.
    max_line_bytes: int
    columns: tuple[str, ...]  # The fields that are read, the text first.
    whole_files: bool  # Whether a .txt file is one document, rather than each of its lines.

    def by_lines(self, source: Source) -> bool:
        """Tells whether each line of the source is a document."""
        return source.format in ("jsonl", "json") or (
            source.format == "txt" and not self.whole_files
        )

    def only_from_start(self, source: Source) -> bool:
        """Tells whether the source cannot be entered in the middle."""
        if source.format == "parquet":
            return False
        special = source.compression is not None or source.path == STANDARD_INPUT
        return special or not self.by_lines(source)


@dataclass(frozen=True)
class Task:
    """Work for one worker: one chunk, or all of a source."""

    source: Source  # The source of the documents.
    number: int  # The chunk's number; -1 for all chunks of the source, one after the other.
    # Numbers of the chunks that are there already, if the task is a whole source.
    finished: frozenset[int] = frozenset()
    start: int = 0  # First byte at which a line of the chunk may begin; for Parquet the first row.
    end: int = 0  # The byte after the last one.
    row_groups: tuple[int, ...] = ()  # Parquet's row groups of the chunk.
    # The documents themselves, if only one process can read the source.
    lines: tuple[Raw, ...] | None = field(default=None, repr=False)
    line_count: int = 0  # Number of lines that those were, blank ones included.
    last: bool = False  # Whether this is the source's last chunk; unknown for a whole source.
    stored_bytes: int = 0  # Bytes of the source that the task reads, for the progress.
    skipped_bytes: int = 0  # Bytes between the task before and this one that were done already.


@dataclass
class Chunk:
    """The documents of a chunk, which must be read to the end before the next chunk is asked for.

    At the end of `documents`, `lines` is the number of lines, blank ones included, and `last` tells
    whether it is the source's last chunk.
    """

    number: int
    documents: Iterator[Raw] = field(default_factory=lambda: iter(()))
    lines: int = 0
    last: bool = False


def chunk_size(text_bytes: int, chunks: int) -> int:
    """Returns the bytes of text in a chunk where there should be about so many chunks."""
    return min(max(_SMALLEST, text_bytes // chunks), _LARGEST)


def tasks(
    sources: Sequence[Source],
    reading: Reading,
    workers: int,
    finished: Callable[[Source], frozenset[int] | None],
) -> Iterator[Task]:
    """Yields what is left to do, such that workers end at about the same time.

    Sources that must be read from start to end go whole to a worker, the largest first, unless one
    is so large that the others would wait for it: then this process reads it and hands out its
    lines, chunk by chunk. Sources that can be entered anywhere fill the gaps at the end.

    `finished` gives the numbers of a source's chunks that are there already, or None for all.
    Raises a `UserError` if a source is damaged, or Parquet lacks a column.
    """
    share = sum(source.size for source in sources) / (4 * workers)

    def fed(source: Source) -> bool:
        too_large = workers > 1 and reading.by_lines(source) and source.size > share
        return too_large or source.path == STANDARD_INPUT

    left = [(source, done) for source in sources if (done := finished(source)) is not None]
    left.sort(key=lambda item: -item[0].size)
    streams = [item for item in left if reading.only_from_start(item[0])]
    for source, done in streams:
        if not fed(source):
            yield Task(source, -1, done, stored_bytes=source.size)
    for source, done in streams:
        if fed(source):
            yield from _missing(_fed(source, reading), done)
    for source, done in left:
        if not reading.only_from_start(source):
            cut = _row_groups if source.format == "parquet" else _ranges
            yield from _missing(cut(source, reading), done)


def _missing(every: Iterator[Task], done: frozenset[int]) -> Iterator[Task]:
    skipped = 0
    for task in every:
        if task.number in done:
            skipped += task.stored_bytes
        else:
            yield replace(task, skipped_bytes=skipped)
            skipped = 0


def _ranges(source: Source, reading: Reading) -> Iterator[Task]:
    starts = range(0, max(1, source.size), reading.chunk_bytes)
    for number, start in enumerate(starts):
        end = min(start + reading.chunk_bytes, source.size)
        last = number == len(starts) - 1
        yield Task(source, number, start=start, end=end, last=last, stored_bytes=end - start)


def _fed(source: Source, reading: Reading) -> Iterator[Task]:
    with open_stream(source.path, source.compression) as (stream, stored):
        _refuse_array(source, stream)
        told = 0
        for chunk in _line_chunks(stream, reading):
            lines = tuple(chunk.documents)
            position = stored.tell() if stored.seekable() else 0
            yield Task(
                source,
                chunk.number,
                lines=lines,
                line_count=chunk.lines,
                last=chunk.last,
                stored_bytes=position - told,
            )
            told = position


def _row_groups(source: Source, reading: Reading) -> Iterator[Task]:
    with open_stream(source.path, source.compression) as (stream, _):
        parquet = parquet_file(source.path, stream)
        names, metadata = parquet.schema_arrow.names, parquet.metadata
    for column in reading.columns:
        if column not in names:
            raise UserError(f"{source.path}: no column '{column}'; it has: {', '.join(names)}")
    chunks: list[Task] = []
    groups: list[int] = []
    row = first_row = size = 0
    for index in range(metadata.num_row_groups):
        group = metadata.row_group(index)
        groups.append(index)
        row += group.num_rows
        size += group.total_byte_size
        if size >= reading.chunk_bytes or index == metadata.num_row_groups - 1:
            chunks.append(Task(source, len(chunks), start=first_row, row_groups=tuple(groups)))
            first_row, size, groups = row, 0, []
    chunks = chunks or [Task(source, 0)]
    for chunk in chunks:
        yield replace(chunk, last=chunk is chunks[-1], stored_bytes=source.size // len(chunks))


def read(task: Task, reading: Reading) -> Iterator[Chunk]:
    """Yields the chunks of a task, those that are finished already included.

    Raises a `UserError` if the file is damaged; the message names the place.
    """
    source = task.source
    chunk = Chunk(task.number, lines=task.line_count, last=task.last)
    if task.lines is not None:
        chunk.documents = iter(task.lines)
        yield chunk
        return
    with open_stream(source.path, source.compression) as (stream, _):
        if task.start == 0:
            _refuse_array(source, stream)
        if source.format == "parquet":
            chunk.documents = _rows(parquet_file(source.path, stream), task, reading, chunk)
            yield chunk
        elif task.number >= 0:
            start = seek_line(stream, task.start, task.end)
            if start is not None:
                lines = LineReader(stream, reading.max_line_bytes, start)
                chunk.documents = _lines(lines, task.end, chunk)
            yield chunk
        elif reading.by_lines(source):
            yield from _line_chunks(stream, reading)
        else:
            yield Chunk(0, _whole(stream, reading.max_line_bytes), lines=1, last=True)


def _refuse_array(source: Source, stream: Any) -> None:
    """Refuses a `.json` file that is no JSON lines, of which all would be bad, or just one."""
    if source.format != "json":
        return
    if stream.peek(1).removeprefix(BYTE_ORDER_MARK).lstrip().startswith(b"["):
        raise UserError(
            f"{source.path}: is an array, and only JSON lines are read; make lines of it with "
            "jq -c '.[]'"
        )


def _line_chunks(stream: BinaryIO, reading: Reading) -> Iterator[Chunk]:
    """Yields the chunks of a file of lines that is read from its start."""
    lines = LineReader(stream, reading.max_line_bytes)
    number = 0
    while not lines.ended:
        chunk = Chunk(number)
        number += 1
        chunk.documents = _lines(lines, number * reading.chunk_bytes, chunk)
        yield chunk


def _lines(lines: LineReader, end: int, chunk: Chunk) -> Iterator[Raw]:
    yield from lines.until(end)
    chunk.lines = lines.lines
    chunk.last = chunk.last or lines.ended


def _whole(stream: BinaryIO, limit: int) -> Iterator[Raw]:
    size = 0
    content = stream.read(limit + 1)
    if len(content) > limit:
        size = len(content)
        while piece := stream.read(1 << 20):
            size += len(piece)
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
        row = task.start + chunk.lines
        raise damage(task.source.path, f"parquet data after row {row}", error) from error
