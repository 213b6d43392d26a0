"""Bad inputs: what is wrong, and what of the one message must be in it.

The whole messages are in docs/refusals.md, which `python -m tests.refusals.table` writes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

STEPS = ("--train-iters", "4", "--micro-batch-size", "8")


@dataclass(frozen=True)
class Place:
    """Where a case finds what it spoils, copies of its own.

    Attributes:
        data: a corpus, `tests.corpus`.
        checkpoints: iterations 2 and 4 of a run that goes on to iteration 4.
        empty: a folder.
    """

    data: Path
    checkpoints: Path
    empty: Path

    def filled(self, text: str) -> str:
        """`text` with the folders in place of {data}, {checkpoints} and {empty}."""
        return text.format(**vars(self))

    def stripped(self, text: str) -> str:
        """`text` with their names in place of the folders."""
        for name, path in vars(self).items():
            text = text.replace(str(path), name.upper())
        return text


@dataclass(frozen=True)
class Case:
    """One bad input.

    Attributes:
        what: the row's title in the table.
        flags: after a good command line.
        says: what the message must hold.
        processes: that start.
        spoil: damages files.
        environment: of every process; None unsets.
    """

    what: str
    flags: str
    says: str
    processes: int = 1
    spoil: Callable[[Place], None] | None = None
    environment: Mapping[str, str | None] = field(default_factory=dict)
