"""Guards a training step: all ranks together decide about one that is not finite.

Megatron checks every micro-batch's loss and every bucket's gradient on the rank that has it, waits
for the device each time, and raises on that rank alone. Here nothing is waited for until the norm
of the gradients is known, which the optimizer waits for anyway. One all-reduce of two numbers over
all ranks then makes the decision everybody's, so that all skip the step, or all leave.

A skipped step is Megatron's own: the optimizer is told that its gradients hold an infinity, as by a
loss scaler. Parameters, moments and learning rate stay as they are, the step's samples are
consumed.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.core import mpu
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.rerun_state_machine import EXIT_CODE_FAILED_ON_RESULT_VALIDATION
from megatron.training.utils import print_rank_0
from torch import Tensor

from megatron_rw.errors import UserError, print_error
from megatron_rw.integrations import groups
from megatron_rw.patching import Around, Patch
from megatron_rw.resilience.step_samples import Sample, StepSamples, gather
from megatron_rw.resilience.watchdog import few

_MOST_IN_A_ROW = 10


@dataclass(frozen=True, kw_only=True)
class NonFiniteConfig:
    """What to do with losses and gradients that are not finite, or far too large."""

    on_nonfinite: Literal["raise", "skip-step"] = "raise"
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


class StepGuard:
    """Looks at every step before its optimizer does. Every rank calls every method."""

    def __init__(self, config: NonFiniteConfig, samples: StepSamples, explains_only: bool) -> None:
        self._config = config
        self._samples = samples
        self._explains_only = explains_only  # Megatron judges bad steps then.
        self._model: list[Any] = []
        self._norm: Any = None
        self._depth = 0
        self._bucket_norms: list[Tensor] = []
        self._iteration = 0
        self._in_a_row = 0
        # Whether a bad step is skipped, rather than the run ended, and how many were since the
        # count was last set to 0.
        self.skips = config.on_nonfinite != "raise"
        self.skipped = 0

    def patches(self) -> list[Patch]:
        """What looks at the gradients of each step before its optimizer does."""
        alone = "Megatron waits for the device for every bucket, and raises on one rank alone."
        last = "It is the last call before the optimizer clips and steps, and may skip the step."
        known = "The norm that decides has been computed already."
        return [
            Patch(_ParamAndGradBucketGroup, "check_grads", Around(self._check_grads), alone),
            Patch(ChainedOptimizer, "prepare_grads", Around(self._prepare_grads), last),
            Patch(ChainedOptimizer, "get_grad_norm", Around(self._get_grad_norm), known),
        ]

    def begin(self, iteration: int, model: list[Any]) -> None:
        """Forgets the step before, and takes the iteration as it is logged, from 1."""
        self._iteration, self._model, self._norm = iteration, model, None
        self._bucket_norms.clear()

    def explain(self) -> None:
        """Says what was wrong with a step for which Megatron ends the run. Collective then."""
        if self._explains_only:
            self._norm = torch.nan
            self._print_error(self._diagnosis())

    def _check_grads(self, proceed: Callable[..., None], call: dict[str, Any]) -> None:
        """Notes the norms that Megatron would wait for, before ranks are averaged."""
        nonfinite = call["check_for_nan_or_inf"]
        if nonfinite:
            self._bucket_norms.extend(bucket.grad_data.norm(p=2) for bucket in call["self"].buckets)
        if call["check_for_large"] or self._explains_only:
            proceed(check_for_nan_or_inf=nonfinite and self._explains_only)

    def _prepare_grads(self, proceed: Callable[..., bool], call: dict[str, Any]) -> bool:
        self._depth += 1
        try:
            overflow = proceed()
        finally:
            self._depth -= 1
        if self._depth:
            # Chains of optimizers can be nested. Only the outermost one decides.
            return overflow
        self._norm = None
        self._norm = torch.inf if overflow else call["self"].get_grad_norm()
        return self._is_skipped() or overflow

    def _get_grad_norm(self, proceed: Callable[..., Any], call: dict[str, Any]) -> Any:
        return proceed() if self._norm is None else self._norm

    def _is_skipped(self) -> bool:
        bad = self._samples.nonfinite()
        device = groups.device()
        loss = torch.zeros((), dtype=torch.bool, device=device) if bad is None else bad.any()
        gradient = ~torch.isfinite(torch.as_tensor(self._norm, device=device)).view(())
        found = torch.stack([loss, gradient]).int()
        if dist.get_world_size() > 1:
            dist.all_reduce(found, op=dist.ReduceOp.MAX)
        if not found.any().item():
            self._in_a_row = 0
            return False
        what = self._diagnosis()
        self._in_a_row += 1
        self.skipped += 1
        most = self._config.max_consecutive_skips or _MOST_IN_A_ROW
        if not self.skips:
            why = (
                f"Go on from the last checkpoint, with --iterations-to-skip {self._iteration} or "
                "--on-nonfinite skip-step to leave the step out."
            )
        elif self._in_a_row > most:
            why = (
                f"No step was taken for {self._in_a_row} iterations, more than "
                f"--max-consecutive-skips {most}."
            )
        else:
            print_rank_0(f"WARNING: iteration {self._iteration}: the step is skipped: {what}")
            return True
        self._print_error(f"{what} {why}")
        raise NonFiniteExit

    def _print_error(self, text: str) -> None:
        if dist.get_rank() == 0:
            print_error(f"iteration {self._iteration}: {text}")

    def _diagnosis(self) -> str:
        """Says in one or two sentences what is not finite, and where. Collective."""
        parameters, checked = _bad_parameters(self._model)
        samples, bad = self._samples, self._samples.nonfinite()
        mine = _Finding(
            rank=dist.get_rank(),
            stage=mpu.get_pipeline_model_parallel_rank(),
            samples=[] if bad is None else samples.named(bad, samples.losses(), samples.notes),
            positions=samples.positions(),
            local=not all(bool(norm.isfinite()) for norm in self._bucket_norms),
            parameters=parameters,
            checked=checked,
        )
        return _diagnosis_of(gather(mine)) or (
            f"the norm of the gradients is {float(self._norm)}, though every loss and every "
            "gradient is finite."
        )


@dataclass(frozen=True)
class _Finding:
    """What one rank found in a bad step."""

    rank: int
    stage: int
    samples: list[Sample]  # Those whose loss is not finite.
    positions: list[int]  # Of all its samples of the step.
    local: bool  # Its own gradient was not finite before ranks were averaged.
    parameters: list[str]  # Those whose gradient is not finite, in the order of the forward pass.
    checked: int  # Number of parameters that have a gradient.


def _diagnosis_of(findings: Sequence[_Finding]) -> str | None:
    lines = [f"rank {found.rank}, {sample}" for found in findings for sample in found.samples]
    if lines:
        count = "1 sample" if len(lines) == 1 else f"{len(lines)} samples"
        return f"the loss of {count} is not finite: {few(lines)}."
    bad = [finding for finding in findings if finding.parameters]
    if not bad:
        return None
    # The backward pass hands what is not finite on towards the input: it began at the last stage.
    last = max(bad, key=lambda finding: finding.stage)
    text = (
        f"a gradient is not finite, though every loss is: that of {last.parameters[-1]} on rank "
        f"{last.rank} first, {len(last.parameters)} of {last.checked} there by the end."
    )
    whose = [
        f"rank {finding.rank}"
        + (f", samples {few([str(p) for p in finding.positions])}" if finding.positions else "")
        for finding in findings
        if finding.local and finding.stage == last.stage
    ]
    return f"{text} Before ranks were averaged it was so on {few(whose)}." if whose else text


def _bad_parameters(model: Sequence[Any]) -> tuple[list[str], int]:
    """Names the parameters whose gradient is not finite, and counts those that have one."""
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
