"""A sample loss that is not finite stops the run, or weighs nothing and is counted: by choice."""

from __future__ import annotations

from pathlib import Path

from tests.program import run_program

# Weights whose mean overflows in the first layer norm: the first loss is not a number.
BROKEN = (
    "--train-iters 2 --micro-batch-size 8 --normalization LayerNorm --init-method-std 1e38 "
    "--reweight-strategy linupper"
).split()


def test_by_default_the_run_stops_and_says_where(tmp_path: Path, data_flags: list[str]) -> None:
    run = run_program(tmp_path, *data_flags, *BROKEN)
    assert run.status == [17]
    last = run.output[0].splitlines()[-1]
    assert last.startswith(
        "error: iteration 1: the loss of 8 samples is not finite: rank 0, micro-batch 0: sample 0 ("
    )


def test_without_the_check_it_weighs_nothing_and_is_counted(
    tmp_path: Path, data_flags: list[str]
) -> None:
    unchecked = "--no-check-for-nan-in-loss-and-grad"
    run = run_program(tmp_path, *data_flags, *BROKEN, unchecked).check()
    for record in run.train_metrics():
        assert record["reweight"]["nonfinite_samples"] == 8
        assert record["reweight"]["max_weight"] == 0
        assert record["lm_loss"] is None
    assert "| non-finite samples: 8.000000E+00 |" in run.log_lines()[0]
