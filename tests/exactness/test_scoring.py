"""The scoring pass of the scope `global` draws the random numbers of the training pass, no others.

Uniform weights make the objective the mean of sample losses, whatever the scope. The objective that
is logged comes from the scoring pass and the LM loss from the training pass; with dropout they
agree only if both passes dropped the same. A run in the scope `microbatch`, without a scoring pass,
has the same LM loss and gradient norm only if scoring left the random state as it was.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from tests.program import TP2, VPP2, run_program

FLAGS = (
    "--train-iters 4 --micro-batch-size 4 --global-batch-size 16 --hidden-dropout 0.2 "
    "--attention-dropout 0.2 --reweight-strategy uniform"
).split()
LAYOUTS = {"one": (1, ""), "tp2-pp2-vpp2": (4, f"{TP2} {VPP2}")}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_scoring_sees_the_training_passs_dropout(
    layout: str, tmp_path: Path, data_flags: list[str]
) -> None:
    processes, extra = LAYOUTS[layout]
    steps = {
        scope: run_program(
            tmp_path / scope,
            *data_flags,
            *FLAGS,
            *["--reweight-scope", scope],
            *extra.split(),
            processes=processes,
        )
        .check()
        .train_metrics()
        for scope in ("microbatch", "global")
    }
    assert len(steps["global"]) == 4
    for scored, plain in zip(steps["global"], steps["microbatch"], strict=True):
        assert math.isclose(scored["reweight"]["objective"], scored["lm_loss"], rel_tol=1e-6)
        assert math.isclose(scored["lm_loss"], plain["lm_loss"], rel_tol=1e-6)
        assert math.isclose(scored["grad_norm"], plain["grad_norm"], rel_tol=1e-5)
