"""A collective that never ends, and which rank it waits for.

A rank that died, lost its network or is stuck leaves the others waiting in a collective until
`--distributed-timeout-minutes` is over, and then with an error that does not say for whom. Here
every rank notes how far it is, a thread tells the job's store every few seconds, and rank 0's
thread looks at all of them. When rank 0 has not moved for most of the timeout, the run ends with a
line that names who did not arrive: who is not heard from, or else who is behind.

Nothing of it is on the path of a step but an assignment.
"""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d

# The statuses of <sysexits.h> for what one cannot get through to, of a run that a watchdog ends.
EXIT_STATUS = 74
# Seconds between two signs of life, and after how many without one a rank is not heard from.
BEAT_S, SILENT_BEATS = 5.0, 5
# Of the timeout: how long a rank may stand still.
SHARE = 0.75


@dataclass(frozen=True, order=True)
class Position:
    """How far a rank is; a later one is larger.

    Attributes:
        iteration: completed iterations.
        step: counts what the rank has begun since, in the order in which all ranks do.
        doing: that, in words.
    """

    iteration: int
    step: int
    doing: str

    def __str__(self) -> str:
        """For people."""
        return f"iteration {self.iteration + 1}, {self.doing}"


class Progress:
    """Where this rank is."""

    def __init__(self) -> None:
        self.position = Position(0, 0, "start-up")
        self.since = time.monotonic()

    def begin(self, iteration: int, doing: str) -> None:
        """A new iteration."""
        self.position = Position(iteration, 0, doing)
        self.since = time.monotonic()

    def then(self, doing: str) -> None:
        """The next thing within it."""
        last = self.position
        self.position = Position(last.iteration, last.step + 1, doing)
        self.since = time.monotonic()


@dataclass(frozen=True)
class Sign:
    """A rank's last sign of life.

    Attributes:
        rank: whose.
        host: where it runs.
        position: how far it was.
        age: seconds since it changed, as the reader has seen it.
    """

    rank: int
    host: str
    position: Position
    age: float


@dataclass(frozen=True)
class Verdict:
    """Who keeps the others waiting.

    Attributes:
        ranks: they.
        text: for people.
    """

    ranks: list[int]
    text: str


def diagnosis(
    signs: Sequence[Sign], missing: Sequence[int], waited: float, silence: float
) -> Verdict | None:
    """Who keeps the others waiting, or None where nobody can be named.

    Args:
        signs: of the ranks that have given one.
        missing: ranks that never have.
        waited: seconds that this rank has stood still.
        silence: seconds after which a rank is not heard from.
    """
    who = {rank: f"rank {rank} was never heard from" for rank in missing} | {
        sign.rank: f"rank {sign.rank} on {sign.host} was last heard from {sign.age:.0f} s ago, at "
        f"{sign.position}: its process or its network is gone"
        for sign in signs
        if sign.age > silence
    }
    if not who:
        first = max(sign.position for sign in signs)
        who = {
            sign.rank: f"rank {sign.rank} on {sign.host} is still at {sign.position}, others are "
            f"at {first}"
            for sign in signs
            if sign.position < first
        }
    if not who:
        return None
    return Verdict(list(who), f"no progress for {waited:.0f} s: {few(list(who.values()))}.")


def few(lines: Sequence[str], most: int = 8) -> str:
    """Join them for a message, the first ones if there are many."""
    more = f"; and {len(lines) - most} more" if len(lines) > most else ""
    return "; ".join(lines[:most]) + more


class Watchdog:
    """Watches one rank from two threads: one talks to the store, which may block, one judges.

    Args:
        store: the job's `TCPStore`, a connection of its own.
        rank: of this process.
        size: of the job.
        progress: what the rank notes.
        timeout: seconds after which collectives fail.
        leave: ends the process; for tests.
    """

    def __init__(
        self,
        store: Any,
        rank: int,
        size: int,
        progress: Progress,
        timeout: float,
        leave: Callable[[int], Any] = os._exit,
    ) -> None:
        self._store, self._rank, self._size = store, rank, size
        self._progress, self._limit, self._leave = progress, SHARE * timeout, leave
        self._every = min(BEAT_S, timeout / 20)
        self._beats = 0
        # By rank: the number of its last sign of life, and when this one saw it.
        self._seen: dict[int, tuple[int, float]] = {}
        self._reached = time.monotonic()
        self._verdict: Verdict | None = None
        self._stop = threading.Event()

    def start(self) -> None:
        """Watch from now on."""
        for target in (self._talk, self._judge):
            threading.Thread(target=target, name="watchdog", daemon=True).start()

    def stop(self) -> None:
        """The run is over: others may now be gone with good reason."""
        self._stop.set()

    def _talk(self) -> None:
        while not self._stop.is_set():
            try:
                self._beat()
                if self._rank == 0:
                    self._look()
                elif self._store.check([_VERDICT]):
                    self._verdict = Verdict(**json.loads(self._store.get(_VERDICT)))
                self._reached = time.monotonic()
            except Exception:
                # The store's errors have no class in common. That it is out of reach shows in
                # `_reached`, which the other thread judges.
                pass
            self._stop.wait(self._every)

    def _judge(self) -> None:
        while not self._stop.wait(self._every):
            verdict = self._verdict or self._unreachable()
            if verdict is not None and not self._stop.is_set():
                self._end(verdict)
                return

    def _beat(self) -> None:
        self._beats += 1
        position = self._progress.position
        sign = [self._beats, socket.gethostname(), *vars(position).values()]
        self._store.set(_key(self._rank), json.dumps(sign))

    def _look(self) -> None:
        """On rank 0: note all signs of life, and judge where this rank stands still."""
        for rank in set(range(self._size)) - self._seen.keys():
            if self._store.check([_key(rank)]):
                self._seen[rank] = (0, time.monotonic())
        there = sorted(self._seen)
        values = self._store.multi_get([_key(rank) for rank in there])
        signs = [self._sign(rank, json.loads(v)) for rank, v in zip(there, values, strict=True)]
        waited = time.monotonic() - self._progress.since
        if waited < self._limit:
            return
        missing = sorted(set(range(self._size)) - self._seen.keys())
        found = diagnosis(signs, missing, waited, SILENT_BEATS * self._every)
        if found is not None:
            self._store.set(_VERDICT, json.dumps(vars(found)))
            self._verdict = found

    def _sign(self, rank: int, sign: list[Any]) -> Sign:
        number, host, *position = sign
        now = time.monotonic()
        if self._seen[rank][0] != number:
            self._seen[rank] = (number, now)
        return Sign(rank, host, Position(*position), now - self._seen[rank][1])

    def _unreachable(self) -> Verdict | None:
        now = time.monotonic()
        standing = now - self._progress.since
        if min(now - self._reached, standing) < self._limit:
            return None
        where = f"{self._store.host}:{self._store.port}"
        return Verdict(
            [0],
            f"no progress for {standing:.0f} s, and the store of the job at {where} cannot be "
            "reached: the network to that host, or rank 0 there, is gone.",
        )

    def _end(self, verdict: Verdict) -> None:
        print(
            f"error: rank {self._rank} on {socket.gethostname()} stops at "
            f"{self._progress.position}: {verdict.text}",
            file=sys.stderr,
            flush=True,
        )
        if self._rank in (0, *verdict.ranks):
            faulthandler.dump_traceback(file=2)
        if self._rank == 0:
            # The others read the verdict in this process's store.
            time.sleep(2 * self._every)
        self._leave(EXIT_STATUS)


_VERDICT = "megatron_rw/watchdog/verdict"


def _key(rank: int) -> str:
    return f"megatron_rw/watchdog/{rank}"


class Rendezvous:
    """Ends a process that does not meet the others; torch would wait for twice the timeout.

    Args:
        minutes: How long to wait.
        flag: The flag that set this time.
    """

    def __init__(self, minutes: float, flag: str = "--distributed-timeout-minutes") -> None:
        self._minutes, self._flag = minutes, flag
        self._timer = threading.Timer(60 * minutes, self._end)
        self._timer.daemon = True

    def __enter__(self) -> None:
        self.begin()

    def __exit__(self, *exception: object) -> None:
        self.end()

    def begin(self) -> None:
        """Begins to wait."""
        self._timer.start()

    def end(self) -> None:
        """All processes have met."""
        self._timer.cancel()

    def _end(self) -> None:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        print(
            f"error: rank {os.environ.get('RANK')} on {socket.gethostname()}: the "
            f"{os.environ.get('WORLD_SIZE')} processes have not all met at {where} within "
            f"{self._minutes:g} min ({self._flag}). See that all of them run, "
            "that rank 0 is on that host, and that the network lets them through.",
            file=sys.stderr,
            flush=True,
        )
        os._exit(EXIT_STATUS)


def watch(args: Namespace, progress: Progress) -> Watchdog | None:
    """Watch this rank, once torch.distributed is initialised.

    Args:
        args: validated.
        progress: what the rank notes.

    Returns:
        The watchdog; None for a run of one process, or one that met by other means than TCP.
    """
    store: Any = distributed_c10d._get_default_store()
    while hasattr(store, "underlying_store"):
        store = store.underlying_store
    if dist.get_world_size() == 1 or type(store).__name__ != "TCPStore":
        return None
    connection = store.clone()
    connection.set_timeout(timedelta(seconds=2 * BEAT_S))
    seconds = 60.0 * args.distributed_timeout_minutes
    if args.distributed_timeout_seconds_after_init is not None:
        seconds = min(seconds, float(args.distributed_timeout_seconds_after_init))
    watchdog = Watchdog(connection, dist.get_rank(), dist.get_world_size(), progress, seconds)
    watchdog.start()
    return watchdog
