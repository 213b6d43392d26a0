"""Messages between the ranks of a job, and the names of the ranks that do not answer.

They go through a `TCPStore`, before there is any process group: when a rank does not join a group,
torch cannot say which one. Messages are JSON values under keys.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from torch.distributed import DistError
from torch.distributed.rendezvous import rendezvous


class NoAnswerError(Exception):
    """A rank has not sent a message within the time; the text names the rank."""


class RankMessages:
    """Messages to and from all ranks of a job.

    Args:
        store: The job's.
        rank: Of this process.
        size: Number of ranks.
        wait_s: Seconds to wait for a message.
    """

    def __init__(self, store: Any, rank: int, size: int, wait_s: float) -> None:
        self.store, self.rank, self.size, self.wait_s = store, rank, size, wait_s

    def send(self, key: str, value: Any) -> None:
        """Sends a value to all who ask for this key of this rank."""
        self.store.set(_name(f"{key}/{self.rank}"), json.dumps(value))

    def receive(self, key: str, rank: int, wait_s: float | None = None) -> Any:
        """Returns what a rank sends, after waiting for it.

        Raises:
            NoAnswerError: It sent nothing.
        """
        name = _name(f"{key}/{rank}")
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
        """Returns what ranks send, by rank, and those of them that sent nothing in time.

        Args:
            key: Of the message.
            ranks: All by default.
            wait_s: Of this class by default.
        """
        ranks = range(self.size) if ranks is None else ranks
        names = [_name(f"{key}/{rank}") for rank in ranks]
        with contextlib.suppress(DistError):
            seconds = self.wait_s if wait_s is None else wait_s
            self.store.wait(names, timedelta(seconds=seconds))
        sent = {
            rank: json.loads(self.store.get(name))
            for rank, name in zip(ranks, names, strict=True)
            if self.store.check([name])
        }
        return sent, [rank for rank in ranks if rank not in sent]


def open_store(wait_s: float) -> Any:
    """Connects to the job's store, which rank 0 holds, or torchrun where it does.

    This is torch's `env://`, except that it does not wait for all ranks.

    Args:
        wait_s: Seconds to wait for the store.
    """
    # Told the true number of ranks torch would wait for them here, and not say who is missing.
    store, _, _ = next(
        rendezvous(
            "env://", int(os.environ["RANK"]), world_size=1, timeout=timedelta(seconds=wait_s)
        )
    )
    return store


def _name(key: str) -> str:
    return f"megatron_rw/preflight/{key}"
