"""Checkpoints: resume is exact, and a checkpoint of one parallel layout resumes in another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.parallel.test_experts import EXPERTS
from tests.parallel.test_layouts import assert_same_steps
from tests.program import PP2, TP2, Run, assert_same_bits, kill_when, run_program, without_time

# Dropout, so that random-number state counts, and a warm-up that ends after the resume, so that
# the reweighting state does.
EXACT = (
    "--micro-batch-size 4 --global-batch-size 16 --hidden-dropout 0.1 --attention-dropout 0.1 "
    "--train-iters 20 --save-interval 10 --reweight-strategy linupper --reweight-temperature 0.4 "
    "--reweight-warmup-steps 15 --reweight-warmup-schedule linear"
).split()


def tracker(directory: Path) -> Path:
    return directory / "checkpoints" / "latest_checkpointed_iteration.txt"


def train(directory: Path, flags: list[str], processes: int, **how: Any) -> Run:
    checkpoints = str(directory / "checkpoints")
    return run_program(directory, *flags, "--save", checkpoints, processes=processes, **how)


# Its default format saves whole buffers, whose padding is never initialised.
DISTRIBUTED = "--use-distributed-optimizer --dist-ckpt-optim-fully-reshardable"


# The moments of the scope `deferred` outlive a step, so that a resume has to bring them back.
DEFERRED = " --reweight-scope deferred --reweight-moment-decay 0.5"


@pytest.mark.parametrize(
    "extra",
    ["", pytest.param(DISTRIBUTED + DEFERRED, marks=pytest.mark.long)],
    ids=["", "distributed-optimizer-deferred"],
)
def test_killed_at_ten_and_resumed_is_bitwise_the_uninterrupted_run(
    extra: str, tmp_path: Path, data_flags: list[str]
) -> None:
    flags = [*data_flags, *EXACT, *extra.split()]
    whole = train(tmp_path / "whole", flags, 2).check()

    killed = train(tmp_path / "cut", flags, 2, disturb=kill_when(tracker(tmp_path / "cut").exists))
    assert killed.status == [-9, -9]
    assert tracker(killed.directory).read_text() == "10"
    (killed.directory / "metrics.jsonl").unlink()
    resumed = train(
        killed.directory, [*flags, "--load", str(killed.directory / "checkpoints")], 2
    ).check()

    later = [r for r in whole.train_metrics() if r["iteration"] > 10]
    assert [r["iteration"] for r in later] == list(range(11, 21))
    resumed_records = [without_time(record) for record in resumed.train_metrics()]
    assert resumed_records == [without_time(record) for record in later]
    # The warm-up went on where it was: still falling after the resume, over at step 15.
    temperatures = [r["reweight"]["temperature"] for r in resumed.train_metrics()]
    assert temperatures[0] == pytest.approx(100 + 10 / 15 * (0.4 - 100))
    assert temperatures[-5:] == [0.4] * 5

    assert_same_bits(resumed.checkpoint(20), whole.checkpoint(20))


RESHARD = (
    "--micro-batch-size 8 --global-batch-size 16 --train-iters 6 --save-interval 3 "
    "--adam-eps 1e-2 --reweight-strategy linupper --reweight-warmup-steps 4"
).split()
LAYOUTS = {
    "tp1-pp1": (1, []),
    "tp2-pp2": (4, f"{TP2} {PP2}".split()),
    # The sets of samples that compete are of one size.
    "ep4": (4, [*EXPERTS, *"--expert-model-parallel-size 4 --micro-batch-size 4".split()]),
    "ep2": (2, [*EXPERTS, "--expert-model-parallel-size", "2"]),
}


@pytest.mark.parametrize(
    ("saved", "resumed", "distributed_optimizer"),
    [
        pytest.param("tp2-pp2", "tp1-pp1", False, marks=pytest.mark.long),
        ("tp2-pp2", "tp1-pp1", True),
        pytest.param("tp1-pp1", "tp2-pp2", False, marks=pytest.mark.long),
        pytest.param("tp1-pp1", "tp2-pp2", True, marks=pytest.mark.long),
        pytest.param("ep4", "ep2", False, marks=pytest.mark.long),
        ("ep4", "ep2", True),
    ],
)
def test_checkpoint_resumes_in_another_layout(
    saved: str, resumed: str, distributed_optimizer: bool, tmp_path: Path, data_flags: list[str]
) -> None:
    flags = [*data_flags, *RESHARD]
    if distributed_optimizer:
        flags += (DISTRIBUTED + DEFERRED).split()
    processes, layout = LAYOUTS[saved]
    whole = train(tmp_path / "whole", [*flags, *layout], processes).check()

    processes, layout = LAYOUTS[resumed]
    again = train(
        tmp_path / "again",
        [*flags, *layout, "--load", str(tmp_path / "whole" / "checkpoints"), "--ckpt-step", "3"],
        processes,
    ).check()
    assert [r["iteration"] for r in again.train_metrics()] == [4, 5, 6]
    assert_same_steps(again.train_metrics(), whole.train_metrics()[3:])


def test_state_of_one_optimizer_is_not_taken_for_that_of_two(
    tmp_path: Path, data_flags: list[str]
) -> None:
    flags = [*data_flags, *EXPERTS, *"--micro-batch-size 8 --save-interval 1".split()]
    train(tmp_path, [*flags, "--train-iters", "1"], 1).check()
    load = ["--load", str(tmp_path / "checkpoints"), "--train-iters", "1"]
    run = train(tmp_path / "two", [*flags, *load, "--expert-model-parallel-size", "2"], 2)
    assert 2 in run.status
    assert "with --expert-model-parallel-size 1, and this run has 2" in run.output[0]


def test_turning_reweighting_on_starts_its_warmup_and_says_so(
    tmp_path: Path, data_flags: list[str]
) -> None:
    common = [*data_flags, *"--micro-batch-size 8 --save-interval 2 --train-iters 6".split()]
    train(tmp_path, [*common, "--exit-interval", "2"], 1).check()
    load = ["--load", str(tmp_path / "checkpoints")]
    on = "--reweight-strategy extremes --reweight-warmup-steps 1 --exit-interval 4".split()
    run = train(tmp_path, [*common, *load, *on], 1).check()
    temperatures = [r["reweight"]["temperature"] for r in run.train_metrics() if "reweight" in r]
    assert temperatures == [100.0, 1.0]
    assert (
        "--reweight-strategy was none when the checkpoint was saved and is extremes now"
        in (run.output[0])
    )
    assert "reweighting begins with this run, its warm-up included" in run.output[0]

    off = train(tmp_path, [*common, *load], 1).check()
    assert (
        "--reweight-strategy was extremes when the checkpoint was saved and is none now"
        in (off.output[0])
    )


@pytest.mark.parametrize(
    "extra", ["", DISTRIBUTED, pytest.param(" ".join(EXPERTS), marks=pytest.mark.long)]
)
def test_a_run_goes_on_at_another_rate(extra: str, tmp_path: Path, data_flags: list[str]) -> None:
    flags = [*data_flags, *RESHARD, *extra.split(), "--lr", "1e-3", "--min-lr", "1e-3"]
    train(tmp_path, flags, 1).check()
    changed = "--lr 5e-4 --min-lr 5e-4 --train-iters 8 --override-opt_param-scheduler".split()
    load = ["--load", str(tmp_path / "checkpoints")]
    resumed = train(tmp_path, [*flags, *changed, *load], 1).check()
    rates = {r["iteration"]: r["learning_rate"] for r in resumed.train_metrics()}
    assert [rates[step] for step in (6, 7, 8)] == pytest.approx([1e-3, 5e-4, 5e-4])
