"""Cuts the inputs into chunks: what one worker turns into one part of the output at a time.

A chunk is a run of documents of one source, and its number tells its place there. The cuts depend
on the source and `chunk_bytes` alone, so that parts made by any number of workers, in any order,
before or after an interruption, are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from megatron_rw.data.text.readers import Reading, Task, read_lines
from megatron_rw.data.text.sources import STANDARD_INPUT, Source, open_source, parquet_file
from megatron_rw.errors import UserError

_SMALLEST, _LARGEST = 1 << 20, 16 << 20


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

    Raises:
        UserError: If a source is damaged, or Parquet lacks a column.
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
        if source.format == "parquet":
            yield from _missing(_rows(source, reading), done)
        elif not reading.only_from_start(source):
            yield from _missing(_ranges(source, reading), done)


def _missing(every: Iterator[Task], done: frozenset[int]) -> Iterator[Task]:
    skipped = 0
    for task in every:
        if task.number in done:
            skipped += task.stored_bytes
        else:
            yield replace(task, skipped_bytes=skipped)
            skipped = 0


def _ranges(source: Source, reading: Reading) -> Iterator[Task]:
    count = max(1, -(-source.size // reading.chunk_bytes))
    for number in range(count):
        start = number * reading.chunk_bytes
        end = min(start + reading.chunk_bytes, source.size)
        last = number == count - 1
        yield Task(source, number, start=start, end=end, last=last, stored_bytes=end - start)


def _fed(source: Source, reading: Reading) -> Iterator[Task]:
    with open_source(source) as (stream, stored):
        told = 0
        for chunk in read_lines(stream, source, reading):
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


def _rows(source: Source, reading: Reading) -> Iterator[Task]:
    groups = _row_groups(source, reading)
    for number, (first_row, row_groups) in enumerate(groups):
        yield Task(
            source,
            number,
            start=first_row,
            row_groups=row_groups,
            last=number == len(groups) - 1,
            stored_bytes=source.size // len(groups),
        )


def _row_groups(source: Source, reading: Reading) -> list[tuple[int, tuple[int, ...]]]:
    """Returns the first row and the row groups of each chunk of a Parquet file."""
    with open_source(source) as (stream, _):
        parquet = parquet_file(source, stream)
        names = parquet.schema_arrow.names
        for column in reading.columns:
            if column not in names:
                raise UserError(f"{source.path}: no column '{column}'; it has: {', '.join(names)}")
        metadata = parquet.metadata
    chunks: list[tuple[int, tuple[int, ...]]] = []
    groups: list[int] = []
    row = first_row = size = 0
    for index in range(metadata.num_row_groups):
        group = metadata.row_group(index)
        groups.append(index)
        row += group.num_rows
        size += group.total_byte_size
        if size >= reading.chunk_bytes:
            chunks.append((first_row, tuple(groups)))
            first_row, size, groups = row, 0, []
    if groups or not chunks:
        chunks.append((first_row, tuple(groups)))
    return chunks
