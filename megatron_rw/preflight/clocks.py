"""How far the clocks of the hosts are from rank 0's, measured as NTP does."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_rw.preflight.messages import RankMessages

_ROUNDS = 7


@dataclass(frozen=True)
class Clock:
    """A host's clock compared with rank 0's.

    Attributes:
        ahead: Seconds.
        round_trip: Seconds; the error of `ahead` is at most half of it.
    """

    ahead: float
    round_trip: float


def median_clock(rounds: Sequence[tuple[float, float, float]]) -> Clock:
    """Returns the offset of a clock from round trips to its host.

    Args:
        rounds: At least one (time here before, time there, time here after), in seconds.
    """
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
