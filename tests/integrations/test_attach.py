"""`attach` round a forward step that is not ours: under `megatron.training.pretrain`, and alone."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_rw.errors import UserError
from megatron_rw.integrations import attach, bound_loss_mask
from megatron_rw.reweighting import ReweightConfig
from tests.parallel.test_none_is_megatron import CPU
from tests.program import Run, assert_same_bits, run_program

STEPS = 6
RUN = (
    f"--train-iters {STEPS} --micro-batch-size 4 --global-batch-size 16 --eval-interval 3 "
    "--eval-iters 2 --save-interval 3 --hidden-dropout 0.1 --attention-dropout 0.1 --eod-mask-loss"
).split()
OURS = (
    "--reweight-strategy linupper --reweight-temperature 0.4 --reweight-scope global "
    "--reweight-warmup-steps 4"
).split()


def train(directory: Path, module: str, flags: list[str], *load: str) -> Run:
    flags = [*CPU, *RUN, *flags, "--save", str(directory / "checkpoints"), *load]
    return run_program(directory, *flags, processes=2, module=module).check()


def own_values(line: str) -> dict[str, str]:
    parts = (part.split(":", 1) for part in line.split("|") if ":" in part)
    values = {name.strip(): value.strip() for name, value in parts}
    return {name: value for name, value in values.items() if name in ("lm loss", "grad norm")}


def test_attached_script_trains_as_the_program_does(tmp_path: Path, data_flags: list[str]) -> None:
    program = train(tmp_path / "program", "pretrain_gpt_rw", [*data_flags, *OURS])
    attached = train(tmp_path / "attached", "tests.attached", data_flags)
    mine, theirs = ([own_values(line) for line in run.log_lines()] for run in (attached, program))
    assert len(mine) > STEPS
    assert mine == theirs
    assert_same_bits(attached.checkpoint(STEPS), program.checkpoint(STEPS))

    # The warm-up ends after the resume: without the state it would begin anew.
    load = ["--load", str(tmp_path / "attached" / "checkpoints"), "--ckpt-step", "3"]
    resumed = train(tmp_path / "resumed", "tests.attached", data_flags, *load)
    assert "when the checkpoint was saved" not in resumed.output[0]
    assert_same_bits(resumed.checkpoint(STEPS), program.checkpoint(STEPS))


def test_strategy_none_is_refused() -> None:
    with pytest.raises(UserError, match="strategy none does nothing"):
        attach(lambda *_: (None, lambda _: None), ReweightConfig())


def test_training_outside_the_wrapped_schedules_is_an_error() -> None:
    losses = torch.ones(2, 3, requires_grad=True)
    step = attach(
        lambda *_: (losses, functools.partial(token_mean, torch.ones(2, 3))),
        ReweightConfig(strategy="linupper"),
    )
    output, loss = step(None, None)
    with pytest.raises(RuntimeError, match="would be unweighted"):
        loss(output)
    with torch.no_grad():
        assert loss(output)[0].item() == 6


def token_mean(loss_mask: torch.Tensor, output: torch.Tensor) -> Any:
    return (output * loss_mask).sum(), loss_mask.sum().int(), {}


def test_mask_is_found_where_megatrons_scripts_bind_it() -> None:
    mask = torch.ones(2, 3)
    assert bound_loss_mask(functools.partial(token_mean, mask)) is mask
    assert bound_loss_mask(functools.partial(token_mean, loss_mask=mask)) is mask
    with pytest.raises(UserError, match="no bound argument loss_mask"):
        bound_loss_mask(lambda output: output)
