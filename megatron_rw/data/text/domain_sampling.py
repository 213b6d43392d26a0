"""A sample of text in bounded memory: by weight over domains, evenly spread within each.

Every passage of a text draws a rank at random, from a fixed seed, and of each domain those of the
lowest ranks are kept. So a sample is always a fair one of what has been read so far, nobody needs
to know beforehand how much will come, and the same passages in the same order give the same sample.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from megatron_rw.data.text.readers import Reading
from megatron_rw.data.text.sources import Source
from megatron_rw.data.text.spread_reading import DocumentReader, Portion, plan
from megatron_rw.errors import UserError

# Text is only a part of what is read of a line, and a domain only a part of what a file holds.
READ_PER_KEPT = 16
_SEED = 0
_PASSAGE_CHARACTERS = 1000

DomainOf = Callable[[Source], str]


def parse_weights(values: Sequence[str], flag: str = "--domain-weights") -> dict[str, float]:
    """Parses the values of a flag, each of which is `DOMAIN=WEIGHT`.

    Raises:
        UserError: If a value is not of that form, a domain is given twice, or no weight is above 0.
    """
    weights: dict[str, float] = {}
    for value in values:
        domain, _, number = value.rpartition("=")
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        if not domain or not 0 <= weight < math.inf:
            raise UserError(f"{flag} {value}: give DOMAIN=WEIGHT, the weight zero or more")
        if domain in weights:
            raise UserError(f"{flag} {value}: {domain} is given twice; give it once")
        weights[domain] = weight
    if weights and not any(weights.values()):
        raise UserError(f"{flag}: all are 0; give one that is more")
    return weights


def plan_reading(
    sources: Sequence[Source],
    reading: Reading,
    domain_of: DomainOf | None,
    weights: Mapping[str, float] | None,
    limit: int,
) -> list[Portion]:
    """Chooses what to read of the inputs for a sample.

    `domain_of` gives the domain of a source's documents; it is None if each document names its own.
    `weights` are of domains; `{}` gives all the same, None is in proportion to size. `limit` is the
    size of the sample in UTF-8 bytes.

    Raises:
        UserError: If sources name the domains and one has no weight, or some weight no source.
    """
    if domain_of is None or weights is None:
        return plan(sources, reading, READ_PER_KEPT * limit)
    groups: dict[str, list[Source]] = {}
    for source in sources:
        groups.setdefault(domain_of(source), []).append(source)
    if weights:
        for domain, group in groups.items():
            _check_weight(domain, weights, group[0])
        _check_domains(weights, groups)
        groups = {domain: group for domain, group in groups.items() if weights[domain] > 0}
    budgets = divide(
        [sum(source.text_bytes for source in group) for group in groups.values()],
        [weights.get(domain, 1.0) for domain in groups],
        limit,
    )
    return [
        part
        for group, budget in zip(groups.values(), budgets, strict=True)
        for part in plan(group, reading, READ_PER_KEPT * budget)
    ]


def draw_sample(
    parts: Sequence[Portion],
    reader: DocumentReader,
    domain_of: DomainOf | None,
    weights: Mapping[str, float] | None,
    limit: int,
    cut: Callable[[str], Iterator[str]],
) -> TextSample:
    """Reads what `plan_reading` chose for the same arguments, and keeps a sample of it.

    `cut` cuts a text into the lines of the sample.

    Raises:
        UserError: If too many lines are bad, a domain has no weight or a weight no domain.
    """
    sample = TextSample(limit, weights)
    found = set()
    for part in parts:
        of_source = domain_of(part.task.source) if domain_of is not None else ""
        for of_document, text in reader.documents(part):
            domain = of_source if of_document is None else of_document
            if weights:
                found.add(domain)
                _check_weight(domain, weights, part.task.source)
                if weights[domain] == 0:
                    continue
            sample.add(domain, cut(text), part.fraction)
    reader.finish()
    if domain_of is None and weights:
        _check_domains(weights, found)
    return sample


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
    that gives all it has, and the others share what it leaves.

    Args:
        max_bytes: UTF-8 bytes to keep.
        weights: Domain to weight, positive; `{}` gives all the same. None makes no difference
            between domains: each then has the share of the sample that it has of the whole.
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
        name = "" if self._weights is None else domain
        pool = self._pools.get(name)
        if pool is None:
            weight = self._weights.get(name, 1.0) if self._weights else 1.0
            pool = self._pools[name] = _Pool(weight)
        for passage in _passages(lines):
            size = _size(passage)
            self._number += 1
            self.seen[domain] += size
            rank = self._random.random() * fraction
            if rank >= pool.threshold:
                continue
            heapq.heappush(pool.passages, _Passage(-rank, self._number, size, domain, passage))
            pool.kept += size
            self._kept += size
            while self._kept > self._max_bytes:
                self._drop()

    def _drop(self) -> None:
        pool = max(self._pools.values(), key=lambda pool: pool.kept / pool.weight)
        passage = heapq.heappop(pool.passages)
        pool.threshold = -passage.negative_rank
        pool.kept -= passage.size
        self._kept -= passage.size

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


def _size(passage: str) -> int:
    """UTF-8 bytes of a passage's lines."""
    return len(passage if passage.isascii() else passage.encode()) - passage.count("\n")


def divide(sizes: Sequence[int], weights: Sequence[float], total: int) -> list[int]:
    """Divides a budget in proportion to weights as far as sizes allow.

    One that is smaller than its share gives all it has, and the others share what it leaves.

    Args:
        sizes: What each has to give.
        weights: Positive weight of each.
        total: What may be taken from all of them together.
    """
    budgets = [0] * len(sizes)
    left = total
    fullest_first = sorted(range(len(sizes)), key=lambda index: sizes[index] / weights[index])
    for rank, index in enumerate(fullest_first):
        remaining = sum(weights[other] for other in fullest_first[rank:])
        budgets[index] = min(sizes[index], int(left * (weights[index] / remaining)))
        left -= budgets[index]
    return budgets
