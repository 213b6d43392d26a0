"""Settings: every impossible one is refused with its flag, and the temperature schedule."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_rw.errors import UserError
from megatron_rw.reweighting import ReweightConfig, weighting_at
from megatron_rw.reweighting.config import WARMUP_TEMPERATURE

ABOVE = r"--reweight-temperature .*: give a finite number above 1e-06"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strategy": "upper"}, r"--reweight-strategy upper: choose one of none, uniform"),
        (
            {"strategy": "linupper", "scope": "batch"},
            r"--reweight-scope batch: choose one of",
        ),
        (
            {"strategy": "linupper", "delta": 0.0},
            r"--reweight-delta 0.0: give a finite",
        ),
        (
            {"strategy": "linupper", "temperature": -1.0},
            ABOVE,
        ),
        (
            {"strategy": "linupper", "temperature": math.nan},
            ABOVE,
        ),
        (
            {"strategy": "linupper", "temperature": math.inf},
            ABOVE,
        ),
        (
            {"strategy": "linupper", "warmup_steps": -1},
            r"--reweight-warmup-steps -1: give 0",
        ),
        ({"strategy": "linupper", "log_samples": -1}, r"--reweight-log-samples -1: give 0"),
        ({"strategy": "linupper", "warmup_schedule": "cosine"}, r"set --reweight-warmup-steps"),
        ({"temperature": 0.4}, r"--reweight-temperature without a strategy does nothing"),
        ({"strategy": "linupper", "temperature": 1e-300}, r"--reweight-temperature 1e-300: give"),
        (
            {"strategy": "topk"},
            r"topk and --reweight-top-share, the share",
        ),
        ({"strategy": "linupper", "top_share": 0.5}, r"need each other"),
        ({"strategy": "topk", "top_share": 0.0}, r"--reweight-top-share 0.0: give a fraction"),
        ({"strategy": "topk", "top_share": 0.5, "target_ess": 0.9}, r"nothing beside .* topk"),
        ({"strategy": "topk", "top_share": 0.5, "temperature": 0.4}, r"nothing beside .* topk"),
        (
            {
                "strategy": "topk",
                "top_share": 0.5,
                "scope": "deferred",
                "signal": "progress",
                "snapshot_interval": 9,
            },
            r"--reweight-scope deferred: progress is 0",
        ),
        ({"strategy": "softmax", "delta": 2.0}, r"nothing beside --reweight-strategy softmax"),
        (
            {
                "strategy": "linupper",
                "signal": "learnability",
                "reference_scores": ["a", "a"],
            },
            r"the early and the late proxy are the same folder",
        ),
        ({"strategy": "uniform", "signal": "entropy"}, r"--reweight-signal entropy: it does noth"),
        ({"strategy": "softmax", "target_ess": 0.8, "temperature": 2.0}, r"--reweight-temperature"),
        ({"strategy": "linupper", "max_weight": 0.5}, r"--reweight-max-weight 0.5: give a finite"),
        ({"strategy": "linupper", "signal": "excess"}, r"excess takes --reweight-reference-load C"),
        (
            {"strategy": "linupper", "reference_load": "a"},
            r"--reweight-signal loss takes no reference",
        ),
        (
            {"strategy": "linupper", "signal": "learnability", "reference_scores": ["a"]},
            r"learnability takes --reweight-reference-scores EARLY LATE",
        ),
        ({"strategy": "linupper", "signal": "progress"}, r"takes --reweight-snapshot-interval"),
        ({"strategy": "linupper", "until": "later"}, r"--reweight-until later: give an iteration"),
        (
            {"strategy": "linupper", "control": "random-drop"},
            r"what --reweight-strategy topk",
        ),
        (
            {"strategy": "linupper", "control": "permute", "unit": "token"},
            r"--reweight-control permute: it needs the whole set in one place",
        ),
        (
            {"strategy": "linupper", "unit": "token", "temperature": 0.01},
            r"--reweight-temperature 0.01: it is too low",
        ),
        (
            {"strategy": "linupper", "moment_decay": 0.5},
            r"--reweight-moment-decay 0.5: it does",
        ),
        ({"warmup_steps": 5, "delta": 2.0}, r"--reweight-delta, --reweight-warmup-steps without"),
    ],
)
def test_refusals_name_the_flag(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ReweightConfig(**settings)


def test_step_schedule_is_the_authors() -> None:
    config = ReweightConfig(strategy="linupper", temperature=0.4, warmup_steps=3)
    temperatures = [weighting_at(config, step).temperature for step in range(5)]
    assert temperatures == [100.0, 100.0, 100.0, 0.4, 0.4]


@given(st.sampled_from(["linear", "cosine"]), st.integers(1, 50), st.floats(0.1, 10.0))
def test_gradual_schedules_fall_from_100_to_the_temperature(
    schedule: Any, warmup: int, temperature: float
) -> None:
    config = ReweightConfig(
        strategy="linupper",
        temperature=temperature,
        warmup_steps=warmup,
        warmup_schedule=schedule,
    )
    path = [weighting_at(config, step).temperature for step in range(warmup + 2)]
    assert path[0] == WARMUP_TEMPERATURE
    assert path[-2:] == [temperature, temperature]
    assert all(a > b for a, b in itertools.pairwise(path[:-1]))


def test_linear_and_cosine_meet_in_the_middle() -> None:
    schedules: list[Any] = ["linear", "cosine"]
    for schedule in schedules:
        config = ReweightConfig(
            strategy="extremes",
            temperature=1.0,
            warmup_steps=10,
            warmup_schedule=schedule,
        )
        assert weighting_at(config, 5).temperature == pytest.approx(50.5)
