"""Losses that the model adds itself keep exactly the gradient they have without reweighting.

Their gradient is what a run with them has more than the same run without them. It is taken once
without reweighting and once in each scope. The coefficients are far larger than anybody's, so that
the difference of two fp32 gradients is not all rounding.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.exactness.test_program import GRADIENTS, Gradient, gradient, norm, relative_error
from tests.program import run_program

TOLERANCE = 2e-6
MOE = (
    "--num-experts 4 --moe-router-topk 2 --moe-token-dispatcher-type allgather "
    "--moe-router-load-balancing-type aux_loss --expert-model-parallel-size 2"
).split()
MODEL = [*MOE, "--mtp-num-layers", "1"]
WITHOUT = ["--mtp-loss-scaling-factor", "0"]
WITH = "--mtp-loss-scaling-factor 2 --moe-aux-loss-coeff 5 --moe-z-loss-coeff 1".split()
COMMON = "--train-iters 1 --micro-batch-size 4 --global-batch-size 16 --eod-mask-loss".split()


def added(directory: Path, flags: list[str]) -> Gradient:
    """The first step's gradient of the other losses alone."""
    with_them, without = (
        gradient(
            run_program(
                directory / name,
                *(*flags, *COMMON, *GRADIENTS, *coefficients, "--clip-grad", "0"),
                *("--save", str(directory / name / "checkpoints")),
                processes=2,
            ).check(),
            step=1,
        )
        for name, coefficients in (("with", WITH), ("without", WITHOUT))
    )
    return {name: with_them[name] - without[name] for name in without}


@pytest.mark.parametrize(
    "per_token", [False, pytest.param(True, marks=pytest.mark.long)], ids=["", "per-token"]
)
def test_other_losses_keep_their_gradient(
    per_token: bool, tmp_path: Path, data_flags: list[str]
) -> None:
    flags = [*data_flags, *MODEL, *(["--calculate-per-token-loss"] if per_token else [])]
    wanted = added(tmp_path / "none", flags)
    assert norm(wanted) > 1e-2
    for scope in ("microbatch", "global"):
        reweighted = [*flags, "--reweight-strategy", "linupper", "--reweight-scope", scope]
        error = relative_error(added(tmp_path / scope, reweighted), wanted)
        print(f"{scope}, per token {per_token}: {error:.1e}")
        assert error <= TOLERANCE, scope
