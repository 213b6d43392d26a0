"""What a run does with a step whose loss or gradient is not finite, and how it explains one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.core.rerun_state_machine import EXIT_CODE_FAILED_ON_RESULT_VALIDATION

from megatron_rw.errors import UserError
from megatron_rw.resilience.step_samples import Sample
from megatron_rw.resilience.watchdog import few

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
        """Checks the settings against each other.

        Raises:
            UserError: Names the flag and the remedy.
        """
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


@dataclass(frozen=True)
class Finding:
    """What one rank found in a bad step.

    Attributes:
        rank: The global rank.
        stage: Its pipeline stage.
        samples: Its samples whose loss is not finite.
        positions: Indexes in training order of all its samples of the step.
        local: Whether its own gradient was not finite before ranks were averaged.
        parameters: Those whose gradient is not finite, in the order of the forward pass.
        checked: Number of parameters that have a gradient.
        norm: Norm of the gradients.
    """

    rank: int
    stage: int
    samples: list[Sample]
    positions: list[int]
    local: bool
    parameters: list[str]
    checked: int
    norm: float


def megatron_decides(on_nonfinite: OnNonFinite, checks: bool, rerun_mode: str) -> bool:
    """Returns whether Megatron's rerun state machine judges a bad step, and we only explain it.

    It runs such a step again to tell a faulty GPU from a faulty sample, and then ends the run.
    `checks` is the value of --check-for-nan-in-loss-and-grad.
    """
    return checks and on_nonfinite == "raise" and rerun_mode != "disabled"


def gather(mine: Any) -> list[Any]:
    """Returns every rank's object on every rank. It is slow, and meant for a bad step alone."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    return found


def diagnosis(findings: Sequence[Finding]) -> str:
    """Says in one or two sentences what is not finite, and where.

    Args:
        findings: Those of all ranks.
    """
    lines = [f"rank {found.rank}, {sample}" for found in findings for sample in found.samples]
    if lines:
        count = "1 sample" if len(lines) == 1 else f"{len(lines)} samples"
        return f"the loss of {count} is not finite: {few(lines)}."
    bad = [finding for finding in findings if finding.parameters]
    if not bad:
        return (
            f"the norm of the gradients is {findings[0].norm}, though every loss and every "
            "gradient is finite."
        )
    # The backward pass hands what is not finite on towards the input: it began at the last layer.
    last = max(bad, key=lambda finding: (finding.stage, -finding.rank))
    text = (
        f"a gradient is not finite, though every loss is: that of {last.parameters[-1]} on rank "
        f"{last.rank} first, {len(last.parameters)} of {last.checked} there by the end."
    )
    origin = [finding for finding in findings if finding.local and finding.stage == last.stage]
    if origin:
        whose = [
            f"rank {finding.rank}, samples {few([str(p) for p in finding.positions])}"
            if finding.positions
            else f"rank {finding.rank}"
            for finding in origin
        ]
        text += f" Before ranks were averaged it was so on {few(whose)}."
    return text


def bad_parameters(model: Sequence[Any]) -> tuple[list[str], int]:
    """Returns the names of parameters with a gradient that is not finite, and how many have one.

    Args:
        model: The model's chunks on this rank.
    """
    bad, checked = [], 0
    for chunk in model:
        for name, parameter in chunk.named_parameters():
            gradient = getattr(parameter, "main_grad", None)
            gradient = parameter.grad if gradient is None else gradient
            if gradient is None:
                continue
            checked += 1
            if not torch.isfinite(gradient).all():
                bad.append(name.removeprefix("module.").removeprefix("module."))
    return bad, checked
