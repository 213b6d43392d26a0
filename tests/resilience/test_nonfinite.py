"""A sample or a gradient that is not finite, in every layout, under every policy.

In the third step of four one sample goes bad, as `bad_sample` says. What the run then does is
compared bit for bit with a run that never met it: Megatron's own `--iterations-to-skip`.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest

from tests.program import OVERLAP, PP2, TP2, Run, assert_same_bits, run_program, without_time
from tests.resilience import bad_sample

# Eight samples a step, so the bad one is in the third, of iterations 1 to 4.
STEPS, POSITION, ITERATION = 4, 19, 3
FLAGS = (
    f"--train-iters {STEPS} --micro-batch-size 2 --global-batch-size 8 --save-interval {STEPS} "
    "--lr-decay-style linear --reweight-strategy linupper"
).split()
# Processes and flags of a layout, and rank and micro-batch of the bad sample.
LAYOUTS = {
    "one process": (1, "", 0, 1),
    "DP2": (2, "", 1, 0),
    "TP2": (2, TP2, 0, 1),
    "PP2": (2, PP2, 1, 1),
}
# Checkpoints are reshardable, since otherwise the optimizer's buffers are saved with their padding,
# which is never written.
RESHARDABLE = "--dist-ckpt-optim-fully-reshardable"


def train(
    directory: Path,
    data_flags: list[str],
    flags: str = "",
    processes: int = 1,
    *,
    what: str | None = None,
    **bad: Any,
) -> Run:
    bad = {"position": POSITION, "iterations": [ITERATION], "what": what} | bad
    return run_program(
        directory,
        *data_flags,
        *FLAGS,
        *["--save", str(directory / "checkpoints")],
        *flags.split(),
        processes=processes,
        prepare=functools.partial(bad_sample.spoil, **bad),
        patience=30,
    )


def the_error(run: Run) -> str:
    """Returns the one line that rank 0 prints for all ranks, which have all left alike."""
    assert set(run.status) == {17}, run.all_output
    assert not run.hung
    lines = [line for text in run.output for line in text.splitlines() if "error: " in line]
    assert len(lines) == 1, run.all_output
    return lines[0]


def equal(run: Run, other: Run) -> None:
    """Asserts that the reported steps and the final checkpoints are the same, bit for bit."""
    records, others = (
        [
            {k: v for k, v in without_time(record).items() if k != "skipped_steps"}
            for record in one.check().train_metrics()
            if record.get("skipped_steps", 0) == 0
        ]
        for one in (run, other)
    )
    assert records == others
    assert_same_bits(run.checkpoint(STEPS), other.checkpoint(STEPS))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_raise_ends_all_ranks_and_names_the_sample(
    layout: str, tmp_path: Path, data_flags: list[str]
) -> None:
    processes, flags, rank, micro_batch = LAYOUTS[layout]
    error = the_error(train(tmp_path, data_flags, flags, processes, what="activations"))
    assert error.startswith(
        f"error: iteration {ITERATION}: the loss of 1 sample is not finite: rank {rank}, "
        f"micro-batch {micro_batch}: sample {POSITION} (no. "
    )
    assert "domain noise), loss nan." in error
    assert "_text_document" in error


def test_raise_names_the_gradient_and_its_rank(tmp_path: Path, data_flags: list[str]) -> None:
    error = the_error(train(tmp_path, data_flags, "", 2, what="gradient", rank=1))
    assert "a gradient is not finite, though every loss is: that of decoder.layers.1." in error
    assert error.count("on rank 1, samples 18; 19; 22; 23.") == 1


def test_megatrons_rerun_machine_decides_where_it_is_on(
    tmp_path: Path, data_flags: list[str]
) -> None:
    """It runs the step again, saves and leaves with its own status; we say what it found."""
    run = train(tmp_path, data_flags, "--rerun-mode validate_results", what="activations")
    assert run.status == [16], run.all_output
    assert "Need to rerun step to check reproducibility" in run.output[0]
    assert f"error: iteration {ITERATION}: the loss of 1 sample" in run.output[0]


@pytest.mark.parametrize(
    ("layout", "what", "flags"),
    [
        ("one process", "activations", ""),
        pytest.param(
            "DP2", "loss", f"{OVERLAP} {RESHARDABLE} --clip-grad 0", marks=pytest.mark.long
        ),
        pytest.param("TP2", "activations", "--reweight-scope global", marks=pytest.mark.long),
        pytest.param("PP2", "loss", "", marks=pytest.mark.long),
        ("DP2", "gradient", ""),
    ],
)
def test_skipped_step_is_one_that_megatron_skips(
    layout: str, what: str, flags: str, tmp_path: Path, data_flags: list[str]
) -> None:
    processes, parallel, _, _ = LAYOUTS[layout]
    flags = f"{parallel} {flags}"
    policy = f"{flags} --on-nonfinite skip-step --tensorboard-dir {tmp_path / 'tensorboard'}"
    run = train(tmp_path / "bad", data_flags, policy, processes, what=what, rank=1)
    skip = f"{flags} --iterations-to-skip {ITERATION}"
    equal(run, train(tmp_path / "skipped", data_flags, skip, processes))
    counts = [record["skipped_steps"] for record in run.train_metrics()]
    assert counts == [0, 0, 1, 0]
    assert f"WARNING: iteration {ITERATION}: the step is skipped: " in run.output[0]
    line = run.log_lines()[ITERATION - 1]
    assert "number of skipped iterations:   1" in line
    assert "loss" not in line.split("loss scale")[0]
    assert scalars(tmp_path / "tensorboard", "non-finite/skipped steps") == counts


def test_run_ends_after_too_many_skips_in_a_row(tmp_path: Path, data_flags: list[str]) -> None:
    flags = "--on-nonfinite skip-step --max-consecutive-skips 2"
    run = train(tmp_path, data_flags, flags, what="gradient", rank=0, iterations=[1, 2, 3])
    error = the_error(run)
    assert error.startswith("error: iteration 3: a gradient is not finite")
    assert error.endswith("for 3 iterations, more than --max-consecutive-skips 2.")
    assert [record["skipped_steps"] for record in run.train_metrics()] == [1, 1]


@pytest.mark.parametrize("what", [pytest.param("large", marks=pytest.mark.long), "activations"])
def test_spikes_are_written_and_change_nothing(
    what: str, tmp_path: Path, data_flags: list[str]
) -> None:
    """Found when the interval of logging ends, which is here the run."""
    flags = "--log-interval 10 --on-nonfinite skip-step"
    run = train(tmp_path / "a", data_flags, f"{flags} --loss-spike-factor 3", 2, what=what)
    equal(run, train(tmp_path / "b", data_flags, flags, 2, what=what))
    lines = (run.directory / "spikes.jsonl").read_text().splitlines()
    assert len(lines) == 1
    record = json.loads(lines[0])
    expected = {"iteration": ITERATION, "rank": 1, "micro_batch": 0, "position": POSITION}
    assert record.items() >= (expected | {"domain": "noise", "left_out": 0}).items()
    assert 3 < record["running_loss"] < 5
    if what == "large":
        assert 400 < record["loss"] < 410
        assert 50 < record["step_loss"] < 60
    else:
        assert record["loss"] is record["step_loss"] is None
    assert not (tmp_path / "b" / "spikes.jsonl").exists()


# The mean of these weights overflows in the first layer norm: the first loss is not a number.
BROKEN = (
    "--train-iters 2 --micro-batch-size 8 --normalization LayerNorm --init-method-std 1e38 "
    "--reweight-strategy linupper --no-check-for-nan-in-loss-and-grad"
).split()


def test_sample_without_a_finite_loss_weighs_nothing(tmp_path: Path, data_flags: list[str]) -> None:
    """Without Megatron's check it is counted, and training goes on."""
    run = run_program(tmp_path, *data_flags, *BROKEN).check()
    for record in run.train_metrics():
        assert record["reweight"]["nonfinite_samples"] == 8
        assert record["reweight"]["max_weight"] == 0
        assert record["lm_loss"] is None
    assert "| non-finite samples: 8.000000E+00 |" in run.log_lines()[0]


def scalars(folder: Path, tag: str) -> list[float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return [event.value for event in events.Scalars(tag)]
