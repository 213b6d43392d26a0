"""The forward step that Megatron's schedules call for every micro-batch."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from megatron.core.utils import StragglerDetector, get_attr_wrapped_model
from megatron.training import get_timers

from megatron_rw.integrations.cross_entropy import announce_mask
from megatron_rw.integrations.logit_scale import LogitScale
from megatron_rw.integrations.output_layer import FusedOutputLayer
from megatron_rw.integrations.schedule import Schedule
from megatron_rw.training.batch import BatchReader
from megatron_rw.training.callbacks.base import Callback
from megatron_rw.training.loss import LossResult, PretrainLoss
from megatron_rw.training.settings import Settings

_stimer = StragglerDetector()


class ForwardPass[Loss: Callable[..., LossResult]]:
    """Draws a micro-batch, runs the model, and binds the loss function to the batch.

    Core's schedules call it and then, on the last pipeline stage, the bound loss function with the
    model's output. That function is called as `PretrainLoss.__call__` is.
    """

    def __init__(
        self,
        settings: Settings,
        read_batch: BatchReader,
        loss: Loss,
        callbacks: Sequence[Callback],
        logit_scale: LogitScale | None = None,
    ) -> None:
        self._args = settings.megatron
        self._read_batch = read_batch
        self._loss = loss
        self._callbacks = callbacks
        self._model_options: dict[str, Any] = {}
        budget = settings.kernels.logits_budget
        if budget is not None:
            self._model_options["output_processor"] = FusedOutputLayer(
                budget, settings.wants_entropy, logit_scale
            )

    def __call__(
        self, data_iterator: Iterator[Any], model: Any, return_schedule_plan: bool = False
    ) -> tuple[Any, Callable[..., Any]]:
        """Runs one forward pass of this pipeline stage.

        Returns:
            The stage's output (`[b, s/cp]` token losses on the last stage) and the loss function.
            With `return_schedule_plan` a plan that overlaps expert-parallel communication stands in
            place of the output.
        """
        for callback in self._callbacks:
            callback.before_batch()
        timer = get_timers()("batch-generator", log_level=2)
        timer.start()
        with _stimer(bdata=True):
            batch = self._read_batch(
                data_iterator, get_attr_wrapped_model(model, "vp_stage"), model.training
            )
        timer.stop()
        for callback in self._callbacks:
            callback.before_forward()

        if batch.labels is not None and batch.loss_mask is not None:
            # The mask travels as an attribute of the labels, because core passes no mask to its
            # cross-entropy.
            announce_mask(batch.labels, batch.loss_mask)
        loss = functools.partial(self._loss, batch, model=model, training=model.training)
        inputs = (batch.tokens, batch.position_ids, batch.attention_mask)
        options = self._model_options | {"labels": batch.labels, "loss_mask": batch.loss_mask}
        with _stimer:
            if return_schedule_plan:
                assert self._args.overlap_moe_expert_parallel_comm
                output = model.build_schedule_plan(*inputs, **options)
            else:
                output = model(*inputs, **options, packed_seq_params=batch.packed)
        return output, loss


class ForwardStep(ForwardPass[PretrainLoss]):
    """The forward pass of training, which also runs all passes of a step."""

    def run_step(self, schedule: Schedule, call: dict[str, Any]) -> Any:
        """Runs the passes of a training step; see `integrations.schedule.SteppedForward`."""
        self._loss.begin_step()
        for callback in self._callbacks:
            callback.before_passes()
        if self._loss.reweighting is None:
            result = schedule(**call)
        else:
            result = self._loss.reweighting.run(schedule, call)
        for callback in self._callbacks:
            callback.after_passes()
        return result
