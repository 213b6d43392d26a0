"""Bringing all ranks together, and naming those that do not come.

The ranks meet at a `TCPStore`, before any process group: a group that one rank does not join says
nothing about which. What ranks tell each other here are JSON values under keys.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import MutableMapping
from datetime import timedelta
from typing import Any

from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]

_POLL_S = 0.05
# How long rank 0, in whose process the store lives, waits for others to read the last word.
_LINGER_S = 10.0


class NoAnswerError(RuntimeError):
    """A rank has not said what it should within the time; the message names it."""


class Meeting:
    """All ranks of a job at a store.

    Args:
        store: of the job.
        rank: of this process.
        size: of the job.
        wait_s: seconds after which somebody who has not come is missing.
    """

    def __init__(self, store: Any, rank: int, size: int, wait_s: float) -> None:
        self.store, self.rank, self.size, self.wait_s = store, rank, size, wait_s

    def tell(self, key: str, value: Any) -> None:
        """Say something to the others."""
        self.store.set(_name(f"{key}/{self.rank}"), json.dumps(value))

    def hear(self, key: str, rank: int, wait_s: float | None = None) -> Any:
        """What a rank has said, or says soon.

        Raises:
            NoAnswerError: it said nothing.
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

    def hear_all(self, key: str) -> tuple[dict[int, Any], list[int]]:
        """What all ranks have said, by rank, and the ranks that have not within the time."""
        missing = list(range(self.size))
        deadline = time.monotonic() + self.wait_s
        while missing:
            missing = [r for r in missing if not self.store.check([_name(f"{key}/{r}")])]
            if not missing or time.monotonic() > deadline:
                break
            time.sleep(_POLL_S)
        there = sorted(set(range(self.size)) - set(missing))
        values = self.store.multi_get([_name(f"{key}/{rank}") for rank in there]) if there else []
        return {r: json.loads(v) for r, v in zip(there, values, strict=True)}, missing

    def leave(self, others: int) -> None:
        """The last word is said: rank 0 sees it read, as its process may hold the store.

        Args:
            others: how many ranks beside rank 0 are still there.
        """
        if self.rank != 0:
            self.store.add(_name("left"), 1)
            return
        deadline = time.monotonic() + _LINGER_S
        while self.store.add(_name("left"), 0) < others and time.monotonic() < deadline:
            time.sleep(_POLL_S)


def open_store(wait_s: float, env: MutableMapping[str, str] = os.environ) -> Any:
    """Connect to the job's store, which rank 0 holds, or torchrun where it does.

    As torch's own `env://` does, but without waiting there for all ranks: that names nobody.

    Args:
        wait_s: seconds to wait for it.
        env: complete, see `platform.launch`.
    """
    with_torchrun = env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return TCPStore(
        env["MASTER_ADDR"],
        int(env["MASTER_PORT"]),
        int(env["WORLD_SIZE"]),
        is_master=env["RANK"] == "0" and not with_torchrun,
        timeout=timedelta(seconds=wait_s),
        wait_for_workers=False,
        multi_tenant=True,
    )


def _name(key: str) -> str:
    return f"megatron_rw/preflight/{key}"
