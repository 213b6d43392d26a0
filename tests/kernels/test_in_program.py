"""Our cross-entropy in the real program trains as core's does, and by CUDA kernels as by torch's.

tests/integrations/test_output_layer.py compares the output layer within a budget with core's.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from tests.kernels import DEVICE, emulation
from tests.program import TP2, run_program

COMMON = "--reweight-strategy linupper --adam-eps 1e-2"


def trains_alike(
    directory: Path, flags: str, flag: str, values: tuple[str, str], **how: Any
) -> None:
    """Losses and gradients of runs that differ in one flag agree, step by step."""
    theirs, ours = (
        run_program(directory / value, *flags.split(), flag, value, **how).check().train_metrics()
        for value in values
    )
    assert ours
    for mine, other in zip(ours, theirs, strict=True):
        # One computes log Σ exp − z, the other log(Σ exp) + max − z, in fp32.
        assert math.isclose(mine["lm_loss"], other["lm_loss"], rel_tol=1e-6)
        assert math.isclose(mine["grad_norm"], other["grad_norm"], rel_tol=1e-5)
        for key in ("objective", "ess", "max_weight"):
            assert math.isclose(mine["reweight"][key], other["reweight"][key], rel_tol=1e-5)
    # Another order of operations, and so not the same bits in all steps: the flag does something.
    keys = ("lm_loss", "grad_norm")
    seen = [
        [[record[key] for key in keys] + list(record["reweight"].values()) for record in records]
        for records in (ours, theirs)
    ]
    assert seen[0] != seen[1]


def test_fused_cross_entropy_trains_as_cores(tmp_path: Path, data_flags: list[str]) -> None:
    # Multi-token prediction asks for losses of its own. The vocabulary needs padding.
    flags = "--micro-batch-size 8 --global-batch-size 16 --mtp-num-layers 1 --train-iters 5"
    flags = " ".join((COMMON, flags, TP2, "--reweight-temperature 0.4", *data_flags))
    trains_alike(tmp_path, flags, "--cross-entropy-impl", ("megatron", "fused"), processes=2)


@pytest.mark.parametrize(
    "fused",
    [
        "--cross-entropy-impl fused",
        pytest.param("--fused-linear-cross-entropy --logits-budget-mib 8", marks=pytest.mark.long),
    ],
)
def test_cuda_kernels_train_as_torchs(fused: str, tmp_path: Path, data_flags: list[str]) -> None:
    flags = f"--micro-batch-size 2 --global-batch-size 8 --train-iters 2 {fused}"
    flags = " ".join((COMMON, flags, "--reweight-scope global", *data_flags))
    prepare = emulation.install if DEVICE == "cpu" else None
    trains_alike(tmp_path, flags, "--reweight-kernels", ("torch", "cuda"), prepare=prepare)
