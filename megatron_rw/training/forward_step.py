"""The forward step that Megatron's schedules call for every micro-batch."""

from __future__ import annotations

import contextlib
import functools
from argparse import Namespace
from collections.abc import Callable, Iterator
from typing import Any

from megatron.core.utils import StragglerDetector, get_attr_wrapped_model
from megatron.training import get_timers

from megatron_rw.integrations.cross_entropy import announce_mask
from megatron_rw.integrations.output_layer import FusedOutputLayer
from megatron_rw.integrations.schedule import Schedule
from megatron_rw.observability.stragglers import ForwardTimes
from megatron_rw.resilience.step_guard import StepGuard
from megatron_rw.resilience.watchdog import Progress
from megatron_rw.training.batch import BatchReader
from megatron_rw.training.loss import LossResult, PretrainLoss

_stimer = StragglerDetector()


class ForwardPass:
    """Draw a micro-batch, run the model, and bind the loss to the batch's mask and domains.

    Args:
        args: validated.
        read_batch: draws micro-batches.
        loss: of a batch and its token losses, on the last pipeline stage; see `PretrainLoss`.
        progress: told how far the rank is.
        times: takes the time of training's forward passes.
    """

    def __init__(
        self,
        args: Namespace,
        read_batch: BatchReader,
        loss: Callable[..., LossResult],
        progress: Progress,
        times: ForwardTimes | None = None,
    ) -> None:
        self._args = args
        self._read_batch = read_batch
        self._batch_loss = loss
        self._progress = progress
        self._times = times
        self._model_options: dict[str, Any] = {}
        if args.fused_linear_cross_entropy:
            budget = args.logits_budget_mib
            self._model_options["output_processor"] = FusedOutputLayer(
                None if budget is None else budget << 20
            )

    def __call__(
        self, data_iterator: Iterator[Any], model: Any, return_schedule_plan: bool = False
    ) -> tuple[Any, Callable[..., Any]]:
        """One forward pass.

        Args:
            data_iterator: this pipeline stage's samples.
            model: the stage, wrapped or not.
            return_schedule_plan: give the plan that overlaps expert-parallel communication
                instead of the output.

        Returns:
            The stage's output (`[b, s/cp]` token losses on the last), and the loss function of it.
        """
        times = self._times if model.training else None
        with contextlib.nullcontext() if times is None else times.measured():
            return self._run(data_iterator, model, return_schedule_plan)

    def _run(
        self, data_iterator: Iterator[Any], model: Any, return_schedule_plan: bool
    ) -> tuple[Any, Callable[..., Any]]:
        self._progress.then("reading a micro-batch")
        timer = get_timers()("batch-generator", log_level=2)
        timer.start()
        with _stimer(bdata=True):
            batch = self._read_batch(
                data_iterator, get_attr_wrapped_model(model, "vp_stage"), model.training
            )
        timer.stop()
        self._progress.then("a micro-batch")

        if batch.labels is not None and batch.loss_mask is not None and batch.packed is None:
            # A packed micro-batch is one row of several samples.
            announce_mask(batch.labels, batch.loss_mask)
        loss = functools.partial(self._batch_loss, batch, model=model, training=model.training)
        inputs = (batch.tokens, batch.position_ids, batch.attention_mask)
        options = self._model_options | {"labels": batch.labels, "loss_mask": batch.loss_mask}
        with _stimer:
            if return_schedule_plan:
                assert self._args.overlap_moe_expert_parallel_comm
                return model.build_schedule_plan(*inputs, **options), loss
            return model(*inputs, **options, packed_seq_params=batch.packed), loss


class ForwardStep(ForwardPass):
    """The forward pass of training.

    Args:
        args: validated.
        read_batch: draws micro-batches.
        loss: computes the loss on the last pipeline stage.
        progress: told how far the rank is.
        times: takes the time of training's forward passes.
        guard: told when a pass over the step's micro-batches begins.
    """

    def __init__(
        self,
        args: Namespace,
        read_batch: BatchReader,
        loss: PretrainLoss,
        progress: Progress,
        times: ForwardTimes | None,
        guard: StepGuard,
    ) -> None:
        super().__init__(args, read_batch, loss, progress, times)
        self._loss = loss
        self._guard = guard

    def run_step(self, schedule: Schedule, call: dict[str, Any]) -> Any:
        """Run a training step: see `integrations.schedule.SteppedForward`."""
        self._guard.begin()
        self._loss.begin_pass()
        if self._loss.reweighting is None:
            result = schedule(**call)
        else:
            result = self._loss.reweighting.run(schedule, call)
        self._progress.then("the optimizer's step")
        return result
