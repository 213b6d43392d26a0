"""Logit scale and progress of the validation samples, from real runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_rw.training.sample_progress import report_of
from tests.program import PP2, TP2, run_program

FLAGS = (
    "--train-iters 4 --micro-batch-size 4 --global-batch-size 8 --eval-interval 2 "
    "--full-validation --multiple-validation-sets --split 95,5,0 --eval-micro-batch-size 1 "
    "--log-logit-scale --log-validation-progress"
).split()


def test_every_layout_reports_the_same(tmp_path: Path, data_flags: list[str]) -> None:
    found = []
    # Megatron validates in full only without weights.
    data_flags = [flag for flag in data_flags if flag != "0.5"]
    # Layouts begin with other parameters.
    save = ["--save", str(tmp_path / "checkpoints"), "--save-interval", "30", "--no-save-optim"]
    steps = "--train-iters 30 --micro-batch-size 8".split()
    run_program(tmp_path / "init", *data_flags, *steps, *save).check()
    load = ["--load", save[1], *"--finetune --no-load-optim --no-load-rng".split()]
    for name, replicas, flags in (
        ("dp2", 2, ""),
        ("tp2", 1, TP2),
        ("pp2", 1, f"{PP2} --fused-linear-cross-entropy --logits-budget-mib 8"),
    ):
        run = run_program(
            tmp_path / name,
            *(
                *data_flags,
                *FLAGS,
                *load,
                *flags.split(),
                "--eval-global-batch-size",
                str(replicas),
            ),
            *("--tensorboard-dir", str(tmp_path / name / "board")),
            processes=2,
        ).check()
        records = [record for record in run.metrics if record["type"] == "validation"]
        assert "progress_samples" not in records[0]
        found.append(records[1])
        assert records[1]["lm_loss_at_scale"] <= records[1]["lm_loss_at_one"]
        # All of the validation data.
        assert records[1]["progress_samples"] == 48
        # A decile of the earlier losses each, of the same samples.
        fall = records[0]["lm_loss"] - records[1]["lm_loss"]
        assert np.mean(records[1]["progress_by_decile"]) == pytest.approx(fall, abs=0.02)
        text = f"logit scale: {records[1]['logit_scale']:.6g} | lm loss at scale: "
        assert f" validation diagnostics at iteration 4 | {text}" in run.output[-1]
        assert all("progress_samples" not in r for r in run.metrics if r["type"] == "test")
    for record in found[1:]:
        for name, value in found[0].items():
            if name.startswith(("logit", "progress", "lm_loss")):
                assert record[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name


def test_report_is_the_one_computed_by_hand() -> None:
    earlier = np.arange(20, dtype=np.float64)[::-1]
    progress = -np.square(earlier - 10)
    report = report_of(earlier, earlier - progress)
    assert report.samples == 20
    assert report.correlation == pytest.approx(np.corrcoef(earlier, progress)[0, 1])
    assert report.by_decile[:2] == [-90.5, -56.5]
