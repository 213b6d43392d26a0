"""The logit scale at validation, from real runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.program import PP2, TP2, run_program

FLAGS = (
    "--train-iters 4 --micro-batch-size 4 --global-batch-size 8 --eval-interval 2 "
    "--full-validation --multiple-validation-sets --split 95,5,0 --eval-micro-batch-size 1 "
    "--log-logit-scale"
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
        found.append(records[1])
        assert records[1]["lm_loss_at_scale"] <= records[1]["lm_loss_at_one"]
        text = f"logit scale: {records[1]['logit_scale']:.6g} | lm loss at scale: "
        assert f" validation diagnostics at iteration 4 | {text}" in run.output[-1]
    for record in found[1:]:
        for name, value in found[0].items():
            if name.startswith(("logit", "lm_loss")):
                assert record[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
