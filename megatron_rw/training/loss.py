"""The loss function that Megatron's schedules call on the last pipeline stage."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.rerun_state_machine import get_rerun_state_machine
from torch import Tensor

from megatron_rw.integrations.cross_entropy import sums_of
from megatron_rw.integrations.state import ReweightState
from megatron_rw.integrations.step import StepReweighting
from megatron_rw.resilience.step_samples import StepSamples
from megatron_rw.reweighting import (
    DomainLosses,
    SampleSums,
    WeightedSet,
    WeightMetrics,
    sample_sums,
)
from megatron_rw.training.batch import Batch
from megatron_rw.training.settings import Settings

LossResult = tuple[Tensor, Tensor, dict[str, Tensor]]

# The same as in Megatron's pretrain_gpt.py: --check-for-spiky-loss reports a loss that is this many
# times the largest one seen.
_SPIKE_FACTOR = 10


class PretrainLoss:
    """Megatron's mean over tokens, or the weighted sum over samples.

    Under `--reweight-strategy none` the result is Megatron's own, bit for bit. `samples` is told of
    the loss of every training sample.
    """

    def __init__(
        self, settings: Settings, state: ReweightState, num_domains: int, samples: StepSamples
    ) -> None:
        args = settings.megatron
        self._args = args
        self._validates = settings.megatron_decides
        self._samples = samples
        self._sets: list[WeightedSet] = []
        # Of the steps that the optimizer took since the last reset.
        self.weight_metrics = WeightMetrics(num_domains)
        # Runs the training steps.
        self.reweighting: StepReweighting | None = None
        if settings.reweight.enabled:
            self.reweighting = StepReweighting(
                settings.reweight, state, lambda: args.curr_iteration, self._sets.append
            )
        # Of the same steps, in a run without reweighting, and of the evaluation.
        self.train_losses = DomainLosses(num_domains)
        self.valid_losses = DomainLosses(num_domains)

    def begin_step(self) -> None:
        """Begins a step, and forgets what an earlier one has left."""
        self._sets.clear()
        self._samples.begin()

    def end_step(self, *, taken: bool) -> None:
        """Ends a step; one that the optimizer took goes into the averages that are reported."""
        if taken:
            for weighted in self._sets:
                self.weight_metrics.add(weighted)
            for note in self._samples.notes:
                # For a single domain, Megatron's lm loss is enough.
                if self.reweighting is None and note.domain is not None:
                    self.train_losses.add(*note.sums, note.domain)
        self._sets.clear()

    def __call__(
        self, batch: Batch, token_losses: Tensor, *, model: Any, training: bool
    ) -> LossResult:
        """Computes the loss of one micro-batch, in an evaluation always the unweighted one.

        The token losses are the model's output, `[b, s/cp]`. Megatron's distillation loss needs the
        model itself.

        Returns:
            `(loss, divisor, report)`. Megatron divides the loss by the divisor (an int tensor) and
            by the number of micro-batches, and averages the gradient over data- and
            context-parallel ranks; or, under --calculate-per-token-loss, divides the summed
            gradient by the summed divisor. The report holds `[sum, count]` pairs.
        """
        assert batch.loss_mask is not None
        if training and self.reweighting is not None:
            return self._weighted(self.reweighting, batch, batch.loss_mask, token_losses)
        if self._args.logits_load_dir is not None:
            result = self._distillation(batch.loss_mask, token_losses, model=model)
        else:
            result = _token_mean(batch.loss_mask, token_losses)
        self._check(result[0])
        sums = self._sums(batch, batch.loss_mask, token_losses.detach(), training)
        if training:
            self._note(batch, sums)
        else:
            self.valid_losses.add(*sums, batch.domain)
        return result

    def _weighted(
        self, reweighting: StepReweighting, batch: Batch, loss_mask: Tensor, token_losses: Tensor
    ) -> LossResult:
        sums = self._sums(batch, loss_mask, token_losses, training=True)
        loss, divisor = reweighting.weigh(sums, batch.domain)
        if reweighting.scoring:
            return loss, divisor, {}
        self._note(batch, sums)
        # Not computed from the sums, so that it is to the last bit what a run without reweighting
        # logs.
        total, _, report = _token_mean(loss_mask, token_losses.detach())
        self._check(total)
        return loss, divisor, report

    def _sums(
        self, batch: Batch, loss_mask: Tensor, token_losses: Tensor, training: bool
    ) -> SampleSums:
        if batch.packed is None:
            # Our kernels have left the sums as an attribute of the losses.
            return sums_of(token_losses, loss_mask)
        # The samples of a packed micro-batch are one row of micro_batch_size·seq_length tokens.
        samples = self._args.micro_batch_size if training else self._args.eval_micro_batch_size
        return sample_sums(token_losses.view(samples, -1), loss_mask.view(samples, -1))

    def _note(self, batch: Batch, sums: SampleSums) -> None:
        # Context parallelism cuts a packed row without regard to its samples.
        cut = batch.packed is not None and self._args.context_parallel_size > 1
        self._samples.note(sums, batch.domain, None if cut else batch.places)

    @functools.cached_property
    def _distillation(self) -> Callable[..., LossResult]:
        """Megatron's offline distillation; reads the teacher's cached logits."""
        from megatron.training.distillation import LossFuncCallable

        args = self._args
        return LossFuncCallable(
            logprobs_dir=args.logits_load_dir,
            decode_threads=args.logits_load_decode_threads,
            prefetch_factor=args.logits_load_prefetch_factor,
            msc_prefetch_depth=args.logits_load_msc_prefetch_depth,
            kd_loss_alpha=args.logits_load_kd_loss_alpha,
            ignore_errors=args.logits_load_ignore_errors,
        )

    def _check(self, loss: Tensor) -> None:
        """Runs Megatron's checks of this rank's unweighted loss sum: not finite, or a spike."""
        machine = get_rerun_state_machine()
        check = functools.partial(machine.validate_result, loss, tolerance=0.0)
        if self._validates:
            for rejected, name in ((torch.isnan, "NaN"), (torch.isinf, "Inf")):
                check(rejected, message=f"found {name} in local forward loss calculation")
        if self._args.check_for_spiky_loss:
            is_spike = functools.partial(
                machine.is_unexpectedly_large, threshold=_SPIKE_FACTOR, context="loss"
            )
            check(is_spike, message="Spiky loss", fatal=False)


def _token_mean(loss_mask: Tensor, token_losses: Tensor) -> LossResult:
    """Returns Megatron's own loss: masked sum, token count that divides it, and report."""
    mask = loss_mask.reshape(-1).float()
    total = torch.sum(token_losses.reshape(-1).float() * mask)
    tokens = mask.sum().detach().to(torch.int)
    return total, tokens, {"lm loss": torch.cat([total.detach().view(1), tokens.view(1)])}
