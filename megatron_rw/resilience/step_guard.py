"""Guards a training step: all ranks together decide about one that is not finite.

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
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import mpu
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup
from megatron.training.utils import print_rank_0
from torch import Tensor

from megatron_rw.integrations import groups
from megatron_rw.resilience.nonfinite import (
    Finding,
    NonFiniteConfig,
    NonFiniteExit,
    bad_parameters,
    diagnosis,
    gather,
    megatron_decides,
)
from megatron_rw.resilience.spikes import SpikeLog
from megatron_rw.resilience.step_samples import StepSamples

_MOST_IN_A_ROW = 10


class StepGuard:
    """Looks at every step before its optimizer does. Every rank calls every method.

    Args:
        config: What to do with a bad step.
        samples: The samples of the current step.
        checks: Value of --check-for-nan-in-loss-and-grad; without it only spikes are looked for.
        rerun_mode: Value of --rerun-mode.
        log_dir: Where `spikes.jsonl` goes; needed with `config.loss_spike_factor` alone.
    """

    def __init__(
        self,
        config: NonFiniteConfig,
        samples: StepSamples,
        *,
        checks: bool,
        rerun_mode: str,
        log_dir: str | None,
    ) -> None:
        self._config = config
        self._samples = samples
        self._checks = checks
        self._explains_only = megatron_decides(config.on_nonfinite, checks, rerun_mode)
        self._spikes: SpikeLog | None = None
        if config.loss_spike_factor is not None:
            assert log_dir is not None
            self._spikes = SpikeLog(config.loss_spike_factor, log_dir, samples)
        self._model: list[Any] = []
        self._norm: Any = None
        self._bucket_norms: list[Tensor] = []
        self._iteration = 0
        self._in_a_row = 0
        self._skipped = 0

    def install(self) -> None:
        """Notes the norms that Megatron would wait for. Once per process."""
        if self._checks:
            _ParamAndGradBucketGroup.check_grads = self.noting(_ParamAndGradBucketGroup.check_grads)

    def noting(self, original: Callable[..., None]) -> Callable[..., None]:
        """Returns a `check_grads` that notes the norm of each bucket before ranks are averaged.

        Args:
            original: Core's, which still runs where Megatron decides about bad steps.
        """

        def check_grads(group: Any, check_for_nan_or_inf: bool, check_for_large: bool) -> None:
            if check_for_nan_or_inf:
                self._bucket_norms.extend(bucket.grad_data.norm(p=2) for bucket in group.buckets)
            if check_for_large or self._explains_only:
                original(group, check_for_nan_or_inf and self._explains_only, check_for_large)

        return check_grads

    def begin(self) -> None:
        """Forgets the step before; call it when a pass over a step's micro-batches begins."""
        self._samples.begin()
        self._bucket_norms.clear()

    def step(
        self, train_step: Callable[[], Any], model: list[Any], optimizer: Any, iteration: int
    ) -> Any:
        """Runs a step.

        Args:
            train_step: Megatron's.
            model: The model's chunks on this rank.
            optimizer: Megatron's `ChainedOptimizer`.
            iteration: The iteration as it is logged, from 1.

        Returns:
            What Megatron's step returns.

        Raises:
            NonFiniteExit: On every rank, after rank 0 has printed why.
        """
        self._iteration = iteration
        if self._checks and not self._model:
            self._model = model
            self._decide_before(optimizer)
        try:
            result = train_step()
        except NonFiniteExit:
            self._note_spikes()
            self.flush()
            raise
        self._note_spikes()
        _, _, _, should_exit, *_ = result
        if should_exit and self._explains_only:
            self._norm = torch.nan
            self._print_error(self._diagnosis())
            self.flush()
        return result

    def flush(self) -> None:
        """Writes the spikes since the last call; waits for the device."""
        if self._spikes is not None:
            self._spikes.flush()

    def counts(self) -> dict[str, int]:
        """Returns what has happened since `reset`, by name, of what the settings allow."""
        can_skip = self._checks and self._config.on_nonfinite != "raise"
        return {"skipped steps": self._skipped} if can_skip else {}

    def reset(self) -> None:
        """Begins the counts of a new logging interval."""
        self._skipped = 0

    def _note_spikes(self) -> None:
        if self._spikes is not None:
            self._spikes.end_step(self._iteration)

    def _decide_before(self, optimizer: Any) -> None:
        prepare_grads, get_grad_norm = optimizer.prepare_grads, optimizer.get_grad_norm

        def prepare() -> bool:
            overflow = prepare_grads()
            self._norm = torch.inf if overflow else get_grad_norm()
            return self._is_skipped() or overflow

        optimizer.prepare_grads = prepare
        # The norm has been computed then.
        optimizer.get_grad_norm = lambda: self._norm

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
            self._print_error(
                f"{what} Go on from the last checkpoint, with --iterations-to-skip "
                f"{self._iteration} or --on-nonfinite skip-step to leave the step out."
            )
            raise NonFiniteExit
        self._in_a_row += 1
        self._skipped += 1
        most = self._config.max_consecutive_skips or _MOST_IN_A_ROW
        if self._in_a_row > most:
            self._print_error(
                f"{what} No step was taken for {self._in_a_row} iterations, more than "
                f"--max-consecutive-skips {most}."
            )
            raise NonFiniteExit
        print_rank_0(f"WARNING: iteration {self._iteration}: the step is skipped: {what}")
        return True

    def _print_error(self, text: str) -> None:
        if dist.get_rank() == 0:
            print(f"error: iteration {self._iteration}: {text}", file=sys.stderr, flush=True)

    def _diagnosis(self) -> str:
        parameters, checked = bad_parameters(self._model)
        bad = self._samples.nonfinite()
        mine = Finding(
            rank=dist.get_rank(),
            stage=mpu.get_pipeline_model_parallel_rank(),
            samples=[] if bad is None else self._samples.named(bad, self._samples.losses()),
            positions=self._samples.positions(),
            local=not all(bool(norm.isfinite()) for norm in self._bucket_norms),
            parameters=parameters,
            checked=checked,
            norm=float(self._norm),
        )
        return diagnosis(gather(mine))
