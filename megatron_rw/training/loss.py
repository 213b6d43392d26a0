"""The loss function that Megatron's schedules call on the last pipeline stage."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.rerun_state_machine import get_rerun_state_machine
from torch import Tensor

from megatron_rw.integrations.cross_entropy import entropy_of, sums_of
from megatron_rw.integrations.logit_scale import LogitScale
from megatron_rw.integrations.state import ReweightState
from megatron_rw.integrations.step import ReferencePass, StepReweighting, ending
from megatron_rw.kernels.options import Statistic
from megatron_rw.resilience.step_samples import StepSamples
from megatron_rw.reweighting import (
    DomainLosses,
    SampleSums,
    TokenBatch,
    WeightedSet,
    WeightMetrics,
    sample_sums,
)
from megatron_rw.reweighting.weighed_units import WeighedUnits
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
        self,
        settings: Settings,
        state: ReweightState,
        num_domains: int,
        samples: StepSamples,
        reference: ReferencePass | None = None,
    ) -> None:
        args = settings.megatron
        self._args = args
        self._validates = settings.megatron_decides
        self._config = settings.reweight
        self._samples = samples
        self._sets: list[WeightedSet] = []
        # By micro-batch of the step, where units are documents that will be written.
        self._documents: list[Tensor] = []
        # Of the steps that the optimizer took since the last reset.
        self.weight_metrics = WeightMetrics(num_domains)
        # Runs the training steps.
        self.reweighting: StepReweighting | None = None
        if settings.reweight.enabled:
            config, iteration = settings.reweight, lambda: args.curr_iteration
            ends = ending(config, iteration, args)
            self.reweighting = StepReweighting(
                config, state, iteration, self._sets.append, reference, ends
            )
        # Of the same steps, in a run without reweighting, and of the evaluation.
        self.train_losses = DomainLosses(num_domains)
        self.valid_losses = DomainLosses(num_domains)
        # Of the evaluation, where they are asked for.
        monitoring = settings.monitoring
        self.logit_scale = LogitScale() if monitoring.log_logit_scale else None

    def begin_step(self) -> None:
        """Begins a step, and forgets what an earlier one has left."""
        self._sets.clear()
        self._documents.clear()
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

    def extremes(self, count: int) -> tuple[WeighedUnits, WeighedUnits]:
        """Returns this rank's units of highest and of lowest weight in the last step.

        They are at most `count` each. It does not wait for the device.
        """
        losses, weights = [], []
        for weighted in self._sets:
            units, own = weighted.units, weighted.units.local
            base = torch.ones_like(units.losses) if units.base is None else units.base
            relative = weighted.weights * weighted.statistics[Statistic.BASE] / base
            losses.append(torch.where(units.active, units.losses, torch.nan)[own])
            weights.append(relative[own])
        places = torch.arange(sum(map(len, losses)), device=losses[0].device)
        rows, positions = places, torch.zeros_like(places)
        if self._config.unit != "sequence":
            length = self._args.seq_length
            rows, positions = places // length, places % length
            if self._documents:
                documents = torch.cat(self._documents)
                first = torch.full_like(documents, length)
                positions = positions[:length].expand_as(documents)
                positions = first.scatter_reduce(1, documents, positions, "amin").view(-1)
        found = WeighedUnits(torch.cat(losses), torch.cat(weights), rows, positions)
        return found.most(count, highest=True), found.most(count, highest=False)

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
        shape = self._shape(batch, training=True)
        sums = self._sums(batch, loss_mask, token_losses, training=True)
        signal = self._signal(reweighting, batch, token_losses)
        loss, divisor = reweighting.weigh(
            TokenBatch(
                token_losses.view(shape),
                loss_mask.view(shape),
                sums,
                None if signal is None else signal.view(shape),
                None if batch.documents is None else batch.documents.view(shape),
                None if batch.sample_weights is None else batch.sample_weights.view(shape),
                batch.domain,
            )
        )
        if reweighting.unobserved:
            return loss, divisor, {}
        if self._config.dump_samples and batch.documents is not None:
            self._documents.append(batch.documents.view(shape))
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
        shape = self._shape(batch, training)
        return sample_sums(token_losses.view(shape), loss_mask.view(shape))

    def _shape(self, batch: Batch, training: bool) -> tuple[int, int]:
        """Returns `(b, s/cp)`."""
        assert batch.loss_mask is not None
        if batch.packed is None:
            return len(batch.loss_mask), -1
        # The samples of a packed micro-batch are one row of micro_batch_size·seq_length tokens.
        return self._args.micro_batch_size if training else self._args.eval_micro_batch_size, -1

    def _signal(
        self, reweighting: StepReweighting, batch: Batch, token_losses: Tensor
    ) -> Tensor | None:
        """Returns what weights follow, `[b, s/cp]`, NaN where it is missing.

        None stands for the loss, and is enough where weights follow no signal.
        """
        if reweighting.uniform:
            return None
        losses = token_losses.detach()
        match self._config.signal:
            case "loss":
                return None
            case "entropy":
                return entropy_of(token_losses)
            case "learnability":
                return batch.reference
        reference = reweighting.reference_losses()
        if reference is None:
            reference = batch.reference
        assert reference is not None
        return reference - losses if self._config.signal == "progress" else losses - reference

    def _note(self, batch: Batch, sums: SampleSums) -> None:
        self._samples.note(sums, batch.domain, self._places(batch))

    def _places(self, batch: Batch) -> Tensor | None:
        # Context parallelism cuts a packed row without regard to its samples.
        cut = batch.packed is not None and self._args.context_parallel_size > 1
        return None if cut else batch.places

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
