"""A sample of text in bounded memory: by weight over domains, evenly spread within each.

Every passage of a text draws a rank at random, from a fixed seed, and of each domain those of the
lowest ranks are kept. So a sample is always a fair one of what has been read so far, nobody needs
to know beforehand how much will come, and the same passages in the same order give the same sample.
"""

import heapq
import math
import random
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from megatron_rw.data.text.chunks import Reading, Task, chunk_size, read, tasks
from megatron_rw.data.text.records import (
    MAX_LINE_BYTES,
    BadRecordError,
    parse,
    text_field,
    too_many_bad,
)
from megatron_rw.data.text.sources import InputFlags, Source
from megatron_rw.data.text.streams import STANDARD_INPUT
from megatron_rw.errors import UserError

# Text is only a part of what is read of a line, and a domain only a part of what a file holds.
READ_PER_KEPT = 16
_SEED = 0
_PASSAGE_CHARACTERS = 1000
# Enough chunks for a sample to be spread, each large enough for seeking to cost nothing.
_CHUNKS = 256


class DomainSampler:
    """Reads files, in part if they are large, and keeps a sample of their text by domain.

    Bad lines are left out, if they are few. `bad` is their number, and `first_bad` says where the
    first of them is and what is wrong with it. `limit` is the size of the sample in UTF-8 bytes;
    `weights` of `{}` give all domains the same, and None is in proportion to size.
    """

    def __init__(
        self,
        inputs: InputFlags,
        json_key: str,
        weights: Mapping[str, float] | None,
        limit: int,
        max_bad_fraction: float = 0.0,
    ) -> None:
        self._inputs, self._json_key, self._weights = inputs, json_key, weights
        self._limit, self._max_bad_fraction = limit, max_bad_fraction
        columns = [json_key, *([inputs.domain_key] if inputs.domain_key else [])]
        self.reading = Reading(
            chunk_bytes=chunk_size(READ_PER_KEPT * limit, _CHUNKS),
            max_line_bytes=MAX_LINE_BYTES,
            columns=tuple(dict.fromkeys(columns)),
            whole_files=True,
        )
        self._records = 0
        self.bad = 0
        self.first_bad = ""

    def plan(self, sources: Sequence[Source]) -> list[Task]:
        """Chooses what to read of the inputs for a sample.

        Raises a `UserError` if sources name the domains and one has no weight, or a weight none.
        """
        weights = self._weights
        if self._inputs.domain_key or weights is None:
            return plan(sources, self.reading, READ_PER_KEPT * self._limit)
        groups: dict[str, list[Source]] = {}
        for source in sources:
            groups.setdefault(source.domain(self._inputs.domain_by), []).append(source)
        if weights:
            for domain, group in groups.items():
                _check_weight(domain, weights, group[0])
            _check_domains(weights, groups)
            groups = {domain: group for domain, group in groups.items() if weights[domain] > 0}
        budgets = divide(
            [sum(source.text_bytes for source in group) for group in groups.values()],
            [weights.get(domain, 1.0) for domain in groups],
            self._limit,
        )
        return [
            task
            for group, budget in zip(groups.values(), budgets, strict=True)
            for task in plan(group, self.reading, READ_PER_KEPT * budget)
        ]

    def draw(self, chosen: Sequence[Task], cut: Callable[[str], Iterator[str]]) -> "TextSample":
        """Reads what `plan` chose and keeps a sample; `cut` cuts a text into the sample's lines.

        Raises a `UserError` if too many lines are bad, a domain has no weight or a weight none.
        """
        weights, sample = self._weights, TextSample(self._limit, self._weights)
        found = set()
        for task in chosen:
            for domain, text in self.documents(task):
                if weights:
                    found.add(domain)
                    _check_weight(domain, weights, task.source)
                    if weights[domain] == 0:
                        continue
                sample.add(domain, cut(text), task.fraction)
        self.check_bad(at_end=True)
        if self._inputs.domain_key and weights:
            _check_domains(weights, found)
        return sample

    def documents(self, task: Task) -> Iterator[tuple[str, str]]:
        """Yields the domain and the text of every document of a task.

        Raises a `UserError` if the file is damaged, or too many lines so far are bad.
        """
        source, key = task.source, self._inputs.domain_key
        of_source = "" if key else source.domain(self._inputs.domain_by)
        plain_key = self._json_key if source.format == "txt" else None
        lines = 0
        for chunk in read(task, self.reading):
            for raw in chunk.documents:
                try:
                    record = parse(raw, MAX_LINE_BYTES, plain_key)
                    text = text_field(record, "--json-key", self._json_key)
                    domain = text_field(record, "--domain-key", key) if key else of_source
                except BadRecordError as error:
                    self.bad += 1
                    self.first_bad = self.first_bad or f"{task.place(lines + raw.line)}: {error}"
                    continue
                self._records += 1
                yield domain, text
            lines += chunk.lines
        self.check_bad(at_end=False)

    def check_bad(self, at_end: bool) -> None:
        """Refuses the inputs if too many of the lines were bad."""
        if too_many_bad(self.bad, self._records, self._max_bad_fraction, at_end):
            raise UserError(
                f"{self.first_bad}; {self.bad:,} of {self.bad + self._records:,} lines read are "
                f"bad, more than --max-bad-fraction {self._max_bad_fraction:g} allows: correct "
                "them, or allow more"
            )


def _check_weight(domain: str, weights: Mapping[str, float], source: Source) -> None:
    if domain not in weights:
        raise UserError(
            f"--domain-weights: none for domain '{domain}' of {source.path}; add {domain}=WEIGHT "
            "(0 leaves it out)"
        )


def _check_domains(weights: Mapping[str, float], found: Collection[str]) -> None:
    for domain in weights:
        if domain not in found:
            raise UserError(
                f"--domain-weights: no domain '{domain}' in --input, which has "
                f"{', '.join(sorted(found))}; leave it out"
            )


def plan(sources: Sequence[Source], reading: Reading, max_bytes: int) -> list[Task]:
    """Chooses what to read of some sources, by their names and sizes alone.

    The tasks are in the order of the sources, and together about `max_bytes` of uncompressed text:
    evenly spaced chunks of files that can be entered anywhere, and evenly spaced ones of the
    others, such as compressed files, of which at least one is read, to its end. Raises a
    `UserError` if a Parquet file is damaged or lacks a column.
    """
    pieces = [task for source in sources for task in _pieces(source, reading)]
    share = max_bytes / max(1, sum(source.text_bytes for source in sources))
    if share >= 1:
        return pieces
    chosen: dict[int, Task] = {}
    for of_whole_files in (True, False):
        places = [i for i, task in enumerate(pieces) if (task.number < 0) == of_whole_files]
        count, taken = len(places), max(1, int(len(places) * share))
        for rank, place in enumerate(places, start=1):
            # Starting in the middle, since the first of many files is no better than any other.
            if (count // 2 + rank * taken) % count < taken:
                chosen[place] = replace(pieces[place], fraction=taken / count)
    return [chosen[place] for place in sorted(chosen)]


def _pieces(source: Source, reading: Reading) -> Iterator[Task]:
    if source.path == STANDARD_INPUT:  # asking for its chunks would read it
        return iter([Task(source, -1)])
    return tasks([source], reading, 1, lambda _: frozenset())


class _Passage(NamedTuple):
    """A passage that is kept; a heap of them has the one of the highest rank first."""

    negative_rank: float
    number: int
    size: int
    domain: str
    lines: str


@dataclass
class _Pool:
    weight: float
    kept: int = 0
    # The lowest rank that was dropped. Passages of a higher rank may not come in later, or early
    # passages would be kept less often than late ones.
    threshold: float = math.inf
    passages: list[_Passage] = field(default_factory=list)


class TextSample:
    """Keeps a sample of the lines that are added, of a given size at most.

    Each domain's share of the size is in proportion to its weight. A domain that has too little for
    that gives all it has, and the others share what it leaves. `max_bytes` are UTF-8 bytes to keep.
    `weights` are positive; `{}` gives all domains the same, and None makes no difference between
    them: each then has the share of the sample that it has of the whole.
    """

    def __init__(self, max_bytes: int, weights: Mapping[str, float] | None) -> None:
        self._max_bytes = max_bytes
        self._weights = weights
        self._pools: dict[str, _Pool] = {}
        self._random = random.Random(_SEED)
        self._number = 0
        self._kept = 0
        self.seen: Counter[str] = Counter()

    def add(self, domain: str, lines: Iterator[str], fraction: float = 1.0) -> None:
        """Adds the lines of a document, without line feeds.

        `fraction` is the share of such documents that are read at all: where only one in ten is
        read, each stands for ten.
        """
        weights = self._weights
        weight = weights.get(domain, 1.0) if weights else 1.0
        pool = self._pools.setdefault("" if weights is None else domain, _Pool(weight))
        for passage in _passages(lines):
            size = len(passage if passage.isascii() else passage.encode()) - passage.count("\n")
            self._number += 1
            self.seen[domain] += size
            rank = self._random.random() * fraction
            if rank >= pool.threshold:
                continue
            heapq.heappush(pool.passages, _Passage(-rank, self._number, size, domain, passage))
            pool.kept += size
            self._kept += size
            while self._kept > self._max_bytes:
                fullest = max(self._pools.values(), key=lambda pool: pool.kept / pool.weight)
                dropped = heapq.heappop(fullest.passages)
                fullest.threshold = -dropped.negative_rank
                fullest.kept -= dropped.size
                self._kept -= dropped.size

    def kept(self) -> dict[str, int]:
        """Returns the UTF-8 bytes kept of each domain, in order of appearance."""
        kept = dict.fromkeys(self.seen, 0)
        for pool in self._pools.values():
            for passage in pool.passages:
                kept[passage.domain] += passage.size
        return kept

    def take(self) -> Iterator[str]:
        """Yields the lines kept, in the order they came, and forgets each, so as to save memory."""
        passages = [passage for pool in self._pools.values() for passage in pool.passages]
        self._pools.clear()
        passages.sort(key=lambda passage: passage.number, reverse=True)
        while passages:
            yield from passages.pop().lines.split("\n")


def _passages(lines: Iterator[str]) -> Iterator[str]:
    """Joins lines into passages of about `_PASSAGE_CHARACTERS`, so that fewer need a rank."""
    passage: list[str] = []
    characters = 0
    for line in lines:
        passage.append(line)
        characters += len(line)
        if characters >= _PASSAGE_CHARACTERS:
            yield "\n".join(passage)
            passage, characters = [], 0
    if passage:
        yield "\n".join(passage)


def divide(sizes: Sequence[int], weights: Sequence[float], total: int) -> list[int]:
    """Divides a budget in proportion to positive weights as far as the sizes allow.

    One that is smaller than its share gives all it has, and the others share what it leaves.
    """
    budgets = [0] * len(sizes)
    left = total
    fullest_first = sorted(range(len(sizes)), key=lambda index: sizes[index] / weights[index])
    for rank, index in enumerate(fullest_first):
        remaining = sum(weights[other] for other in fullest_first[rank:])
        budgets[index] = min(sizes[index], int(left * (weights[index] / remaining)))
        left -= budgets[index]
    return budgets
