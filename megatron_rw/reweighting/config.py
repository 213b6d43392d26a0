"""The settings of the method, from which its flags, their help and their checks are made."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal, get_args

from megatron_rw.errors import UserError
from megatron_rw.kernels.options import WeightStrategy, largest_score

Strategy = Literal["none", WeightStrategy]
Scope = Literal["microbatch", "global", "deferred"]
Schedule = Literal["step", "linear", "cosine"]

STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)

# At this temperature, weights are 1/|S| up to a factor in e^(±2δ/100): nearly no reweighting.
WARMUP_TEMPERATURE = 100.0

# The scope deferred back-propagates exp((h − h_max)/r) before its normaliser is known. With larger
# exponents, the gradients of a step whose losses all score low would underflow.
DEFERRED_EXPONENT_LIMIT = 20.0


@dataclass(frozen=True, kw_only=True)
class ReweightConfig:
    """Weight every training sample by its own loss (Sow et al., ICLR 2025, arXiv 2502.06733)."""

    strategy: Strategy = "none"
    """How a sample's weight follows from its loss. none: Megatron's own loss, the mean over
    tokens. uniform: the mean over samples. linupper: more weight to higher losses, capped above
    the middle of the range. quadratic: more weight to losses near the middle. extremes: more
    weight to the lowest and highest losses."""

    delta: float = 1.0
    """Half-width of the interval [-delta, delta] that the losses of a set are scaled to."""

    temperature: float = 1.0
    """Temperature r of the softmax over the samples of a set: low is sharp, high is uniform. The
    authors' code has 1.0 and 0.4."""

    warmup_steps: int = 0
    """Steps at temperature 100, which is nearly uniform, before --reweight-temperature holds."""

    warmup_schedule: Schedule = "step"
    """How the temperature goes from 100 to --reweight-temperature: step: stay at 100 for the
    warm-up and then switch, as the authors do. linear, cosine: fall over the whole warm-up."""

    scope: Scope = "microbatch"
    """Which samples compete for weight. microbatch: those of one micro-batch across the
    data-parallel group, as in the paper. global: the whole global batch, scored by a forward pass
    of its own. deferred: the whole global batch, scaled by the range of the previous step's
    losses; no forward pass of its own."""

    moment_decay: float = 0.0
    """For --reweight-scope deferred: how much of the earlier range of losses is kept, as the decay
    of an exponential moving average. 0: the previous step's alone."""

    log_samples: int = 0
    """Write the loss, weight and domain of the first N samples of the last set of every logged
    step into metrics.jsonl. Needs --log-dir."""

    def __post_init__(self) -> None:
        """Checks every setting, and settings that contradict each other."""
        choices = {"strategy": Strategy, "scope": Scope, "warmup_schedule": Schedule}
        for name, choice in choices.items():
            value, allowed = getattr(self, name), get_args(choice)
            if value not in allowed:
                raise UserError(f"{flag(name)} {value!r}: choose one of {', '.join(allowed)}.")
        for name in ("delta", "temperature"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise UserError(f"{flag(name)} must be a finite number above 0, not {value}.")
        for name in ("warmup_steps", "log_samples"):
            if getattr(self, name) < 0:
                raise UserError(f"{flag(name)} must be 0 or more, not {getattr(self, name)}.")
        if self.warmup_schedule != "step" and self.warmup_steps == 0:
            raise UserError(
                f"{flag('warmup_schedule')} {self.warmup_schedule} has nothing to act on: set "
                f"{flag('warmup_steps')} as well."
            )
        if not 0 <= self.moment_decay < 1:
            raise UserError(
                f"{flag('moment_decay')} must be at least 0 and below 1, not {self.moment_decay}."
            )
        if self.strategy == "none":
            self._refuse_idle_settings()
        elif self.scope == "deferred":
            lowest = largest_score(self.strategy, self.delta) / DEFERRED_EXPONENT_LIMIT
            if self.temperature < lowest:
                raise UserError(
                    f"{flag('temperature')} {self.temperature} is too low for {flag('scope')} "
                    f"deferred, whose gradients would underflow: use {lowest:g} or more, or "
                    "another scope."
                )
        elif self.moment_decay:
            raise UserError(
                f"{flag('moment_decay')} acts on {flag('scope')} deferred alone: add that, or drop "
                "the flag."
            )

    def _refuse_idle_settings(self) -> None:
        # If --reweight-strategy was forgotten, the run would otherwise be a baseline unnoticed.
        idle = [
            flag(field.name)
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        ]
        if idle:
            raise UserError(
                f"{', '.join(idle)} without a strategy does nothing: add {flag('strategy')} "
                f"{'|'.join(s for s in STRATEGIES if s != 'none')}, or drop the flag."
            )

    @property
    def enabled(self) -> bool:
        """Whether sample weights are in use."""
        return self.strategy != "none"


def flag(field_name: str) -> str:
    """Returns the command-line flag of a field of `ReweightConfig`."""
    return "--reweight-" + field_name.replace("_", "-")


def temperature_at(config: ReweightConfig, step: int) -> float:
    """Returns the temperature r(t) of the softmax.

    It is `WARMUP_TEMPERATURE` at the start of the warm-up and `config.temperature` after it. `step`
    counts the completed steps of reweighted training, and is 0 in the first.
    """
    if step >= config.warmup_steps:
        return config.temperature
    if config.warmup_schedule == "step":
        return WARMUP_TEMPERATURE
    progress = step / config.warmup_steps
    if config.warmup_schedule == "cosine":
        progress = (1.0 - math.cos(math.pi * progress)) / 2.0
    return WARMUP_TEMPERATURE + progress * (config.temperature - WARMUP_TEMPERATURE)
