"""The real program's gradients, as Adam's state in its checkpoints has them, against the oracle's.

Two micro-batches a step and ragged masks (EOD tokens do not count). Tolerance 1e-6 of the norm of
the whole gradient: a transformer in fp32 against itself in fp64.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from tests.program import PP2, TP2, Run, run_program

Gradient = dict[str, torch.Tensor]
STEPS = 2
TOLERANCE = 1e-6
# Adam's first moment is then the gradient of the last step, of every parameter as a whole.
GRADIENTS = "--adam-beta1 0 --save-interval 1 --dist-ckpt-optim-fully-reshardable".split()
# The parameters stay as they are, so that one oracle serves every layout at every step.
FLAGS = (
    f"--train-iters {STEPS} --global-batch-size 16 --eod-mask-loss --lr 1e-30 --clip-grad 1e3 "
    "--finetune --no-load-optim --no-load-rng "
    "--reweight-strategy linupper --reweight-temperature 0.4"
).split()
SCOPES = (
    pytest.param("microbatch", marks=pytest.mark.long),
    pytest.param("global", marks=pytest.mark.long),
    "deferred",
)
# Processes, micro-batch size and flags. The scope global scores with our cross-entropy in any case.
LAYOUTS = {
    "one": (1, 8, ""),
    "tp2-pp2": (4, 8, f"{TP2} {PP2} --cross-entropy-impl fused"),
    "dp2-tp2-distopt": (4, 4, f"{TP2} --use-distributed-optimizer"),
}


def gradient(run: Run, step: int) -> Gradient:
    """That of a step, of every parameter."""
    state = run.checkpoint(step)
    names = [name for name in state if not name.startswith("optimizer.")]
    return {name: state[f"optimizer.state.exp_avg.{name}"].double() for name in names}


def norm(gradient: Gradient) -> float:
    return math.sqrt(math.fsum(float(part.square().sum()) for part in gradient.values()))


def relative_error(found: Gradient, wanted: Gradient) -> float:
    """Of the norm of the whole gradient."""
    assert found.keys() == wanted.keys()
    return norm({name: found[name] - wanted[name] for name in wanted}) / norm(wanted)


@pytest.fixture(scope="module")
def init(tmp_path_factory: pytest.TempPathFactory, data_flags: list[str]) -> Path:
    # Trained a little, so that sample losses differ. Among equal losses the weights are
    # differences of nearly equal numbers, and their rounding is all that would be measured.
    directory = tmp_path_factory.mktemp("init")
    save = ["--save", str(directory / "checkpoints"), "--save-interval", "30", "--no-save-optim"]
    flags = [*data_flags, "--train-iters", "30", "--micro-batch-size", "8"]
    return run_program(directory, *flags, *save).check().directory / "checkpoints"


@pytest.mark.parametrize("scope", SCOPES)
def test_gradients_of_the_program_are_the_oracles(
    scope: str, tmp_path: Path, data_flags: list[str], init: Path
) -> None:
    def run(name: str, layout: str, module: str = "pretrain_gpt_rw") -> Run:
        processes, micro_batch_size, extra = LAYOUTS[layout]
        return run_program(
            tmp_path / name,
            *(*data_flags, *FLAGS, *GRADIENTS, *extra.split()),
            *("--micro-batch-size", str(micro_batch_size), "--reweight-scope", scope),
            *("--load", str(init), "--save", str(tmp_path / name / "checkpoints")),
            processes=processes,
            module=module,
        ).check()

    oracle = run("oracle", "one", "tests.exactness.program_with_oracle")
    for layout in LAYOUTS:
        found = run(layout, layout)
        records = zip(found.train_metrics(), oracle.train_metrics(), strict=True)
        for step, (record, wanted) in enumerate(records, start=1):
            error = relative_error(gradient(found, step), gradient(oracle, step))
            print(f"{scope}, {layout}, step {step}: {error:.1e}")
            assert error <= TOLERANCE
            # What clipping goes by is the norm of the normalised gradient.
            assert math.isclose(record["grad_norm"], wanted["grad_norm"], rel_tol=TOLERANCE)
