"""A share of the inputs for one task of a job array."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from megatron_rw.data.text.sources import STANDARD_INPUT, Source
from megatron_rw.errors import UserError


@dataclass(frozen=True)
class InputShard:
    """Share `index` of `count`, from 0."""

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Reads `--shard i/n`.

        Raises:
            UserError: If it is not of that form, or i is not below n.
        """
        index, slash, count = text.partition("/")
        if not slash or not index.isdecimal() or not count.isdecimal():
            raise UserError(f"--shard {text}: give it like 0/8")
        if int(index) >= int(count):
            raise UserError(
                f"--shard {text}: shards count from 0, so the last is {int(count) - 1}/{count}"
            )
        return cls(int(index), int(count))


def shard_of(sources: Sequence[Source], flag: str | None) -> list[Source]:
    """Returns a shard's sources, which are consecutive, so that merged shards equal one run.

    Args:
        sources: All inputs, the same in every task.
        flag: Which share, as `--shard` has it; None takes all.

    Returns:
        At least one source; the shards' bytes are as even as whole files allow.

    Raises:
        UserError: If there are fewer files than shards, or standard input is among them.
    """
    if flag is None:
        return list(sources)
    shard = InputShard.parse(flag)
    if any(source.path == STANDARD_INPUT for source in sources):
        raise UserError("--shard: standard input cannot be shared; give files")
    if len(sources) < shard.count:
        raise UserError(
            f"--shard {flag}: there are {len(sources)} files, and a file is "
            "the least that a shard takes; use fewer shards, or split the files"
        )
    bounds = _bounds([source.size for source in sources], shard.count)
    return list(sources[bounds[shard.index] : bounds[shard.index + 1]])


def _bounds(sizes: Sequence[int], count: int) -> list[int]:
    """Cuts a list into `count` runs, none empty, of about the same sum."""
    total = sum(sizes)
    bounds = [0]
    seen = 0
    for position, size in enumerate(sizes):
        left = count - len(bounds)
        if left == 0:
            break
        if position > bounds[-1]:
            # A file whose middle is beyond the share belongs to the next shard.
            beyond = (2 * seen + size) * count >= 2 * total * len(bounds)
            if beyond or len(sizes) - position == left:
                bounds.append(position)
        seen += size
    return [*bounds, len(sizes)]
