"""Messages between the ranks of a job, which tell who does not answer.

They go through a `TCPStore`, before there is any process group: when a rank does not join a group,
torch cannot say which one. Messages are JSON values under keys.
"""

import contextlib
import json
import os
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

from torch.distributed import DistError
from torch.distributed.rendezvous import rendezvous


class NoAnswerError(Exception):
    """A rank has not sent a message within the time; the text names the rank."""


class RankMessages:
    """Messages between rank 0 and the other ranks, which it waits for `wait_s` seconds."""

    def __init__(self, store: Any, rank: int, size: int, wait_s: float) -> None:
        self.store, self.rank, self.size, self.wait_s = store, rank, size, wait_s

    def send(self, key: str, value: Any) -> None:
        """Sends a value to all who ask for this key of this rank."""
        self.store.set(_name(key, self.rank), json.dumps(value))

    def receive(self, key: str) -> Any:
        """Returns what rank 0 sends, after waiting for it, or raises a `NoAnswerError`."""
        # Rank 0 may have come late, and waits for others from then on.
        seconds = 2 * self.wait_s
        try:
            self.store.wait([_name(key, 0)], timedelta(seconds=seconds))
            return json.loads(self.store.get(_name(key, 0)))
        except DistError as error:
            raise NoAnswerError(
                f"rank 0 has not answered within {seconds:g} s, or is gone"
            ) from error

    def receive_all(
        self, key: str, ranks: Iterable[int], wait_s: float
    ) -> tuple[dict[int, Any], list[int]]:
        """Returns what ranks send, by rank, and those of them that sent nothing in time."""
        names = {rank: _name(key, rank) for rank in ranks}
        with contextlib.suppress(DistError):
            self.store.wait(list(names.values()), timedelta(seconds=wait_s))
        sent = {
            rank: json.loads(self.store.get(name))
            for rank, name in names.items()
            if self.store.check([name])
        }
        return sent, [rank for rank in names if rank not in sent]


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
