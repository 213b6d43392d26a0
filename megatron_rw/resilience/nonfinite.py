"""The flags about losses and gradients that are not finite, and how such a run ends."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from megatron.core.rerun_state_machine import EXIT_CODE_FAILED_ON_RESULT_VALIDATION

from megatron_rw.errors import UserError

OnNonFinite = Literal["raise", "skip-step"]


@dataclass(frozen=True, kw_only=True)
class NonFiniteConfig:
    """What to do with losses and gradients that are not finite, or far too large."""

    on_nonfinite: OnNonFinite = "raise"
    """What to do with a step whose loss or gradient is not finite. raise: end the run on all ranks,
    with one line that names the samples. skip-step: take no optimizer step, on any rank."""

    max_consecutive_skips: int | None = None
    """How many steps in a row --on-nonfinite may skip; the run ends at the next. 10 by default.
    Counted anew after a resume."""

    loss_spike_factor: float | None = None
    """Write the samples whose loss is not finite, or more than this many times the running mean,
    to spikes.jsonl in --log-dir. Training is unaffected. Off by default."""

    def __post_init__(self) -> None:
        most, factor = self.max_consecutive_skips, self.loss_spike_factor
        if most is not None and most < 1:
            raise UserError(
                f"--max-consecutive-skips must be 1 or more, not {most}: to end "
                "the run at the first bad step, use --on-nonfinite raise."
            )
        if self.on_nonfinite == "raise" and most is not None:
            raise UserError(
                "--max-consecutive-skips without --on-nonfinite skip-step does nothing."
            )
        if factor is not None and not (math.isfinite(factor) and factor > 1):
            raise UserError(f"--loss-spike-factor must be a finite number above 1, not {factor}.")


class NonFiniteExit(SystemExit):
    """Ends the run on every rank, at the same place, with Megatron's status for bad results."""

    def __init__(self) -> None:
        super().__init__(EXIT_CODE_FAILED_ON_RESULT_VALIDATION)
