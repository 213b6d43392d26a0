"""A share of the inputs for one task of a job array."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from megatron_rw.data.text.sources import STANDARD_INPUT, Source
from megatron_rw.errors import UserError


@dataclass(frozen=True)
class Shard:
    """Task `index` of `count`, from 0."""

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Reads `i/n`.

        Raises:
            ValueError: it is not that, or i is not below n.
        """
        index, slash, count = text.partition("/")
        if not slash or not index.isdecimal() or not count.isdecimal():
            raise ValueError(f"'{text}' is not like 0/8")
        if int(index) >= int(count):
            raise ValueError(f"'{text}': shards count from 0, the last is {int(count) - 1}/{count}")
        return cls(int(index), int(count))


def shard_of(sources: Sequence[Source], shard: Shard | None) -> list[Source]:
    """The sources of a shard: consecutive ones, so that shards merged in order equal one run.

    Args:
        sources: all inputs, the same in every task.
        shard: which share; None takes all.

    Returns:
        At least one source; the shards' bytes are as even as whole files allow.

    Raises:
        UserError: there are fewer files than shards, or standard input is among them.
    """
    if shard is None:
        return list(sources)
    if any(source.path == STANDARD_INPUT for source in sources):
        raise UserError("--shard: standard input cannot be shared; give files")
    if len(sources) < shard.count:
        raise UserError(
            f"--shard {shard.index}/{shard.count}: there are {len(sources)} files, and a file is "
            "the least that a shard takes; use fewer shards, or split the files"
        )
    bounds = _bounds([source.size for source in sources], shard.count)
    return list(sources[bounds[shard.index] : bounds[shard.index + 1]])


def _bounds(sizes: Sequence[int], count: int) -> list[int]:
    """Cuts a list into `count` runs, none empty, each ended where its share of the whole is met."""
    total = sum(sizes)
    bounds = [0]
    seen = 0
    for position, size in enumerate(sizes):
        left = count - len(bounds)
        if left == 0:
            break
        if position > bounds[-1]:
            # The middle of this file is beyond the share: it belongs to the next shard.
            beyond = (2 * seen + size) * count >= 2 * total * len(bounds)
            if beyond or len(sizes) - position == left:
                bounds.append(position)
        seen += size
    return [*bounds, len(sizes)]
