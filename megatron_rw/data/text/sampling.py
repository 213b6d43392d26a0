"""A sample of text in bounded memory: by weight over domains, evenly spread within each.

Every passage of a text draws a rank at random, from a fixed seed, and of each domain those of the
lowest ranks are kept. So a sample is always a fair one of what has gone by, nobody needs to know
beforehand how much will come, and the same passages in the same order give the same sample.
"""

import heapq
import math
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

_SEED = 0
_PASSAGE_CHARACTERS = 1000


class _Passage(NamedTuple):
    """One that is kept; a heap of them has that of the highest rank first."""

    negative_rank: float
    number: int
    size: int
    domain: str
    lines: str


@dataclass
class _Pool:
    weight: float
    kept: int = 0
    # The lowest rank that was dropped: none above it may come in later, or what comes early would
    # be treated worse.
    threshold: float = math.inf
    passages: list[_Passage] = field(default_factory=list)


class Sample:
    """Keeps a sample of the lines that are added, of a given size at most.

    Each domain's share of the size is in proportion to its weight. One that has too little for
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
        """Adds a document.

        Args:
            domain: What it counts as.
            lines: Its text, without line feeds.
            fraction: The share of such documents that are read at all. Where only one in ten is,
                each stands for ten.
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
        """Yields the lines kept, in the order they came, and lets go of each.

        Whoever trains on them holds them as well; so they are not in memory twice.
        """
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
        sizes: What each has.
        weights: Positive, one for each.
        total: What may be taken from all of them together.

    Returns:
        What to take from each, at most its size.
    """
    budgets = [0] * len(sizes)
    left = total
    fullest_first = sorted(range(len(sizes)), key=lambda index: sizes[index] / weights[index])
    for rank, index in enumerate(fullest_first):
        remaining = sum(weights[other] for other in fullest_first[rank:])
        budgets[index] = min(sizes[index], int(left * (weights[index] / remaining)))
        left -= budgets[index]
    return budgets
