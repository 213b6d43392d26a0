"""`--cross-entropy-impl fused` in the real program trains as core's cross-entropy does.

The fused output layer, in every way but its other kernels, is in tests/integrations.
"""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from megatron.core.models.common.language_module.language_module import LanguageModule

from megatron_rw import patching
from megatron_rw.integrations import cross_entropy
from megatron_rw.kernels import sample_sums
from tests.program import run_program

# Multi-token prediction asks for losses of its own. The vocabulary needs padding.
FLAGS = (
    "--train-iters 5 --micro-batch-size 8 --global-batch-size 16 --tensor-model-parallel-size 2 "
    "--mtp-num-layers 1 --adam-eps 1e-2 --reweight-strategy linupper --reweight-temperature 0.4"
).split()


def test_fused_cross_entropy_trains_as_cores(tmp_path: Path, data_flags: list[str]) -> None:
    steps = {
        impl: run_program(
            tmp_path / impl, *data_flags, *FLAGS, "--cross-entropy-impl", impl, processes=2
        )
        .check()
        .train_metrics()
        for impl in ("megatron", "fused")
    }
    assert len(steps["fused"]) == 5
    for ours, cores in zip(steps["fused"], steps["megatron"], strict=True):
        # One computes log Σ exp − z, the other log(Σ exp) + max − z, in fp32.
        assert math.isclose(ours["lm_loss"], cores["lm_loss"], rel_tol=1e-6)
        assert math.isclose(ours["grad_norm"], cores["grad_norm"], rel_tol=1e-5)
        assert math.isclose(
            ours["reweight"]["objective"], cores["reweight"]["objective"], rel_tol=1e-5
        )
    # Another order of operations, and so not the same bits: the flag does something.
    assert steps["fused"][-1]["grad_norm"] != steps["megatron"][-1]["grad_norm"]


@pytest.mark.parametrize(
    ("fused", "name"),
    [
        pytest.param("--cross-entropy-impl fused", "triton", marks=pytest.mark.long),
        ("--cross-entropy-impl fused", "cuda"),
        ("--fused-linear-cross-entropy", "triton"),
        pytest.param("--fused-linear-cross-entropy", "cuda", marks=pytest.mark.long),
    ],
)
def test_other_kernels_train_as_torchs(
    fused: str, name: str, tmp_path: Path, data_flags: list[str]
) -> None:
    """Interpreted and emulated where there is no GPU."""
    flags = f"--train-iters 2 --micro-batch-size 2 --global-batch-size 8 {fused} "
    flags += "--reweight-strategy linupper --reweight-scope global --adam-eps 1e-2"
    steps = {
        kernels: run_program(
            tmp_path / kernels, *data_flags, *flags.split(), "--reweight-kernels", kernels
        )
        .check()
        .train_metrics()
        for kernels in ("torch", name)
    }
    assert len(steps[name]) == 2
    for ours, torchs in zip(steps[name], steps["torch"], strict=True):
        assert math.isclose(ours["lm_loss"], torchs["lm_loss"], rel_tol=1e-6)
        assert math.isclose(ours["grad_norm"], torchs["grad_norm"], rel_tol=1e-5)
        for key in ("objective", "ess", "max_weight"):
            assert math.isclose(ours["reweight"][key], torchs["reweight"][key], rel_tol=1e-5)


def test_sums_of_the_samples_ride_on_the_losses() -> None:
    module = SimpleNamespace(tp_group=None)
    labels, logits = torch.randint(0, 50, (3, 8)), torch.randn(8, 3, 50)
    mask = (torch.rand(3, 8) > 0.3).float()
    cores = LanguageModule.compute_language_model_loss
    with patching.applied(cross_entropy.patches()):
        plain = LanguageModule.compute_language_model_loss(module, labels, logits)
        cross_entropy.announce_mask(labels, mask)
        losses = LanguageModule.compute_language_model_loss(module, labels, logits)
    assert LanguageModule.compute_language_model_loss is cores
    assert torch.equal(losses, plain)
    # Not made again: a mask of zeros would give zeros.
    ridden = cross_entropy.sums_of(losses, torch.zeros_like(mask))
    for made, wanted in zip(ridden, sample_sums(plain, mask), strict=True):
        torch.testing.assert_close(made, wanted)
    assert cross_entropy.sums_of(plain, torch.zeros_like(mask)).loss_sum.eq(0).all()
