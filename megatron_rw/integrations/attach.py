"""Adds sample reweighting to other people's Megatron scripts."""

from __future__ import annotations

import functools
import inspect
import warnings
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rw import patching
from megatron_rw.errors import UserError
from megatron_rw.integrations import cross_entropy, groups, schedule
from megatron_rw.integrations.gradients import GradientComparison
from megatron_rw.integrations.state import ReweightState
from megatron_rw.integrations.step import StepReweighting, check_set_size, ending
from megatron_rw.reweighting import ReweightConfig, TokenBatch, WeightMetrics, sample_sums
from megatron_rw.reweighting.config import flag

# Settings that need what a loss function is not given.
_NEEDS_DATA = {"unit": ("document",), "signal": ("excess", "learnability", "progress")}

LossFunction = Callable[..., Any]
ForwardStepFunction = Callable[..., tuple[Any, LossFunction]]


def bound_loss_mask(loss_function: LossFunction) -> Tensor:
    """Returns the argument `loss_mask` of a `functools.partial`, as Megatron's scripts bind it."""
    if isinstance(loss_function, functools.partial):
        signature = inspect.signature(loss_function.func)
        bound = signature.bind_partial(*loss_function.args, **loss_function.keywords).arguments
        if isinstance(bound.get("loss_mask"), Tensor):
            return bound["loss_mask"]
    raise UserError(
        "the forward step's loss function has no bound argument loss_mask: give "
        "attach(..., loss_mask=) a function that takes the loss function and returns the mask."
    )


def attach(
    forward_step: ForwardStepFunction,
    config: ReweightConfig,
    *,
    args: Namespace | None = None,
    loss_mask: Callable[[LossFunction], Tensor] = bound_loss_mask,
) -> AttachedForwardStep:
    """Weights the samples of a Megatron forward step by their losses.

        forward_step = attach(forward_step, ReweightConfig(strategy="linupper"), args=get_args())

    The forward step returns the model's output, on the last pipeline stage `[b, s/cp]` token losses
    in nats, and a loss function of it. In a training step the weighted loss replaces the loss and
    the divisor that this function returns, and its report is kept. An evaluation is not changed.
    Call `attach` before the training loop asks core for its schedule, so before `pretrain`.

    Args:
        forward_step: A forward step function as core's schedules take it.
        config: The settings; the strategy must not be `none`.
        args: Megatron's parsed arguments, in a script on `megatron.training`. The state is then
            saved in its checkpoints, and the warm-up follows its iterations. Without them, save and
            load `state_dict()` with your own checkpoints.
        loss_mask: Finds the micro-batch's mask, `[b, s/cp]` or flat, in the loss function.
    """
    if not config.enabled:
        raise UserError("attach() with strategy none does nothing: choose one, or do not call it.")
    for name, values in _NEEDS_DATA.items():
        if (value := getattr(config, name)) in values:
            raise UserError(
                f"{flag(name)} {value} needs what only pretrain_gpt_rw.py reads from the data or a "
                "checkpoint: use that program, or another setting."
            )
    if config.sample_weights is not None:
        raise UserError(f"{flag('sample_weights')} is read by pretrain_gpt_rw.py alone: drop it.")
    if config.until == "decay" and args is None:
        raise UserError(f"{flag('until')} decay needs attach(..., args=): give an iteration.")
    patching.apply(schedule.patches())
    return AttachedForwardStep(forward_step, config, args, loss_mask)


class AttachedForwardStep:
    """A forward step function with sample weights, made by `attach`.

    On the ranks of the last pipeline stage, `metrics.read()` gives the report on the weights since
    the last `metrics.reset()`. `gradients` is the latest comparison of gradients, on every rank.
    """

    def __init__(
        self,
        forward_step: ForwardStepFunction,
        config: ReweightConfig,
        args: Namespace | None,
        loss_mask: Callable[[LossFunction], Tensor],
    ) -> None:
        self._forward_step = forward_step
        self._config = config
        self._args = args
        self._loss_mask = loss_mask
        self._completed = 0
        self._set_is_checked = False
        self.metrics = WeightMetrics(num_domains=1)
        self._state = ReweightState(config)
        if args is not None:
            # This imports megatron.training, which a script on megatron.core alone may not have.
            from megatron_rw.integrations import checkpoint

            patching.apply(checkpoint.patches(self._state, args))
        ends = ending(config, self._iteration, args)
        self._reweighting = StepReweighting(
            config, self._state, self._iteration, self.metrics.add, ends=ends
        )

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Any, LossFunction]:
        """Runs the forward step, and wraps its loss function."""
        output, loss_function = self._forward_step(*args, **kwargs)
        return output, functools.partial(self._loss, loss_function)

    def run_step(self, core_schedule: schedule.Schedule, call: dict[str, Any]) -> Any:
        """Runs a training step; see `schedule.SteppedForward`."""
        result = self._reweighting.run(core_schedule, call)
        self._completed += 1
        return result

    @property
    def gradients(self) -> GradientComparison | None:
        """The latest comparison with the gradient under uniform weights, if there was one."""
        return self._reweighting.gradients

    def state_dict(self) -> dict[str, Any]:
        """Returns what a checkpoint has to hold: plain numbers, the same on all ranks."""
        return {"completed": self._completed, **self._state.record()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from what `state_dict()` returned. Call it before the first step."""
        record = dict(state)
        self._completed = record.pop("completed", 0)
        self._state.load(record)

    def _iteration(self) -> int:
        return self._completed if self._args is None else int(self._args.curr_iteration)

    def _loss(self, loss_function: LossFunction, output: Tensor, **kwargs: Any) -> Any:
        if not self._reweighting.running:
            if torch.is_grad_enabled() and output.requires_grad:
                raise RuntimeError(
                    "a training step runs outside the schedules that attach() wraps, and would be "
                    "unweighted: call attach() before get_forward_backward_func() or pretrain(), "
                    "and give what it returns, not a function around it, to the schedule."
                )
            return loss_function(output, **kwargs)
        mask = self._loss_mask(loss_function)
        if output.dim() != 2 or mask.numel() != output.numel():
            raise UserError(
                f"the model's output has shape {tuple(output.shape)} and the loss mask "
                f"{tuple(mask.shape)}; both must hold one value per token, the output as [b, s]."
            )
        self._check_set_once(output.shape[0])
        signal = cross_entropy.entropy_of(output) if self._config.signal == "entropy" else None
        mask = mask.view(output.shape)
        batch = TokenBatch(output, mask, sample_sums(output, mask), signal)
        loss, divisor = self._reweighting.weigh(batch)
        if self._reweighting.unobserved:
            return loss, divisor, {}
        with torch.no_grad():
            report = loss_function(output.detach())[-1]
        return loss, divisor, report

    def _check_set_once(self, samples: int) -> None:
        if self._set_is_checked:
            return
        self._set_is_checked = True
        replicas = groups.data_parallel_ranks().dp_size
        batch_size = samples * replicas * self._reweighting.num_microbatches
        warning = check_set_size(self._config.scope, samples, replicas, batch_size)
        if warning is not None and dist.get_rank() == 0:
            warnings.warn(warning, stacklevel=2)
