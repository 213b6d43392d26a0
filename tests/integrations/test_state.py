"""The reweighting state that rides in a checkpoint's argument record."""

from __future__ import annotations

from argparse import Namespace

import pytest
import torch

from megatron_rw.errors import UserError
from megatron_rw.integrations.state import ReweightState
from megatron_rw.reweighting import ReweightConfig

LINUPPER = ReweightConfig(strategy="linupper", warmup_steps=10)


def saved_by(config: ReweightConfig, first_iteration: int) -> Namespace:
    args = Namespace()
    state = ReweightState(config)
    state.begin(first_iteration)
    state.keep_in(args)
    return args


def test_steps_count_from_the_first_training_step() -> None:
    state = ReweightState(LINUPPER)
    assert state.step(0) == 0
    state.begin(100)
    state.begin(101)
    assert state.step(100) == 0
    assert state.step(107) == 7


def test_resume_goes_on_counting_and_says_nothing() -> None:
    state = ReweightState(LINUPPER)
    assert state.resume(saved_by(LINUPPER, 5)) == []
    state.begin(20)
    assert state.step(20) == 15


def test_state_is_saved_with_the_arguments() -> None:
    args = Namespace()
    state = ReweightState(LINUPPER)
    state.begin(3)
    state.plan = torch.tensor([1.5, 4.25, 1.0, 0.0, 0.0], dtype=torch.float64)
    state.keep_in(args)
    assert args.reweight_state["first_iteration"] == 3
    assert args.reweight_state["moments"] == [1.5, 4.25, 1.0, 0.0, 0.0]
    assert args.reweight_state["settings"]["warmup_steps"] == 10
    resumed = ReweightState(LINUPPER)
    resumed.load(args.reweight_state)
    assert resumed.record() == state.record()


def test_changed_settings_are_named() -> None:
    state = ReweightState(ReweightConfig(strategy="extremes", warmup_steps=10))
    assert state.resume(saved_by(LINUPPER, 0)) == [
        "--reweight-strategy was linupper when the checkpoint was saved and is extremes now"
    ]


def test_checkpoint_of_plain_megatron_starts_the_warmup() -> None:
    state = ReweightState(LINUPPER)
    lines = state.resume(Namespace())
    assert lines[-1] == "reweighting begins with this run, its warm-up included"
    state.begin(40)
    assert state.step(41) == 1


def test_turning_reweighting_off_is_said() -> None:
    state = ReweightState(ReweightConfig())
    lines = state.resume(saved_by(LINUPPER, 0))
    assert (
        lines[0] == "--reweight-strategy was linupper when the checkpoint was saved and is none now"
    )
    assert ReweightState(ReweightConfig()).resume(Namespace()) == []


def test_deferred_run_from_a_checkpoint_without_moments_says_so() -> None:
    state = ReweightState(ReweightConfig(strategy="linupper", scope="deferred"))
    lines = state.resume(saved_by(ReweightConfig(strategy="linupper"), 5))
    assert lines == [
        "--reweight-scope was microbatch when the checkpoint was saved and is deferred now",
        "the checkpoint has no range of signals: the first step weighs all alike",
    ]


def test_state_of_another_version_is_refused() -> None:
    state = ReweightState(LINUPPER)
    with pytest.raises(UserError, match="saved by another version"):
        state.load({"first_iteration": 3})
