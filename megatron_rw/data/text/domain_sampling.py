"""A sample of text in bounded memory: as much of each domain, evenly spread within it.

Every passage of a text draws a rank at random, from a fixed seed, and of each domain those of the
lowest ranks are kept. So a sample is always a fair one of what has been read so far, nobody needs
to know beforehand how much will come, and the same passages in the same order give the same sample.
"""

import heapq
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import batched
from typing import NamedTuple

from megatron_rw.data.text.chunks import Reading, Task, chunk_size, read, tasks
from megatron_rw.data.text.records import (
    MAX_LINE_BYTES,
    BadRecordError,
    parse,
    text_field,
    too_many_bad,
)
from megatron_rw.data.text.sources import InputFlags, Source, find_sources
from megatron_rw.data.text.streams import STANDARD_INPUT
from megatron_rw.errors import UserError

# Text is only a part of what is read of a line, and a domain only a part of what a file holds.
_READ_PER_KEPT = 16
# Enough chunks for a sample to be spread, each large enough for seeking to cost nothing.
_CHUNKS = 256
_LINES_OF_PASSAGE = 8
_SEED = 0


class _Passage(NamedTuple):
    """Some lines that are kept; a heap of passages has the one of the highest rank first."""

    negative_rank: float
    number: int
    size: int
    lines: tuple[str, ...]


@dataclass
class DomainSample:
    """What was read of a domain and what is kept of it, in UTF-8 bytes."""

    seen: int = 0
    kept: int = 0
    passages: list[_Passage] = field(default_factory=list)
    # The lowest rank that was dropped. Passages of a higher rank may not come in later, or early
    # passages would be kept less often than late ones.
    threshold: float = 1.0


class TextSample:
    """Keeps a sample of the lines that are added, of at most `max_bytes` of UTF-8.

    Of a domain that has too little for its share all is kept, and the others share what it leaves.
    `kept` are the bytes kept of all domains.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._random = random.Random(_SEED)
        self._number = 0
        self.domains: dict[str, DomainSample] = {}
        self.kept = 0

    def add(self, name: str, lines: Iterator[str]) -> None:
        """Adds the lines of a document of the domain of this name."""
        domain = self.domains.setdefault(name, DomainSample())
        for passage in batched(lines, _LINES_OF_PASSAGE):
            size = sum(len(line if line.isascii() else line.encode()) for line in passage)
            self._number += 1
            domain.seen += size
            rank = self._random.random()
            if rank >= domain.threshold:
                continue
            heapq.heappush(domain.passages, _Passage(-rank, self._number, size, passage))
            domain.kept += size
            self.kept += size
            while self.kept > self._max_bytes:
                fullest = max(self.domains.values(), key=lambda domain: domain.kept)
                dropped = heapq.heappop(fullest.passages)
                fullest.threshold = -dropped.negative_rank
                fullest.kept -= dropped.size
                self.kept -= dropped.size

    def take(self) -> Iterator[str]:
        """Yields the lines kept, in the order they came, and forgets each, so as to save memory."""
        passages = [passage for domain in self.domains.values() for passage in domain.passages]
        self.domains.clear()
        passages.sort(key=lambda passage: passage.number, reverse=True)
        while passages:
            yield from passages.pop().lines


def draw(
    inputs: InputFlags,
    json_key: str,
    max_bytes: int,
    max_bad_fraction: float,
    cut: Callable[[str], Iterator[str]],
) -> tuple[TextSample, int]:
    """Reads files, in part if they are large, and keeps a sample of their text.

    `json_key` is the field of the text, and `cut` cuts a text into the sample's lines. Returns the
    sample, and how many lines were no documents and are left out. Raises a `UserError` if those are
    too many, or a file is damaged.
    """
    key = inputs.domain_key
    reading = Reading(
        chunk_bytes=chunk_size(_READ_PER_KEPT * max_bytes, _CHUNKS),
        max_line_bytes=MAX_LINE_BYTES,
        columns=tuple(dict.fromkeys([json_key, *([key] if key else [])])),
        whole_files=True,
    )
    sample, taken, bad, first_bad = TextSample(max_bytes), 0, 0, ""
    pieces = chosen(find_sources(inputs.input), inputs, reading, _READ_PER_KEPT * max_bytes)
    for task in pieces:
        source = task.source
        domain = source.domain(inputs.domain_by)
        text_key = json_key if source.format == "txt" else None
        for chunk in read(task, reading):
            for raw in chunk.documents:
                try:
                    record = parse(raw, MAX_LINE_BYTES, text_key)
                    text = text_field(record, "--json-key", json_key)
                    if key:
                        domain = text_field(record, "--domain-key", key)
                except BadRecordError as error:
                    bad += 1
                    first_bad = first_bad or f"{source.path}: {error}"
                    continue
                taken += 1
                sample.add(domain, cut(text))
        if too_many_bad(bad, taken, max_bad_fraction, at_end=task is pieces[-1]):
            raise UserError(
                f"{first_bad}; {bad:,} of {bad + taken:,} lines read are bad, more than "
                f"--max-bad-fraction {max_bad_fraction:g} allows: correct them, or allow more"
            )
    return sample, bad


def chosen(
    sources: Sequence[Source], inputs: InputFlags, reading: Reading, max_bytes: int
) -> list[Task]:
    """Chooses what to read of the sources, by their names and sizes alone.

    Every domain that the sources' paths tell gets the same part of `max_bytes` of uncompressed
    text, and of what it has, every so many-th chunk is read; a source that cannot be entered in the
    middle is one chunk. At least one is read of each domain. Raises a `UserError` if a Parquet file
    is damaged or lacks a column.
    """
    domains: dict[str, list[Source]] = {}
    for source in sources:
        name = "" if inputs.domain_key else source.domain(inputs.domain_by)
        domains.setdefault(name, []).append(source)
    found = []
    for of_domain in domains.values():
        size = sum(source.text_bytes for source in of_domain)
        step = max(1, -(-size * len(domains) // max_bytes))
        pieces = [task for source in of_domain for task in _pieces(source, reading)]
        found += pieces[(len(pieces) - 1) % step // 2 :: step]
    return found


def _pieces(source: Source, reading: Reading) -> Iterator[Task]:
    if source.path == STANDARD_INPUT:  # asking for its chunks would read it
        return iter([Task(source, -1)])
    return tasks([source], reading, 1, lambda _: frozenset())
