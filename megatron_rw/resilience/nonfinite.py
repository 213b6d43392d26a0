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
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.core import mpu
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup
from megatron.core.rerun_state_machine import EXIT_CODE_FAILED_ON_RESULT_VALIDATION
from megatron.training.utils import print_rank_0
from torch import Tensor

from megatron_rw.integrations import groups
from megatron_rw.resilience.step_samples import Sample, StepSamples
from megatron_rw.resilience.watchdog import few

_MOST_IN_A_ROW = 10

OnNonFinite = Literal["raise", "skip-step"]


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


def megatron_checks(args: Namespace) -> bool:
    """Whether Megatron's rerun state machine judges what is not finite, and we only explain.

    It runs such a step again to tell a faulty GPU from a faulty sample, and then ends the run.
    """
    checked: bool = args.check_for_nan_in_loss_and_grad
    return checked and args.on_nonfinite == "raise" and args.rerun_mode != "disabled"


class NonFiniteGuard:
    """Looks at every step before its optimizer does.

    Args:
        args: validated.
        samples: of the step under way.

    Attributes:
        skipped: steps since `reset`.
    """

    def __init__(self, args: Namespace, samples: StepSamples) -> None:
        self._args = args
        self._samples = samples
        self._model: list[Any] = []
        self._norm: Any = None
        self._bucket_norms: list[Tensor] = []
        self._in_a_row = 0
        self.skipped = 0

    def install(self) -> None:
        """Note the norms that Megatron would wait for, before ranks are averaged."""
        original = _ParamAndGradBucketGroup.check_grads
        keep = megatron_checks(self._args)
        noted = self._bucket_norms

        def check_grads(group: Any, check_for_nan_or_inf: bool, check_for_large: bool) -> None:
            if check_for_nan_or_inf:
                noted.extend(bucket.grad_data.norm(p=2) for bucket in group.buckets)
            if check_for_large or keep:
                original(group, check_for_nan_or_inf and keep, check_for_large)

        _ParamAndGradBucketGroup.check_grads = check_grads

    def begin(self) -> None:
        """A pass over the step's micro-batches begins."""
        self._bucket_norms.clear()

    def watch(self, model: list[Any], optimizer: Any) -> None:
        """Decide before this optimizer clips and steps. Again without effect.

        Args:
            model: its chunks on this rank.
            optimizer: Megatron's `ChainedOptimizer`.
        """
        if self._model:
            return
        self._model = model
        prepare_grads, get_grad_norm = optimizer.prepare_grads, optimizer.get_grad_norm

        def prepare() -> bool:
            overflow = prepare_grads()
            self._norm = torch.inf if overflow else get_grad_norm()
            return self._is_skipped() or overflow

        optimizer.prepare_grads = prepare
        # Computed once.
        optimizer.get_grad_norm = lambda: self._norm

    def explain(self) -> None:
        """Say what was wrong with a step that Megatron ends the run for. Collective."""
        self._norm = torch.nan
        self._print_error(self._diagnosis())

    def reset(self) -> None:
        """Count anew."""
        self.skipped = 0

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
        if self._args.on_nonfinite == "raise":
            self._print_error(f"{what} {self._remedy()}")
            raise NonFiniteExit
        self._in_a_row += 1
        self.skipped += 1
        most = self._args.max_consecutive_skips or _MOST_IN_A_ROW
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
        names, checked = _bad_parameters(self._model)
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
