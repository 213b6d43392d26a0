"""Who keeps the others waiting is named, in time, and nobody else is disturbed."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from megatron_rw.resilience.watchdog import (
    EXIT_STATUS,
    STALL_FRACTION,
    Position,
    Progress,
    Rendezvous,
    Sign,
    Watchdog,
    diagnosis,
)
from tests.ports import free_port

TIMEOUT_S = 4.0


def sign(rank: int, iteration: int, step: int = 0, age: float = 0.0) -> Sign:
    return Sign(rank, f"host{rank}", Position(iteration, step, "a micro-batch"), age)


def test_names_the_rank_that_is_behind() -> None:
    found = diagnosis([sign(0, 7, 3), sign(1, 7, 2), sign(2, 7, 3)], [], 48.0, 25.0)
    assert found is not None
    assert found.ranks == [1]
    assert found.text == (
        "no progress for 48 s: rank 1 on host1 is still at iteration 8, a micro-batch, "
        "others are at iteration 8, a micro-batch."
    )


def test_names_the_rank_that_is_silent_before_one_that_is_behind() -> None:
    found = diagnosis([sign(0, 7), sign(1, 7, 1, age=40.0), sign(2, 6)], [], 48.0, 25.0)
    assert found is not None
    assert found.ranks == [1]
    assert "rank 1 on host1 was last heard from 40 s ago" in found.text


def test_names_ranks_that_never_came_but_not_hundreds_of_them() -> None:
    found = diagnosis([sign(0, 0)], list(range(1, 300)), 48.0, 25.0)
    assert found is not None
    assert found.ranks == list(range(1, 300))
    assert found.text.startswith("no progress for 48 s: rank 1 was never heard from; rank 2")
    assert found.text.endswith("; and 291 more.")


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=8))
def test_accuses_exactly_those_that_are_not_at_the_front(places: list[tuple[int, int]]) -> None:
    found = diagnosis([sign(i, *place) for i, place in enumerate(places)], [], 48.0, 25.0)
    behind = [i for i, place in enumerate(places) if place < max(places)]
    assert (found.ranks if found is not None else []) == behind


class Job:
    """Ranks as watchdogs of one process, around one store."""

    def __init__(self, size: int) -> None:
        self.port = free_port()
        self.store = TCPStore(
            "127.0.0.1", self.port, is_master=True, wait_for_workers=False, use_libuv=True
        )
        self.left: dict[int, int] = {}
        self.gone = threading.Event()
        self.progress = [Progress() for _ in range(size)]
        self.dogs = [self._watch(rank, size) for rank in range(size)]

    def _watch(self, rank: int, size: int) -> Watchdog:
        store: Any = TCPStore("127.0.0.1", self.port, is_master=False, timeout=timedelta(seconds=2))

        def leave(status: int) -> None:
            self.left[rank] = status
            if len(self.left) == size:
                self.gone.set()

        return Watchdog(store, rank, size, self.progress[rank], TIMEOUT_S, leave)

    def run(self, seconds: float, moving: set[int]) -> None:
        """Let time go by in which some ranks make progress."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for rank in moving:
                self.progress[rank].then("a micro-batch")
            time.sleep(0.02)


@contextmanager
def job(size: int) -> Iterator[Job]:
    it = Job(size)
    for dog in it.dogs:
        dog.start()
    try:
        yield it
    finally:
        for dog in it.dogs:
            dog.stop()


@pytest.mark.parametrize("moving", [{0, 1}, set()], ids=["moving", "at the same long step"])
def test_leaves_a_run_alone(moving: set[int]) -> None:
    with job(2) as it:
        for progress in it.progress:
            progress.begin(3, "logging, evaluating or saving")
        it.run(1.5 * TIMEOUT_S, moving)
        assert it.left == {}


def test_ends_all_ranks_when_one_is_stuck(capfd: pytest.CaptureFixture[str]) -> None:
    with job(3) as it:
        for rank in (0, 1, 2):
            it.progress[rank].begin(3, "the step's begin")
        for rank in (0, 1):
            it.progress[rank].then("the optimizer's step")
        start = time.monotonic()
        assert it.gone.wait(TIMEOUT_S), "not within the timeout"
        assert time.monotonic() - start > 0.9 * STALL_FRACTION * TIMEOUT_S, "too early"
        assert set(it.left.values()) == {EXIT_STATUS}
    said = capfd.readouterr().err
    assert "rank 2 on" in said
    assert "is still at iteration 4, the step's begin" in said
    assert said.count("error: rank") == 3
    # Of the accused and of rank 0.
    assert said.count("Current thread") == 2


def test_names_a_rank_whose_process_is_gone(capfd: pytest.CaptureFixture[str]) -> None:
    with job(2) as it:
        it.run(1.0, moving={0, 1})
        it.dogs[1].stop()
        time.sleep(TIMEOUT_S)
        assert it.left == {0: EXIT_STATUS}
    said = capfd.readouterr().err
    assert "rank 1 on" in said
    assert "its process or its network is gone" in said


def test_ends_a_rank_that_cannot_reach_the_store(capfd: pytest.CaptureFixture[str]) -> None:
    it = Job(2)
    it.dogs[1].start()
    it.run(0.5, moving={1})
    del it.store
    it.dogs[0].stop()
    del it.dogs[0]
    deadline = time.monotonic() + 2 * TIMEOUT_S
    while 1 not in it.left and time.monotonic() < deadline:
        time.sleep(0.05)
    it.dogs[0].stop()
    assert it.left == {1: EXIT_STATUS}
    assert f"the store of the job at 127.0.0.1:{it.port} cannot be reached" in (
        capfd.readouterr().err
    )


def test_a_rendezvous_that_took_place_ends_nothing() -> None:
    rendezvous = Rendezvous(0.2 / 60)
    rendezvous.begin()
    # A process that is restarted without ending meets the others again.
    rendezvous.begin()
    rendezvous.end()
    time.sleep(0.4)
