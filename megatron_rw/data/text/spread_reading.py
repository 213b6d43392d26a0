"""Reads evenly spaced portions of inputs that are too large to be read whole.

Of files that can be entered anywhere, evenly spaced chunks are read. Files that can only be read
from their start, such as compressed ones, are read to their end, but only evenly spaced ones of
them. The choice follows from names and sizes alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_rw.data.text.chunks import chunk_size, tasks
from megatron_rw.data.text.readers import Reading, Task, read
from megatron_rw.data.text.records import (
    MAX_LINE_BYTES,
    BadRecordError,
    parse,
    text_field,
    too_many_bad,
)
from megatron_rw.data.text.sources import STANDARD_INPUT, Source, open_source
from megatron_rw.errors import UserError

# Enough chunks for a sample to be spread, each large enough for seeking to cost nothing.
_CHUNKS = 256
_COUNT_BYTES = 1 << 20


@dataclass(frozen=True)
class Portion:
    """Some documents of a source, or all.

    Attributes:
        fraction: The share of such portions that are read at all.
    """

    task: Task
    fraction: float


def how_to_read(columns: Sequence[str], max_bytes: int) -> Reading:
    """Returns how documents are read where `plan` chooses `max_bytes` of them."""
    return Reading(
        chunk_bytes=chunk_size(max_bytes, _CHUNKS),
        max_line_bytes=MAX_LINE_BYTES,
        columns=tuple(dict.fromkeys(columns)),
        whole_files=True,
    )


def plan(sources: Sequence[Source], reading: Reading, max_bytes: int) -> list[Portion]:
    """Chooses what to read of some sources.

    The portions are in the order of the sources, and together about `max_bytes` of uncompressed
    text. Where there are compressed files, at least one of them is read.

    Raises:
        UserError: If a Parquet file is damaged or lacks a column.
    """
    pieces = [task for source in sources for task in _pieces(source, reading)]
    share = max_bytes / max(1, sum(source.text_bytes for source in sources))
    if share >= 1:
        return [Portion(task, 1.0) for task in pieces]
    chosen: dict[int, float] = {}
    for of_whole_files in (True, False):
        places = [i for i, task in enumerate(pieces) if (task.number < 0) == of_whole_files]
        count, taken = len(places), max(1, int(len(places) * share))
        for rank, place in enumerate(places, start=1):
            # Starting in the middle, since the first of many files is no better than any other.
            if (count // 2 + rank * taken) % count < taken:
                chosen[place] = taken / count
    return [Portion(pieces[place], fraction) for place, fraction in sorted(chosen.items())]


def _pieces(source: Source, reading: Reading) -> Iterator[Task]:
    """Returns a task for each chunk of a source, or for all of it if it is read from its start."""
    if source.path == STANDARD_INPUT:  # asking for its chunks would read it
        return iter([Task(source, -1)])
    return tasks([source], reading, 1, lambda _: frozenset())


class DocumentReader:
    """Reads the documents of portions and leaves bad lines out, if they are few.

    Args:
        json_key: Field of the text.
        domain_key: Field of the domain, or None.
        max_bad_fraction: The share of lines that may be bad.

    Attributes:
        bad: Number of lines that were left out.
        first_bad: The first of them and what is wrong with it, for a message; empty if none is.
    """

    def __init__(
        self, reading: Reading, json_key: str, domain_key: str | None, max_bad_fraction: float
    ) -> None:
        self._reading = reading
        self._json_key = json_key
        self._domain_key = domain_key
        self._max_bad_fraction = max_bad_fraction
        self._records = 0
        self.bad = 0
        self.first_bad = ""

    def documents(self, part: Portion) -> Iterator[tuple[str | None, str]]:
        """Yields the domain, if a field holds it, and the text of every document of a part.

        Raises:
            UserError: If the file is damaged, or too many lines so far are bad.
        """
        source = part.task.source
        plain_key = self._json_key if source.format == "txt" else None
        lines = 0
        for chunk in read(part.task, self._reading):
            for raw in chunk.documents:
                try:
                    record = parse(raw, self._reading.max_line_bytes, plain_key)
                    text = text_field(record, "--json-key", self._json_key)
                    domain = None
                    if self._domain_key is not None:
                        domain = text_field(record, "--domain-key", self._domain_key)
                except BadRecordError as error:
                    self._reject(part.task, lines + raw.line, error)
                    continue
                self._records += 1
                yield domain, text
            lines += chunk.lines
        self._check(at_end=False)

    def finish(self) -> None:
        """Refuses the inputs if too many of all lines were bad."""
        self._check(at_end=True)

    def _reject(self, task: Task, line: int, error: BadRecordError) -> None:
        self.bad += 1
        if not self.first_bad:
            number = _lines_before(task) + line
            self.first_bad = f"{task.source.path}, line {number}: {error}"

    def _check(self, at_end: bool) -> None:
        if too_many_bad(self.bad, self._records, self._max_bad_fraction, at_end):
            raise UserError(
                f"{self.first_bad}; {self.bad:,} of {self.bad + self._records:,} lines read are "
                f"bad, more than --max-bad-fraction {self._max_bad_fraction:g} allows: correct "
                "them, or allow more"
            )


def _lines_before(task: Task) -> int:
    """Counts the lines, of Parquet the rows, that begin before a task's documents."""
    if task.number < 0 or task.start == 0 or task.source.format == "parquet":
        return task.start
    # In the middle of a file a line's number is known only by counting, so it is asked for once.
    count = 1
    with open_source(task.source) as (stream, _):
        left = task.start - 1
        while left and (block := stream.read(min(left, _COUNT_BYTES))):
            count += block.count(b"\n")
            left -= len(block)
    return count
