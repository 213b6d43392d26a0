"""Mixture of experts: expert parallelism gives what data parallelism alone gives."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.parallel.test_layouts import assert_same_parameters, assert_same_steps
from tests.program import Run, run_program

STEPS = 3
EXPERTS = (
    "--num-experts 4 --moe-router-topk 2 --moe-token-dispatcher-type allgather "
    "--moe-router-load-balancing-type aux_loss"
).split()
# Deferred normalisation would scale an auxiliary loss with it.
SCOPES = {
    "global": "--reweight-scope global --moe-aux-loss-coeff 1e-2".split(),
    "deferred": "--reweight-scope deferred --moe-aux-loss-coeff 0".split(),
}
TRAIN = (
    f"--train-iters {STEPS} --micro-batch-size 4 --global-batch-size 16 --adam-eps 1e-2 "
    "--finetune --no-load-optim --no-load-rng --reweight-strategy linupper"
).split()


def train(directory: Path, flags: list[str]) -> Run:
    save = ["--save", str(directory / "checkpoints"), "--save-interval", str(STEPS)]
    return run_program(directory, *flags, *EXPERTS, *TRAIN, *save, processes=2).check()


@pytest.mark.parametrize("scope", ["global", pytest.param("deferred", marks=pytest.mark.long)])
def test_experts_over_two_ranks_give_the_same_as_on_each(
    scope: str, tmp_path: Path, data_flags: list[str]
) -> None:
    initial = str(tmp_path / "initial")
    first = ["--train-iters", "1", "--micro-batch-size", "8", "--no-save-optim"]
    save = ["--save", initial, "--save-interval", "1"]
    run_program(tmp_path / "init", *data_flags, *EXPERTS, *first, *save).check()

    flags = [*data_flags, "--load", initial, *SCOPES[scope]]
    together = train(tmp_path / "ep1", flags)
    apart = train(tmp_path / "ep2", [*flags, "--expert-model-parallel-size", "2"])
    assert len(apart.train_metrics()) == STEPS
    assert_same_steps(apart.train_metrics(), together.train_metrics())
    assert_same_parameters(apart.checkpoint(STEPS), together.checkpoint(STEPS))
    if scope == "global":
        assert "load_balancing_loss" in apart.log_lines()[0]
