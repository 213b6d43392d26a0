"""What ranks find out about each other: clocks, and how fast they all-reduce."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megatron_rw.preflight.meeting import Meeting
from megatron_rw.resilience.watchdog import Progress

CLOCK_ROUNDS = 7
WARM_UP, REPEATS = 3, 10
MIB = 2**20
# Bytes of a message: small, a bucket of gradients, large.
SIZES = {"cuda": (MIB, 32 * MIB, 256 * MIB), "cpu": (MIB // 16, MIB, 8 * MIB)}


class WrongSumError(RuntimeError):
    """An all-reduce has given another sum than that of what was put in."""


@dataclass(frozen=True)
class Clock:
    """A host's clock beside that of rank 0.

    Attributes:
        ahead: seconds.
        round_trip: seconds; the error of `ahead` is at most half of it.
    """

    ahead: float
    round_trip: float


def median_clock(rounds: Sequence[tuple[float, float, float]]) -> Clock:
    """The offset of a clock from round trips to it, as NTP computes it.

    Args:
        rounds: at least one (time here before, time there, time here after), in seconds.
    """
    return Clock(
        statistics.median(there - (before + after) / 2 for before, there, after in rounds),
        statistics.median(after - before for before, _, after in rounds),
    )


def ask_clock(meeting: Meeting, rank: int) -> Clock:
    """On rank 0: compare clocks with a rank that is in `answer_clock`."""
    rounds = []
    for number in range(CLOCK_ROUNDS):
        before = time.time()
        meeting.tell(f"ask/{rank}/{number}", True)
        there = meeting.hear(f"answer/{number}", rank)
        rounds.append((before, there, time.time()))
    return median_clock(rounds)


def answer_clock(meeting: Meeting) -> None:
    """On another rank, the first of its host: say the time whenever rank 0 asks."""
    for number in range(CLOCK_ROUNDS):
        meeting.hear(f"ask/{meeting.rank}/{number}", 0)
        meeting.tell(f"answer/{number}", time.time())


def hosts_of(hosts: Mapping[int, str]) -> dict[str, list[int]]:
    """The ranks of each host, in the order of their first ranks."""
    found: dict[str, list[int]] = {}
    for rank in sorted(hosts):
        found.setdefault(hosts[rank], []).append(rank)
    return found


def neighbours(hosts: Sequence[str]) -> list[list[tuple[str, str]]]:
    """Pairs of hosts that go round in a ring, in rounds in which no host is in two.

    Every host is measured with two others: a slow one is slow with both, and its neighbours with
    one of theirs. Of two hosts alone nobody could say which is slow: there are no pairs.
    """
    if len(hosts) < 3:
        return []
    ring = list(zip(hosts, [*hosts[1:], hosts[0]], strict=True))
    # The last pair of an odd ring meets the first pair's host.
    alone = [ring.pop()] if len(ring) % 2 else []
    return [pairs for pairs in (ring[::2], ring[1::2], alone) if pairs]


@dataclass(frozen=True)
class Rates:
    """Bus bandwidths that a rank has measured, in bytes a second.

    Attributes:
        world: over all ranks, by bytes of the message.
        hosts: over the first ranks of all hosts, likewise; empty on other ranks.
        within: over the ranks of its host, with the largest message; None where it is alone.
        neighbours: with the first rank of each neighbouring host, likewise.
    """

    world: dict[int, float]
    hosts: dict[int, float]
    within: float | None
    neighbours: list[float]

    @classmethod
    def of_json(cls, value: dict[str, Any]) -> Rates:
        """From what `json` has made of one: it turns the sizes into text."""
        by_size = {
            name: {int(size): rate for size, rate in value[name].items()}
            for name in ("world", "hosts")
        }
        return cls(**(value | by_size))


def all_reduces(
    rank: int,
    hosts: Mapping[str, list[int]],
    device: torch.device,
    progress: Progress,
    timeout: timedelta,
) -> Rates:
    """Measure this rank's part in all of them. On all ranks, with the same hosts.

    Args:
        rank: of this process.
        hosts: the ranks of each.
        device: where messages lie.
        progress: told what is measured, for the watchdog.
        timeout: of a collective. Groups do not take over that of the default group.

    Raises:
        WrongSumError: a sum is wrong.
    """
    sizes = SIZES[device.type]
    firsts = [ranks[0] for ranks in hosts.values()]
    [own] = [ranks for ranks in hosts.values() if rank in ranks]

    def rate(what: str, ranks: list[int], wanted: Sequence[int]) -> dict[int, float]:
        progress.then(f"preflight, all-reduce {what}")
        # One group after the other: those that run at the same time do so on all hosts.
        dist.barrier()
        if len(ranks) < 2 or rank not in ranks:
            return {}
        group = dist.new_group(ranks, timeout, use_local_synchronization=True)
        return {size: bus_bandwidth(group, size, device) for size in wanted}

    world = rate("over all ranks", list(range(dist.get_world_size())), sizes)
    between = rate("between hosts", firsts, sizes)
    within = rate("within hosts", own, sizes[-1:])
    neighbouring: list[float] = []
    for pairs in neighbours(list(hosts)):
        firsts_of_pairs = [[hosts[a][0], hosts[b][0]] for a, b in pairs]
        mine = next((pair for pair in firsts_of_pairs if rank in pair), [])
        neighbouring += rate("with neighbours", mine, sizes[-1:]).values()
    return Rates(world, between, within.get(sizes[-1]), neighbouring)


def by_host(hosts: Mapping[str, list[int]], rates: Mapping[int, Rates]) -> dict[str, float]:
    """What each host reaches with the better of its neighbours: a slow one does with neither."""
    found = {}
    for host, ranks in hosts.items():
        measured = rates[ranks[0]].neighbours if rates else []
        if measured:
            found[host] = max(measured)
    return found


def within_hosts(hosts: Mapping[str, list[int]], rates: Mapping[int, Rates]) -> dict[str, float]:
    """What the ranks of each host reach among themselves."""
    found = {}
    for host, ranks in hosts.items():
        measured = [rates[rank].within for rank in ranks] if rates else []
        there = [rate for rate in measured if rate is not None]
        if there:
            found[host] = min(there)
    return found


def bus_bandwidth(group: Any, size: int, device: torch.device) -> float:
    """Of an all-reduce over a group, median of several.

    Args:
        group: of two ranks or more, this one among them.
        size: bytes of the message, a multiple of 4.
        device: where it lies.

    Returns:
        Bytes a second and link, as NCCL's tests report busbw: it does not depend on the number of
        ranks where the links are the limit.

    Raises:
        WrongSumError: the sum is wrong.
    """
    ranks = dist.get_world_size(group)
    message = torch.ones(size // 4, device=device)
    dist.all_reduce(message, group=group)
    if not bool((message == ranks).all()):
        raise WrongSumError(
            f"an all-reduce of ones over {ranks} ranks gave {message.min().item():g} to "
            f"{message.max().item():g} instead of {ranks}"
        )
    # So that repeated sums stay finite.
    message.zero_()
    seconds = []
    for _ in range(WARM_UP + REPEATS):
        _finish(device)
        start = time.perf_counter()
        dist.all_reduce(message, group=group)
        _finish(device)
        seconds.append(time.perf_counter() - start)
    return 2 * (ranks - 1) / ranks * size / statistics.median(seconds[WARM_UP:])


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
