"""Losses that the model adds itself keep exactly the gradient they have without reweighting.

Their gradient is what a run with them has more than the same run without them. It is taken once
without reweighting and once in each scope. The coefficients are far larger than anybody's, so that
the difference of two fp32 gradients is not all rounding.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from tests.exactness.test_program import dumped
from tests.program import run_program

TOLERANCE = 2e-6
MOE = (
    "--num-experts 4 --moe-router-topk 2 --moe-token-dispatcher-type allgather "
    "--moe-router-load-balancing-type aux_loss --expert-model-parallel-size 2"
).split()
MODEL = [*MOE, "--mtp-num-layers", "1"]
WITHOUT = ["--mtp-loss-scaling-factor", "0"]
WITH = "--mtp-loss-scaling-factor 2 --moe-aux-loss-coeff 5 --moe-z-loss-coeff 1".split()
COMMON = (
    "--train-iters 1 --micro-batch-size 4 --global-batch-size 16 --eod-mask-loss --clip-grad 0 "
    "--save-interval 1000 --save-wgrads-interval 1"
).split()
Gradient = dict[str, torch.Tensor]


def gradient(directory: Path, flags: list[str]) -> Gradient:
    """The first step's, of the rank that dumps."""
    save = ["--save", str(directory / "checkpoints")]
    run_program(directory, *flags, *COMMON, *save, processes=2).check()
    return {
        f"{rank} {name}": value
        for rank, gradients in dumped(directory, 1).items()
        for name, value in gradients.items()
    }


def added(directory: Path, flags: list[str]) -> Gradient:
    """The gradient of the other losses alone."""
    with_them = gradient(directory / "with", [*flags, *WITH])
    without = gradient(directory / "without", [*flags, *WITHOUT])
    return {name: with_them[name].double() - without[name].double() for name in without}


@pytest.mark.parametrize(
    "per_token", [False, pytest.param(True, marks=pytest.mark.long)], ids=["", "per-token"]
)
def test_other_losses_keep_their_gradient(
    per_token: bool, tmp_path: Path, data_flags: list[str]
) -> None:
    flags = [*data_flags, *MODEL, *(["--calculate-per-token-loss"] if per_token else [])]
    wanted = added(tmp_path / "none", flags)
    size = math.fsum(float(value.square().sum()) for value in wanted.values())
    assert size > 1e-4
    for scope in ("microbatch", "global"):
        reweighted = [*flags, "--reweight-strategy", "linupper", "--reweight-scope", scope]
        found = added(tmp_path / scope, reweighted)
        error = math.fsum(
            float((found[name] - value).square().sum()) for name, value in wanted.items()
        )
        print(f"{scope}, per token {per_token}: {math.sqrt(error / size):.1e}")
        assert math.sqrt(error / size) <= TOLERANCE, scope
