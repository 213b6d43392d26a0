"""Without Megatron's check, a sample loss that is not finite weighs nothing and is counted."""

from __future__ import annotations

from pathlib import Path

from tests.program import run_program

# The mean of these weights overflows in the first layer norm: the first loss is not a number.
BROKEN = (
    "--train-iters 2 --micro-batch-size 8 --normalization LayerNorm --init-method-std 1e38 "
    "--reweight-strategy linupper --no-check-for-nan-in-loss-and-grad"
).split()


def test_sample_without_a_finite_loss_weighs_nothing(tmp_path: Path, data_flags: list[str]) -> None:
    run = run_program(tmp_path, *data_flags, *BROKEN).check()
    for record in run.train_metrics():
        assert record["reweight"]["nonfinite_samples"] == 8
        assert record["reweight"]["max_weight"] == 0
        assert record["lm_loss"] is None
    assert "| non-finite samples: 8.000000E+00 |" in run.log_lines()[0]
