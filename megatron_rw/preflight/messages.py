"""Messages between the ranks of a job: who does not answer, and whose clock is off.

They go through a `TCPStore`, before there is any process group: when a rank does not join a group,
torch cannot say which one. Messages are JSON values under keys.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from torch.distributed import DistError
from torch.distributed.rendezvous import rendezvous

_ROUNDS = 7


class NoAnswerError(Exception):
    """A rank has not sent a message within the time; the text names the rank."""


class RankMessages:
    """Messages to and from all ranks of a job, each of which is waited for `wait_s` seconds."""

    def __init__(self, store: Any, rank: int, size: int, wait_s: float) -> None:
        self.store, self.rank, self.size, self.wait_s = store, rank, size, wait_s

    def send(self, key: str, value: Any) -> None:
        """Sends a value to all who ask for this key of this rank."""
        self.store.set(_name(key, self.rank), json.dumps(value))

    def receive(self, key: str, rank: int, wait_s: float | None = None) -> Any:
        """Returns what a rank sends, after waiting for it, or raises a `NoAnswerError`."""
        name = _name(key, rank)
        seconds = self.wait_s if wait_s is None else wait_s
        try:
            self.store.wait([name], timedelta(seconds=seconds))
            return json.loads(self.store.get(name))
        except DistError as error:
            raise NoAnswerError(
                f"rank {rank} has not answered within {seconds:g} s, or rank 0 is gone"
            ) from error

    def receive_all(
        self, key: str, ranks: Sequence[int] | None = None, wait_s: float | None = None
    ) -> tuple[dict[int, Any], list[int]]:
        """Returns what ranks send, by rank, and those of them that sent nothing in time."""
        ranks = range(self.size) if ranks is None else ranks
        names = {rank: _name(key, rank) for rank in ranks}
        with contextlib.suppress(DistError):
            seconds = self.wait_s if wait_s is None else wait_s
            self.store.wait(list(names.values()), timedelta(seconds=seconds))
        sent = {
            rank: json.loads(self.store.get(name))
            for rank, name in names.items()
            if self.store.check([name])
        }
        return sent, [rank for rank in ranks if rank not in sent]


def open_store(wait_s: float) -> Any:
    """Connects to the job's store, which rank 0 holds, or torchrun where it does.

    This is torch's `env://`, except that it does not wait for all ranks.
    """
    # Told the true number of ranks torch would wait for them here, and not say who is missing.
    store, _, _ = next(
        rendezvous(
            "env://", int(os.environ["RANK"]), world_size=1, timeout=timedelta(seconds=wait_s)
        )
    )
    return store


def _name(key: str, rank: int) -> str:
    return f"megatron_rw/preflight/{key}/{rank}"


@dataclass(frozen=True)
class Clock:
    """A host's clock compared with rank 0's, measured as NTP does; both in seconds."""

    ahead: float  # The error is at most half a round trip.
    round_trip: float


def median_clock(rounds: Sequence[tuple[float, float, float]]) -> Clock:
    """Returns a clock's offset from round trips: times here before, there, and here after."""
    return Clock(
        statistics.median(there - (before + after) / 2 for before, there, after in rounds),
        statistics.median(after - before for before, _, after in rounds),
    )


def ask_clock(messages: RankMessages, rank: int) -> Clock:
    """Compares clocks with a rank that is in `answer_clock`. On rank 0."""
    rounds = []
    for number in range(_ROUNDS):
        before = time.time()
        messages.send(f"ask/{rank}/{number}", True)
        there = messages.receive(f"answer/{number}", rank)
        rounds.append((before, there, time.time()))
    return median_clock(rounds)


def answer_clock(messages: RankMessages) -> None:
    """Sends the time whenever rank 0 asks. On another rank."""
    for number in range(_ROUNDS):
        messages.receive(f"ask/{messages.rank}/{number}", 0)
        messages.send(f"answer/{number}", time.time())
