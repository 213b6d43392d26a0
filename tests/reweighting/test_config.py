"""Settings: every impossible one is refused with its flag, and the temperature schedule."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_rw.errors import UserError
from megatron_rw.reweighting import ReweightConfig, temperature_at
from megatron_rw.reweighting.config import WARMUP_TEMPERATURE


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strategy": "upper"}, r"--reweight-strategy 'upper': choose one of none, uniform"),
        ({"strategy": "linupper", "scope": "batch"}, r"--reweight-scope 'batch'"),
        ({"strategy": "linupper", "delta": 0.0}, r"--reweight-delta must be .* above 0, not 0.0"),
        ({"strategy": "linupper", "temperature": -1.0}, r"--reweight-temperature must be"),
        ({"strategy": "linupper", "temperature": math.nan}, r"--reweight-temperature must be"),
        ({"strategy": "linupper", "temperature": math.inf}, r"--reweight-temperature must be"),
        ({"strategy": "linupper", "warmup_steps": -1}, r"--reweight-warmup-steps must be 0"),
        ({"strategy": "linupper", "log_samples": -1}, r"--reweight-log-samples must be 0"),
        ({"strategy": "linupper", "warmup_schedule": "cosine"}, r"set --reweight-warmup-steps"),
        ({"temperature": 0.4}, r"--reweight-temperature without a strategy does nothing"),
        ({"warmup_steps": 5, "delta": 2.0}, r"--reweight-delta, --reweight-warmup-steps without"),
    ],
)
def test_refusals_name_the_flag(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ReweightConfig(**settings)


def test_step_schedule_is_the_authors() -> None:
    config = ReweightConfig(strategy="linupper", temperature=0.4, warmup_steps=3)
    temperatures = [temperature_at(config, step) for step in range(5)]
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
    path = [temperature_at(config, step) for step in range(warmup + 2)]
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
        assert temperature_at(config, 5) == pytest.approx(50.5)
