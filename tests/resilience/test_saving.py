"""The real program where checkpoints cannot be written, are deleted, or are written over."""

from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_rw.resilience.folder import CheckpointFolder
from tests.program import Run, run_program

RUN = "--train-iters 6 --micro-batch-size 4 --global-batch-size 8 --save-interval 2".split()
ASYNC = "--async-save --async-strategy mcore --use-persistent-ckpt-worker".split()
# Rank 0's shard is larger than this, and nothing else is.
TOO_SMALL = "350000"


HOW = ["synchronous", "asynchronous"]


def train(directory: Path, data_flags: list[str], *flags: str, limits: str = "0,0") -> Run:
    save = str(directory / "checkpoints")
    return run_program(
        directory,
        *(*data_flags, *RUN, "--save", save, "--load", save, *flags),
        processes=2,
        module="tests.faults.injected",
        environment={"RANK_LIMITS": limits},
        patience=30,
    )


def iterations(directory: Path) -> list[int]:
    folder = CheckpointFolder(directory / "checkpoints")
    assert all(checkpoint.defect() is None for checkpoint in folder.checkpoints())
    return [checkpoint.iteration for checkpoint in folder.checkpoints()]


@pytest.mark.parametrize("how", [pytest.param([], marks=pytest.mark.long), ASYNC], ids=HOW)
def test_checkpoint_that_cannot_be_written_stops_the_run(
    how: list[str], tmp_path: Path, data_flags: list[str]
) -> None:
    train(tmp_path, data_flags, *how, "--exit-interval", "2").check()
    before = CheckpointFolder(tmp_path / "checkpoints").checkpoints()[0]
    run = train(tmp_path, data_flags, *how, limits=f"{TOO_SMALL},0")
    assert run.status == [1, 1], run.all_output
    assert not run.hung
    message = next(line for line in run.output[0].splitlines() if line.startswith("error: "))
    assert "the checkpoint of iteration 4 could not be saved to" in message
    assert "File too large" in message
    assert "that of iteration 2 is there. The run stops" in message
    assert iterations(tmp_path) == [2]
    assert before.defect() is None
    # Nothing is lost: with room again the run goes on.
    again = train(tmp_path, data_flags, *how).check()
    assert [r["iteration"] for r in again.train_metrics()][-2:] == [5, 6]
    assert iterations(tmp_path) == [2, 4, 6]


@pytest.mark.parametrize("how", [pytest.param([], marks=pytest.mark.long), ASYNC], ids=HOW)
def test_run_goes_on_without_its_checkpoints_where_it_is_told_to(
    how: list[str], tmp_path: Path, data_flags: list[str]
) -> None:
    flags = [*how, "--on-save-error", "continue"]
    run = train(tmp_path, data_flags, *flags, limits=f"{TOO_SMALL},0").check()
    errors = [line for line in run.output[0].splitlines() if line.startswith("error: ")]
    assert len(errors) == 3
    assert "there is none before it. The run goes on." in errors[0]
    assert [r["iteration"] for r in run.train_metrics()] == [1, 2, 3, 4, 5, 6]
    assert iterations(tmp_path) == []


def test_place_that_rank_0_alone_cannot_use(tmp_path: Path, data_flags: list[str]) -> None:
    """As without permission, which tests that run as root always have."""
    (tmp_path / "checkpoints").mkdir(parents=True)
    (tmp_path / "checkpoints" / "iter_0000002").write_text("")
    run = train(tmp_path, data_flags)
    assert run.status == [1, 1], run.all_output
    assert not run.hung
    assert "could not be saved" in run.output[0]
    assert "File exists" in run.output[0]


@pytest.mark.parametrize("how", [pytest.param([], marks=pytest.mark.long), ASYNC], ids=HOW)
def test_old_checkpoints_are_deleted(how: list[str], tmp_path: Path, data_flags: list[str]) -> None:
    flags = [*how, "--save-interval", "1", "--keep-last", "2", "--keep-every", "3"]
    run = train(tmp_path, data_flags, *flags).check()
    assert iterations(tmp_path) == [3, 5, 6]
    assert "> deleting the checkpoints of iterations 4" in run.output[0]


def test_checkpoint_that_is_written_over_is_that_of_the_new_run(
    tmp_path: Path, data_flags: list[str]
) -> None:
    first = train(tmp_path, data_flags, "--seed", "1").check().checkpoint(4)
    again = train(tmp_path, data_flags, "--seed", "2", "--ckpt-step", "2").check()
    assert "> the checkpoint of iteration 4 is written over" in again.output[0]
    assert iterations(tmp_path) == [2, 4, 6]
    second = again.checkpoint(4)
    name = "output_layer.weight"
    assert not torch.equal(first[name], second[name])


def wait_for_a_writer_that_is_dead() -> None:
    from megatron_rw.resilience import writer

    dead = multiprocessing.get_context("fork").Process(target=os._exit, args=(9,))
    dead.start()
    dead.join()
    writer._schedule(lambda: time.sleep(60), {"self": SimpleNamespace(process=dead)})


def test_rank_ends_when_its_writer_dies_before_it_has_copied_anything() -> None:
    rank = multiprocessing.get_context("spawn").Process(target=wait_for_a_writer_that_is_dead)
    rank.start()
    rank.join(50)
    assert rank.exitcode == 1
