"""The same global batch in every layout: the single process's losses, weights and parameters.

Tolerances. Every layout sums the same fp32 numbers in another order, so a loss near 4 may differ
by an ulp or two (2.4e-7 each). The gradient norm: torch adds up a tensor's squares one after the
other in as many fp32 lanes as the processor has, which is good to 1e-6 at 1e5 elements, and layouts
cut the tensors; seen here: 1.3e-6 with AVX-512. Parameters: Adam divides
by the gradient's size and would blow rounding up where a gradient is nearly zero, and would hide a
wrong gradient scale; with --adam-eps far above the gradients the step is proportional to the
gradient, so rounding stays rounding and a wrong scale shows. Seen: at most 6e-8, one ulp at 1.0.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.program import OVERLAP, PP2, TP2, VPP2, Run, run_program

STEPS = 5
# Two sets of eight samples a step, whatever the data-parallel size.
SET_SIZE, BATCH = 8, 16
TOLERANCES = {"lm_loss": 5e-7, "grad_norm": 5e-6}
PARAMETER_TOLERANCE = 5e-7
# What a parameter moves by in the five steps; far above the tolerance, or the test has no teeth.
LEAST_MOVEMENT = 1e-3

# The scopes are told apart in tests/exactness; here they meet what only whole runs have: gathered
# parameters, interleaved stages and the optimizer.
SCOPES = {
    "microbatch": ["--reweight-scope", "microbatch"],
    "global": ["--reweight-scope", "global"],
    "deferred": ["--reweight-scope", "deferred", "--reweight-moment-decay", "0.5"],
}
RUNS = [
    pytest.param("microbatch", "tp2", marks=pytest.mark.long),
    pytest.param("microbatch", "pp2", marks=pytest.mark.long),
    ("microbatch", "tp2-pp2"),
    pytest.param("microbatch", "dp2", marks=pytest.mark.long),
    pytest.param("microbatch", "dp2-distopt", marks=pytest.mark.long),
    pytest.param("microbatch", "dp2-tp2-distopt-overlap", marks=pytest.mark.long),
    ("microbatch", "pp2-vpp2"),
    ("microbatch", "dp4-per-token"),
    ("global", "pp2-vpp2"),
    pytest.param("global", "dp2-tp2-distopt-overlap", marks=pytest.mark.long),
    ("global", "dp2-pp2-vpp2-overlap"),
    ("deferred", "dp2-tp2-distopt-overlap"),
    ("deferred", "dp2-pp2-vpp2-overlap"),
    ("microbatch", "tp2-fused"),
    pytest.param("deferred", "dp2-tp2-distopt-overlap-fused", marks=pytest.mark.long),
    pytest.param("global", "dp2-pp2-vpp2-overlap-fused", marks=pytest.mark.long),
]

COMMON = (
    f"--train-iters {STEPS} --global-batch-size {BATCH} --adam-eps 1e-2 "
    "--finetune --no-load-optim --no-load-rng "
    "--reweight-strategy linupper --reweight-temperature 0.4"
).split()

# Layout: processes, data-parallel size, flags.
LAYOUTS = {
    "tp2": (2, 1, TP2),
    "pp2": (2, 1, PP2),
    "tp2-pp2": (4, 1, f"{TP2} {PP2}"),
    "dp2": (2, 2, ""),
    "dp2-distopt": (2, 2, "--use-distributed-optimizer"),
    "dp2-tp2-distopt-overlap": (4, 2, f"{TP2} {OVERLAP}"),
    "pp2-vpp2": (2, 1, VPP2),
    "dp4-per-token": (4, 4, "--calculate-per-token-loss"),
    "dp2-pp2-vpp2-overlap": (4, 2, f"{VPP2} {OVERLAP}"),
}
# With the output layer and its loss in one operation; the single process has core's own.
FUSED = "--fused-linear-cross-entropy --logits-budget-mib 8"
LAYOUTS |= {
    f"{name}-fused": (processes, dp, f"{flags} {FUSED}")
    for name, (processes, dp, flags) in LAYOUTS.items()
}


def train(directory: Path, init: Path, flags: list[str], processes: int, dp: int) -> Run:
    return run_program(
        directory,
        *flags,
        *COMMON,
        *["--micro-batch-size", str(SET_SIZE // dp)],
        *["--load", str(init)],
        *["--save", str(directory / "checkpoints"), "--save-interval", str(STEPS)],
        processes=processes,
    ).check()


@pytest.fixture(scope="module")
def initial(tmp_path_factory: pytest.TempPathFactory, data_flags: list[str]) -> Run:
    """A checkpoint that every layout starts from: initialisation itself depends on the layout."""
    directory = tmp_path_factory.mktemp("init")
    save = ["--save", str(directory / "checkpoints"), "--save-interval", "1", "--no-save-optim"]
    return run_program(
        directory, *data_flags, "--train-iters", "1", "--micro-batch-size", "8", *save
    ).check()


@pytest.fixture(scope="module")
def singles(
    tmp_path_factory: pytest.TempPathFactory, data_flags: list[str], initial: Run
) -> dict[str, Run]:
    return {
        scope: train(
            tmp_path_factory.mktemp(scope),
            initial.directory / "checkpoints",
            [*data_flags, *flags],
            1,
            1,
        )
        for scope, flags in SCOPES.items()
    }


@pytest.mark.parametrize("scope", SCOPES)
def test_the_single_process_moves_its_parameters(
    scope: str, initial: Run, singles: dict[str, Run]
) -> None:
    before, after = initial.checkpoint(1), singles[scope].checkpoint(STEPS)
    for name in before:
        assert (after[name] - before[name]).abs().max() > LEAST_MOVEMENT, name


@pytest.mark.parametrize(("scope", "layout"), RUNS)
def test_layout_gives_the_single_process_result(
    scope: str,
    layout: str,
    tmp_path: Path,
    data_flags: list[str],
    initial: Run,
    singles: dict[str, Run],
) -> None:
    single = singles[scope]
    processes, dp, flags = LAYOUTS[layout]
    start = initial.directory / "checkpoints"
    run = train(tmp_path, start, [*data_flags, *SCOPES[scope], *flags.split()], processes, dp)

    steps = run.train_metrics()
    assert [step["iteration"] for step in steps] == list(range(1, STEPS + 1))
    assert_same_steps(steps, single.train_metrics())
    assert_same_parameters(run.checkpoint(STEPS), single.checkpoint(STEPS))


def assert_same_steps(mine: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    for step, other in zip(mine, theirs, strict=True):
        for name, tolerance in TOLERANCES.items():
            assert math.isclose(step[name], other[name], rel_tol=tolerance), name
        assert_close(step["reweight"], other["reweight"])


def assert_same_parameters(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    for name, tensor in theirs.items():
        # The distributed optimizer names its state otherwise; the parameters are what counts.
        if not name.startswith("optimizer."):
            torch.testing.assert_close(
                mine[name], tensor, rtol=0, atol=PARAMETER_TOLERANCE, msg=name
            )


def assert_close(mine: object, theirs: object) -> None:
    """Compare two metric records, number by number."""
    if isinstance(theirs, dict):
        assert isinstance(mine, dict)
        assert mine.keys() == theirs.keys()
        for key in theirs:
            assert_close(mine[key], theirs[key])
    elif isinstance(theirs, float):
        assert isinstance(mine, float)
        assert math.isclose(mine, theirs, rel_tol=5e-6, abs_tol=1e-7)
    else:
        assert mine == theirs
