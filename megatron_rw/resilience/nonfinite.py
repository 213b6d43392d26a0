"""What becomes of a step whose loss or gradient is not finite: decided once a step, by all ranks.

Megatron checks every micro-batch's loss and every bucket's gradient on the rank that has it, waits
for the device each time, and raises on that rank alone. Here nothing is waited for until the norm
of the gradients is known, which the optimizer waits for anyway. One all-reduce of two numbers over
all ranks then makes the decision everybody's, so that all skip the step, or all leave.

A skipped step is Megatron's own: the optimizer is told that its gradients hold an infinity, as by a
loss scaler. Parameters, moments and learning rate stay as they are, the step's samples are
consumed.
"""

from __future__ import annotations

import sys
from argparse import Namespace
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

from megatron_rw.integrations import groups
from megatron_rw.patching import Around, Patch
from megatron_rw.resilience.step_samples import Sample, StepSamples
from megatron_rw.resilience.watchdog import few

_MOST_IN_A_ROW = 10


@dataclass(frozen=True, kw_only=True)
class NonFiniteConfig:
    """What becomes of a step with numbers that are not finite, and of losses that stand out."""

    on_nonfinite: Literal["raise", "skip-step"] = "raise"
    """What to do with a step whose loss or gradient is not finite. raise: end the run on all ranks,
    with one line that names the samples. skip-step: take no optimizer step, on any rank."""

    max_consecutive_skips: int | None = None
    """How many steps in a row --on-nonfinite may skip; the run ends at the next. 10 by default.
    Counted anew after a resume."""

    loss_spike_factor: float | None = None
    """Write the samples whose loss is not finite, or more than this many times the running mean,
    to spikes.jsonl in --log-dir. Training is unaffected. Off by default."""


class NonFiniteExit(SystemExit):
    """Ends the run on every rank, at the same place, with Megatron's status for bad results."""

    def __init__(self) -> None:
        super().__init__(EXIT_CODE_FAILED_ON_RESULT_VALIDATION)


@dataclass(frozen=True)
class Finding:
    """What one rank found in a bad step.

    Attributes:
        rank: of the job.
        stage: of the pipeline.
        samples: those whose loss is not finite.
        positions: of all samples of the step, in the order of training.
        local: the rank's own gradient was not finite before ranks were averaged.
        parameters: those whose gradient is not finite, in the order of the forward pass.
        checked: how many were looked at.
        norm: of the gradients.
    """

    rank: int
    stage: int
    samples: list[Sample]
    positions: list[int]
    local: bool
    parameters: list[str]
    checked: int
    norm: float


def megatron_checks(args: Namespace, config: NonFiniteConfig) -> bool:
    """Whether Megatron's rerun state machine judges what is not finite, and we only explain.

    It runs such a step again to tell a faulty GPU from a faulty sample, and then ends the run.
    """
    checked: bool = args.check_for_nan_in_loss_and_grad
    return checked and config.on_nonfinite == "raise" and args.rerun_mode != "disabled"


class NonFiniteGuard:
    """Looks at every step before its optimizer does.

    Args:
        args: Megatron's arguments.
        config: What to do with a bad step.
        samples: Those of the step under way.

    Attributes:
        model: The model chunks of this rank.
        skipped: Steps that were skipped since it was set to 0.
    """

    def __init__(self, args: Namespace, config: NonFiniteConfig, samples: StepSamples) -> None:
        self._args = args
        self._config = config
        self._samples = samples
        self.model: list[Any] = []
        self._norm: Any = None
        self._bucket_norms: list[Tensor] = []
        self._in_a_row = 0
        self.skipped = 0

    def patches(self) -> list[Patch]:
        """What looks at the gradients of each step before its optimizer does."""
        return [
            Patch(
                _ParamAndGradBucketGroup,
                "check_grads",
                Around(self._check_grads),
                "Megatron waits for the device for every bucket, and raises on one rank alone.",
            ),
            Patch(
                ChainedOptimizer,
                "prepare_grads",
                Around(self._prepare_grads),
                "It is the last call before the optimizer clips and steps, and may skip the step.",
            ),
            Patch(
                ChainedOptimizer,
                "get_grad_norm",
                Around(self._get_grad_norm),
                "The norm that decides has been computed already.",
            ),
        ]

    def _check_grads(self, proceed: Callable[..., Any], call: dict[str, Any]) -> None:
        """Notes the norms that Megatron would wait for, before ranks are averaged."""
        nonfinite, keep = call["check_for_nan_or_inf"], self.only_explains
        if nonfinite:
            self._bucket_norms.extend(bucket.grad_data.norm(p=2) for bucket in call["self"].buckets)
        if call["check_for_large"] or keep:
            proceed(check_for_nan_or_inf=nonfinite and keep)

    def _prepare_grads(self, proceed: Callable[..., bool], call: dict[str, Any]) -> bool:
        overflow = proceed()
        self._norm = None
        self._norm = torch.inf if overflow else call["self"].get_grad_norm()
        return self._is_skipped() or overflow

    def _get_grad_norm(self, proceed: Callable[..., Any], call: dict[str, Any]) -> Any:
        return proceed() if self._norm is None else self._norm

    def begin(self) -> None:
        """A pass over the step's micro-batches begins."""
        self._bucket_norms.clear()

    def explain(self) -> None:
        """Say what was wrong with a step that Megatron ends the run for. Collective."""
        self._norm = torch.nan
        self._print_error(self._diagnosis())

    @property
    def only_explains(self) -> bool:
        """Whether Megatron itself ends the run; see `megatron_checks`."""
        return megatron_checks(self._args, self._config)

    @property
    def skips(self) -> bool:
        """Whether a bad step is skipped, rather than the run ended."""
        return self._config.on_nonfinite != "raise"

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
        if self._config.on_nonfinite == "raise":
            self._print_error(f"{what} {self._remedy()}")
            raise NonFiniteExit
        self._in_a_row += 1
        self.skipped += 1
        most = self._config.max_consecutive_skips or _MOST_IN_A_ROW
        if self._in_a_row > most:
            self._print_error(
                f"{what} No step was taken for {self._in_a_row} iterations, more than "
                f"--max-consecutive-skips {most}."
            )
            raise NonFiniteExit
        print_rank_0(f"WARNING: iteration {self._iteration}: the step is skipped: {what}")
        return True

    @property
    def _iteration(self) -> int:
        return int(self._args.curr_iteration) + 1

    def _remedy(self) -> str:
        return (
            "Go on from the last checkpoint, with --iterations-to-skip "
            f"{self._iteration} or --on-nonfinite skip-step to leave the step out."
        )

    def _print_error(self, text: str) -> None:
        if dist.get_rank() == 0:
            print(f"error: iteration {self._iteration}: {text}", file=sys.stderr, flush=True)

    def _diagnosis(self) -> str:
        return diagnosis(gather(self._finding()))

    def _finding(self) -> Finding:
        names, checked = _bad_parameters(self.model)
        return Finding(
            rank=dist.get_rank(),
            stage=mpu.get_pipeline_model_parallel_rank(),
            samples=bad_samples(self._samples),
            positions=self._samples.positions(),
            local=not all(bool(norm.isfinite()) for norm in self._bucket_norms),
            parameters=names,
            checked=checked,
            norm=float(self._norm),
        )


def bad_samples(samples: StepSamples) -> list[Sample]:
    """Those of this rank whose loss is not finite; waits for the device."""
    bad = samples.nonfinite()
    return [] if bad is None else samples.named(bad, samples.losses())


def gather(mine: Any) -> list[Any]:
    """Every rank's, on every rank. For a step that has gone wrong: it is slow."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    return found


def diagnosis(findings: Sequence[Finding]) -> str:
    """What is not finite, and where, in one sentence or two.

    Args:
        findings: of all ranks.
    """
    losses = describe([(finding.rank, finding.samples) for finding in findings])
    if losses:
        return f"{losses}."
    bad = [finding for finding in findings if finding.parameters]
    if not bad:
        return (
            f"the norm of the gradients is {findings[0].norm}, though every loss and every "
            "gradient is finite."
        )
    # Backward passes what is not finite on towards the input: it began at the latest layer.
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


def describe(found: Sequence[tuple[int, list[Sample]]]) -> str:
    """Name the samples whose loss is not finite; empty if there are none.

    Args:
        found: by rank.
    """
    lines = [f"rank {rank}, {sample}" for rank, samples in found for sample in samples]
    if not lines:
        return ""
    count = "1 sample" if len(lines) == 1 else f"{len(lines)} samples"
    return f"the loss of {count} is not finite: {few(lines)}"


def _bad_parameters(model: Sequence[Any]) -> tuple[list[str], int]:
    """Names of the parameters whose gradient is not finite, and how many have one."""
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
