"""How runs end: by signals, by time limits, and by a rank that is stuck."""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from megatron_rw.resilience.folder import CheckpointFolder
from megatron_rw.resilience.watchdog import EXIT_STATUS
from tests.program import Run, in_turn, run_program, signal_when
from tests.resilience import held_step

RUN = "--micro-batch-size 4 --global-batch-size 8 --train-iters 2000 --save-interval 2000".split()
ENDING = "--exit-signal-handler --exit-code-when-unfinished 75".split()


def reached(directory: Path, steps: int) -> Callable[[], bool]:
    metrics = directory / "metrics.jsonl"
    return lambda: metrics.exists() and metrics.read_text().count("\n") >= steps


def train(directory: Path, data_flags: list[str], *flags: str, **how: object) -> Run:
    checkpoints = str(directory / "checkpoints")
    flags = (*data_flags, *RUN, *flags, "--save", checkpoints, "--load", checkpoints)
    return run_program(directory, *flags, processes=2, **how)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("number", "ranks"),
    [
        (signal.SIGTERM, (0, 1)),
        pytest.param(signal.SIGUSR1, (1,), marks=pytest.mark.long),
        pytest.param(signal.SIGINT, (0,), marks=pytest.mark.long),
    ],
)
def test_signal_lets_the_run_finish_its_step_save_and_say_that_it_is_unfinished(
    number: signal.Signals, ranks: tuple[int, ...], tmp_path: Path, data_flags: list[str]
) -> None:
    disturb = signal_when(reached(tmp_path, 3), number, ranks)
    run = train(tmp_path, data_flags, *ENDING, disturb=disturb)
    assert run.status == [75, 75], run.all_output
    last = run.train_metrics()[-1]["iteration"]
    checkpoints = CheckpointFolder(tmp_path / "checkpoints").checkpoints()
    assert [checkpoint.iteration for checkpoint in checkpoints] == [last]
    assert checkpoints[0].defect() is None
    # What the batch script's next attempt does.
    again = train(tmp_path, data_flags, *ENDING, "--exit-interval", str(last + 2))
    assert again.status == [75, 75], again.all_output
    assert [r["iteration"] for r in again.train_metrics()[-2:]] == [last + 1, last + 2]


@pytest.mark.parametrize(
    ("number", "how"),
    [
        (signal.SIGUSR1, ""),
        pytest.param(
            signal.SIGTERM,
            "--async-save --async-strategy mcore --use-persistent-ckpt-worker",
            marks=pytest.mark.long,
        ),
    ],
)
def test_signal_to_every_process_as_slurm_sends_it(
    number: signal.Signals, how: str, tmp_path: Path, data_flags: list[str]
) -> None:
    """Also to those that load data and write checkpoints, once they have begun."""
    began = reached(tmp_path, 6)

    def disturb(pids: Sequence[int]) -> bool:
        if not began():
            return False
        for pid in pids:
            # A group of its own: `tests.program`.
            os.killpg(pid, number)
        return True

    more = ["--num-workers", "1", "--save-interval", "3", *how.split()]
    run = train(tmp_path, data_flags, *ENDING, *more, disturb=disturb)
    assert run.status == [75, 75], run.all_output
    last = run.train_metrics()[-1]["iteration"]
    newest = CheckpointFolder(tmp_path / "checkpoints").newest_complete()
    assert newest is not None
    assert newest.iteration == last


def test_second_interrupt_ends_at_once(tmp_path: Path, data_flags: list[str]) -> None:
    def all_are(state: str) -> Callable[[], bool]:
        return lambda: all((tmp_path / f"{state}-{rank}").exists() for rank in (0, 1))

    # Two that arrive before Python looks are one.
    disturb = in_turn(
        signal_when(all_are("held"), signal.SIGINT), signal_when(all_are("noticed"), signal.SIGINT)
    )
    prepare = functools.partial(held_step.hold, tmp_path)
    run = train(tmp_path, data_flags, *ENDING, disturb=disturb, prepare=prepare)
    assert run.status == [130, 130], run.all_output
    assert CheckpointFolder(tmp_path / "checkpoints").checkpoints() == []


def test_finished_run_ends_with_status_0(tmp_path: Path, data_flags: list[str]) -> None:
    train(tmp_path, data_flags, *ENDING, "--train-iters", "3").check()
    # And so does the same command when there is nothing left to do.
    again = train(tmp_path, data_flags, *ENDING, "--train-iters", "3").check()
    assert "nothing left to do" in again.output[0]
    assert again.train_metrics()[-1]["iteration"] == 3


def test_rank_that_hangs_is_named(tmp_path: Path, data_flags: list[str]) -> None:
    """SIGSTOP: the process is there and its connections are, but it does nothing."""
    disturb = signal_when(reached(tmp_path, 3), signal.SIGSTOP, (1,))
    limit = ["--distributed-timeout-minutes", "1", "--distributed-timeout-seconds-after-init", "8"]
    run = train(tmp_path, data_flags, *limit, disturb=disturb)
    # The stopped process was killed by the test.
    assert run.status == [EXIT_STATUS, -9], run.all_output
    line = next(line for line in run.output[0].splitlines() if line.startswith("error: "))
    assert "no progress for" in line
    assert "rank 1 on" in line
