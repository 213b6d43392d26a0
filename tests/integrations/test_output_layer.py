"""`--fused-linear-cross-entropy`: the real program trains as with core's output layer and loss."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megatron_rw.errors import UserError
from megatron_rw.integrations import cross_entropy
from megatron_rw.integrations.output_layer import FusedOutputLayer
from tests import program
from tests.program import Run, run_program
from tests.ranks import run_ranks

FITS = "--fused-linear-cross-entropy --logits-budget-mib 8"
# A vocabulary, of which a third fits.
LARGE = "--make-vocab-size-divisible-by 4096"
CUT = "--fused-linear-cross-entropy --logits-budget-mib 6"
FLAGS = (
    "--train-iters 4 --micro-batch-size 8 --global-batch-size 16 --adam-eps 1e-2 --eval-interval 2 "
    "--reweight-strategy linupper --reweight-temperature 0.4"
).split()
TWO_ULPS = 2.4e-7  # of a loss

# Processes, flags, and flags of the fused run alone.
CASES = {
    "embedding shared": (1, "", FITS),
    "embedding shared, TP2": (2, program.TP2, FITS),
    "embedding shared, PP2": (2, program.PP2, FITS),
    "splits": (1, LARGE, CUT),
    "global": (1, f"{LARGE} --reweight-scope global", CUT),
    "multi-token prediction": (1, "--mtp-num-layers 1", f"{FITS} --cross-entropy-impl fused"),
    "scaled logits": (1, "--use-mup --mup-base-hidden-size 16 --mup-output-mult 0.5", FITS),
}


def train(directory: Path, flags: list[str], processes: int) -> Run:
    return run_program(directory, *flags, processes=processes).check()


@pytest.mark.parametrize("case", CASES)
def test_it_trains_as_cores_output_layer(
    case: str, tmp_path: Path, data_flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    processes, flags, extra = CASES[case]
    if case.startswith("embedding shared"):
        model = [flag for flag in program.MODEL if not flag.startswith("--untie")]
        monkeypatch.setattr(program, "MODEL", model)
    common = [*data_flags, *FLAGS, *flags.split()]
    cores = train(tmp_path / "core", common, processes)
    ours = train(tmp_path / "fused", [*common, *extra.split()], processes)
    lines = [line for line in ours.output[0].splitlines() if line.startswith("> output layer")]
    assert len(lines) == 1
    assert ("in 3 split(s) of at most 1408 columns" in lines[0]) == (extra == CUT)
    notice = "as all fit, --cross-entropy-impl fused alone takes one matrix product fewer"
    assert (notice in lines[0]) == (extra != CUT)
    for mine, theirs in zip(ours.train_metrics(), cores.train_metrics(), strict=True):
        assert math.isclose(mine["lm_loss"], theirs["lm_loss"], rel_tol=1e-6)
        # torch's fp32 norm of a matrix of 4096 rows is itself good to 1e-4 on the CPU.
        norm_tolerance = 1e-4 if extra == CUT else 1e-5
        assert math.isclose(mine["grad_norm"], theirs["grad_norm"], rel_tol=norm_tolerance)
        # Weights depend on losses in units of temperature times spread, which an ulp of a loss is
        # up to 2e-5 of at the first step.
        weighing = theirs["reweight"]
        spread = weighing["sample_loss_max"] - weighing["sample_loss_min"]
        tolerance = TWO_ULPS * theirs["lm_loss"] / (weighing["temperature"] * spread)
        for key in ("objective", "ess", "max_weight"):
            assert math.isclose(mine["reweight"][key], weighing[key], rel_tol=tolerance), key
    validations = [
        [record["lm_loss"] for record in run.metrics if record["type"] == "validation"]
        for run in (ours, cores)
    ]
    # Two, and one more at the end.
    assert len(validations[0]) == 3
    assert validations[0] == pytest.approx(validations[1], rel=1e-6)
    # Another order of operations, and so not the same bits: the flag does something.
    numbers = [
        [(step["lm_loss"], step["grad_norm"], step["reweight"]) for step in run.train_metrics()]
        for run in (ours, cores)
    ]
    assert numbers[0] != numbers[1]


def test_checkpoints_are_those_of_an_ordinary_run(tmp_path: Path, data_flags: list[str]) -> None:
    save = ["--save", str(tmp_path / "a" / "checkpoints"), "--save-interval", "2"]
    fits = FITS.split()
    begun = train(tmp_path / "a", [*data_flags, *FLAGS, *fits, *save, "--exit-interval", "2"], 1)
    plain = train(tmp_path / "b", [*data_flags, *FLAGS, "--load", save[1]], 1)
    fused = train(tmp_path / "c", [*data_flags, *FLAGS, *fits, "--load", save[1]], 1)
    assert len(begun.train_metrics()) == 2
    assert [record["iteration"] for record in plain.train_metrics()] == [3, 4]
    for mine, theirs in zip(fused.train_metrics(), plain.train_metrics(), strict=True):
        assert math.isclose(mine["lm_loss"], theirs["lm_loss"], rel_tol=1e-6)


@pytest.mark.long
@pytest.mark.parametrize("processes", [1, 2], ids=["", "TP2"])
def test_fifty_steps_of_the_quick_starts_model(
    processes: int, tmp_path: Path, data_flags: list[str]
) -> None:
    """Rounding that differs grows from step to step, as it does between any two layouts."""
    shape = Path(program.__file__).parents[1] / "examples" / "small.args"
    flags = [
        *(f"@{shape}", *data_flags, "--vocab-size", "2047"),
        *"--train-iters 50 --micro-batch-size 4 --global-batch-size 4 --log-interval 1".split(),
        *"--reweight-strategy linupper --eval-interval 1000 --eval-iters 1".split(),
        *("--tensor-model-parallel-size", str(processes)),
    ]
    losses = [
        [record["lm_loss"] for record in train(tmp_path / name, run, processes).train_metrics()]
        for name, run in (("core", flags), ("fused", [*flags, *FITS.split()]))
    ]
    assert len(losses[0]) == 50
    assert losses[0][-1] < losses[0][0] - 2
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[1][:10] == pytest.approx(losses[0][:10], rel=2e-6)


def layer() -> ColumnParallelLinear:
    config = TransformerConfig(
        num_layers=1,
        hidden_size=16,
        num_attention_heads=1,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
    )
    return ColumnParallelLinear(
        16, 40, config=config, init_method=torch.nn.init.normal_, bias=False
    )


def call(made: Any, labels: Tensor | None, hidden: Tensor) -> Tensor:
    return FusedOutputLayer(8 << 20)(
        hidden_states=hidden,
        output_layer=made,
        output_weight=None,
        labels=labels,
        scale_logits=lambda logits: logits * 0.5,
        config=None,
    )


def processor_on_rank() -> dict[str, Any]:
    assert parallel_state.get_tensor_model_parallel_world_size() == 1
    made = layer()
    hidden = torch.randn(6, 2, 16)
    labels = torch.randint(0, 40, (2, 6))
    mask = (torch.rand(2, 6) > 0.3).float()
    seen: list[str] = []
    made.register_forward_pre_hook(lambda *_: seen.append("before"))
    logits = call(made, None, hidden)
    plain = call(made, labels, hidden)
    cross_entropy.announce_mask(labels, mask)
    losses = call(made, labels, hidden)
    sums = cross_entropy.sums_of(losses, torch.zeros_like(mask))
    refusal = ""
    try:
        call(torch.nn.Linear(16, 40), labels, hidden)
    except UserError as error:
        refusal = str(error)
    again, _ = made(hidden)
    return {
        "logits": logits.detach(),
        "losses": losses.detach(),
        "plain": plain.detach(),
        "wanted": torch.nn.functional.cross_entropy(
            (hidden @ made.weight.T * 0.5).permute(1, 2, 0), labels, reduction="none"
        ).detach(),
        "sums": sums.loss_sum.detach(),
        "mask": mask,
        "hooks": seen,
        "refusal": refusal,
        "unchanged": bool(torch.equal(again, hidden @ made.weight.T)),
    }


def test_output_processor_keeps_what_a_module_does() -> None:
    [found] = run_ranks(1, processor_on_rank)
    assert found["logits"].shape == (2, 6, 40)
    torch.testing.assert_close(found["losses"], found["wanted"])
    assert torch.equal(found["losses"], found["plain"])
    # Made with the losses, not again with the other mask.
    torch.testing.assert_close(found["sums"], (found["wanted"] * found["mask"]).sum(dim=1))
    # Once a call: core waits in such a hook for parameters that are still on their way.
    assert found["hooks"] == ["before"] * 4
    assert found["unchanged"]
    assert "the output layer is a Linear, which has matrix products of its own" in found["refusal"]
