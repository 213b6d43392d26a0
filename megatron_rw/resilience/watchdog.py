"""Ends a run that hangs in a collective, and names the rank that the others wait for.

Torch would let the others wait until `--distributed-timeout-minutes` is over, and name no rank.
Here every rank notes how far it is, which only assigns an attribute, and a thread sends that to the
job's store every few seconds, as a sign of life. When rank 0 has made no progress for most of the
timeout, its thread ends the run with a line that names the ranks that have sent no sign for long,
or else those that are behind.
"""

import faulthandler
import json
import os
import socket
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d

from megatron_rw.errors import print_error

EXIT_STATUS = 74  # EX_IOERR of <sysexits.h>: the status of a run that the watchdog ends.
BEAT_SECONDS = 5.0  # The longest time between two signs of life of a rank.
_SILENT_BEATS = 5  # A rank that has sent no sign of life for so many of these times counts as gone.
STALL_FRACTION = 0.75  # Fraction of the timeout without progress that counts as a hang.


@dataclass(frozen=True, order=True)
class Position:
    """How far a rank is; a later position is larger."""

    iteration: int  # Completed ones.
    step: int  # Counts the activities of the iteration, whose order is the same on all ranks.
    doing: str  # The present activity in words.

    def __str__(self) -> str:
        """Returns the position as messages name it."""
        return f"iteration {self.iteration + 1}, {self.doing}"


class Progress:
    """The position of this rank, and since when it has been there."""

    def __init__(self) -> None:
        self.begin(0, "start-up")

    def begin(self, iteration: int, doing: str) -> None:
        """Notes that an iteration begins, with its first activity."""
        self.position = Position(iteration, 0, doing)
        self.since = time.monotonic()

    def then(self, doing: str) -> None:
        """Notes the next activity of the iteration."""
        last = self.position
        self.position = Position(last.iteration, last.step + 1, doing)
        self.since = time.monotonic()


@dataclass(frozen=True)
class Sign:
    """A rank's last sign of life; its age is the seconds since it arrived."""

    rank: int
    host: str
    position: Position
    age: float


@dataclass(frozen=True)
class Diagnosis:
    """The ranks that the others wait for, and the message that says so."""

    ranks: list[int]
    text: str


def diagnosis(
    signs: Sequence[Sign], missing: Sequence[int], waited: float, silence: float
) -> Diagnosis | None:
    """Names the ranks that the others wait for; None where all are at the same position.

    `missing` are the ranks that have sent no sign of life. This rank has made no progress for
    `waited` seconds. A rank counts as gone after `silence` seconds without a sign of life.
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
    return Diagnosis(list(who), f"no progress for {waited:.0f} s: {few(list(who.values()))}.")


def few(lines: Sequence[str], most: int = 8) -> str:
    """Joins lines for a message, and counts those beyond the first few."""
    more = f"; and {len(lines) - most} more" if len(lines) > most else ""
    return "; ".join(lines[:most]) + more


class Watchdog:
    """Watches a rank from two threads: one uses the store, which may block, and one ends the run.

    `store` is a connection to the job's `TCPStore` that nothing else uses. Collectives fail after
    `timeout` seconds. `leave` ends the process; tests replace it.
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
        self._progress, self._limit, self._leave = progress, STALL_FRACTION * timeout, leave
        self._interval = min(BEAT_SECONDS, timeout / 20)
        self._beats = 0
        # On rank 0, by rank: the number of the last sign of life, and when it arrived.
        self._seen: dict[int, tuple[int, float]] = {}
        self._store_answered = time.monotonic()
        self._diagnosis: Diagnosis | None = None
        self._stop = threading.Event()

    def start(self) -> None:
        """Starts to watch."""
        for target in (self._talk, self._wait):
            threading.Thread(target=target, name="watchdog", daemon=True).start()

    def stop(self) -> None:
        """Stops watching, so that the ranks may leave at the end of the run."""
        self._stop.set()

    def _talk(self) -> None:
        while not self._stop.is_set():
            try:
                self._beat()
                if self._rank == 0:
                    self._look()
                elif self._store.check([_DIAGNOSIS]):
                    self._diagnosis = Diagnosis(**json.loads(self._store.get(_DIAGNOSIS)))
                self._store_answered = time.monotonic()
            except Exception:
                # The store's errors have no class in common. The other thread notices by the time
                # of the last answer that the store is out of reach.
                pass
            self._stop.wait(self._interval)

    def _wait(self) -> None:
        while not self._stop.wait(self._interval):
            found = self._diagnosis or self._unreachable()
            if found is not None and not self._stop.is_set():
                self._end(found)
                return

    def _beat(self) -> None:
        self._beats += 1
        position = self._progress.position
        sign = [self._beats, socket.gethostname(), *vars(position).values()]
        self._store.set(_key(self._rank), json.dumps(sign))

    def _look(self) -> None:
        """Reads all signs of life, and finds who is to blame if rank 0 makes no progress."""
        ranks = range(self._size)
        for rank in ranks:
            if rank not in self._seen and self._store.check([_key(rank)]):
                self._seen[rank] = (0, time.monotonic())
        there = [rank for rank in ranks if rank in self._seen]
        values = self._store.multi_get([_key(rank) for rank in there])
        signs = [self._sign(rank, *json.loads(v)) for rank, v in zip(there, values, strict=True)]
        waited = time.monotonic() - self._progress.since
        if waited < self._limit:
            return
        missing = [rank for rank in ranks if rank not in self._seen]
        found = diagnosis(signs, missing, waited, _SILENT_BEATS * self._interval)
        if found is not None:
            self._store.set(_DIAGNOSIS, json.dumps(vars(found)))
            self._diagnosis = found

    def _sign(self, rank: int, number: int, host: str, *position: Any) -> Sign:
        now = time.monotonic()
        if self._seen[rank][0] != number:
            self._seen[rank] = (number, now)
        return Sign(rank, host, Position(*position), now - self._seen[rank][1])

    def _unreachable(self) -> Diagnosis | None:
        now = time.monotonic()
        waited = now - self._progress.since
        if min(now - self._store_answered, waited) < self._limit:
            return None
        where = f"{self._store.host}:{self._store.port}"
        return Diagnosis(
            [0],
            f"no progress for {waited:.0f} s, and the store of the job at {where} cannot be "
            "reached: the network to that host, or rank 0 there, is gone.",
        )

    def _end(self, found: Diagnosis) -> None:
        here = f"rank {self._rank} on {socket.gethostname()}"
        print_error(f"{here} stops at {self._progress.position}: {found.text}")
        if self._rank in (0, *found.ranks):
            faulthandler.dump_traceback(file=2)
        if self._rank == 0:
            # The store is in this process, and the other ranks are to read the diagnosis.
            time.sleep(2 * self._interval)
        self._leave(EXIT_STATUS)


_DIAGNOSIS = "megatron_rw/watchdog/diagnosis"


def _key(rank: int) -> str:
    return f"megatron_rw/watchdog/{rank}"


class Rendezvous:
    """Ends a process that waits too long for the others when process groups are made.

    Torch would wait for twice the timeout. The flag is the one that set the minutes.
    """

    def __init__(self, minutes: float, flag: str = "--distributed-timeout-minutes") -> None:
        self._minutes, self._flag = minutes, flag
        self._timer: threading.Timer | None = None

    def begin(self) -> None:
        """Begins to wait, anew in a process that is restarted without ending."""
        self.end()
        self._timer = threading.Timer(60 * self._minutes, self._end)
        self._timer.daemon = True
        self._timer.start()

    def end(self, *exception: object) -> None:
        """Ends the wait."""
        if self._timer is not None:
            self._timer.cancel()

    __enter__, __exit__ = begin, end

    def _end(self) -> None:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        print_error(
            f"rank {os.environ.get('RANK')} on {socket.gethostname()}: the "
            f"{os.environ.get('WORLD_SIZE')} processes have not all met at {where} within "
            f"{self._minutes:g} min ({self._flag}). See that all of them run, "
            "that rank 0 is on that host, and that the network lets them through."
        )
        os._exit(EXIT_STATUS)


def watch(args: Namespace, progress: Progress) -> Watchdog | None:
    """Watches this rank, once torch.distributed is initialised.

    Returns None for a run of one process, or one whose processes met by other means than TCP.
    """
    store: Any = distributed_c10d._get_default_store()
    while hasattr(store, "underlying_store"):
        store = store.underlying_store
    if dist.get_world_size() == 1 or type(store).__name__ != "TCPStore":
        return None
    connection = store.clone()
    connection.set_timeout(timedelta(seconds=2 * BEAT_SECONDS))
    seconds = 60.0 * args.distributed_timeout_minutes
    if args.distributed_timeout_seconds_after_init is not None:
        seconds = min(seconds, float(args.distributed_timeout_seconds_after_init))
    watchdog = Watchdog(connection, dist.get_rank(), dist.get_world_size(), progress, seconds)
    watchdog.start()
    return watchdog
