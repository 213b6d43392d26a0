"""`--reweight-strategy none` is Megatron: same log lines, same parameters, bit for bit."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.program import Run, assert_same_bits, run_program

# Given to both programs, so that the arguments are the same ones.
CPU = (
    "--distributed-backend gloo --transformer-impl local --no-rope-fusion --no-one-logger "
    "--no-gradient-accumulation-fusion --no-masked-softmax-fusion --no-bias-gelu-fusion "
    "--no-bias-swiglu-fusion --no-bias-dropout-fusion --no-persist-layer-norm "
    "--use-cpu-initialization"
).split()
STEPS = 6
RUN = (
    f"--train-iters {STEPS} --micro-batch-size 4 --global-batch-size 16 --eval-interval 3 "
    f"--eval-iters 2 --save-interval {STEPS} --log-interval 2 --hidden-dropout 0.1 "
    "--attention-dropout 0.1 --eod-mask-loss"
).split()


def train(directory: Path, module: str, flags: list[str]) -> Run:
    save = ["--save", str(directory / "checkpoints")]
    return run_program(directory, *CPU, *RUN, *flags, *save, processes=2, module=module).check()


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory, data_flags: list[str]) -> Run:
    return train(tmp_path_factory.mktemp("ours"), "pretrain_gpt_rw", data_flags)


@pytest.mark.parametrize(
    "reference",
    [
        "tests.stock",
        pytest.param(
            "tests.nvidia",
            marks=pytest.mark.skipif(
                "MEGATRON_LM" not in os.environ,
                reason="set MEGATRON_LM to a Megatron-LM checkout of branch core_r0.19.0",
            ),
        ),
    ],
)
def test_none_is_the_reference(
    reference: str, tmp_path: Path, data_flags: list[str], ours: Run
) -> None:
    theirs = train(tmp_path, reference, data_flags)
    lines = ours.log_lines()
    # Steps 1, 2, 4, 6; evaluations at 3 and 6 and the two final ones.
    assert len(lines) == 8
    assert lines == theirs.log_lines()
    assert_same_bits(ours.checkpoint(STEPS), theirs.checkpoint(STEPS))


def test_domains_are_reported_without_touching_megatrons_lines(ours: Run) -> None:
    domains = {"easy", "noise"}
    train_records = ours.train_metrics()
    assert [record["iteration"] for record in train_records] == [1, 2, 4, 6]
    for record in train_records:
        assert record["domains"].keys() == domains
        # With equally long samples the blend's loss lies between its domains'.
        losses = [domain["lm_loss"] for domain in record["domains"].values()]
        assert min(losses) <= record["lm_loss"] <= max(losses)
    validations = [r for r in ours.metrics if r["type"] == "validation"]
    assert [record["iteration"] for record in validations] == [3, 6, 6]
    assert all(record["domains"].keys() == domains for record in validations)
    assert "validation loss by domain at iteration 3 | easy:" in ours.output[-1]
