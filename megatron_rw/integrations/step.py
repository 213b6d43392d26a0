"""Runs training steps with reweighting, within Megatron core's schedules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.utils import get_model_config
from torch import Tensor

from megatron_rw.errors import UserError
from megatron_rw.integrations import groups
from megatron_rw.integrations.schedule import ReplayedData, Schedule, run_forward_only
from megatron_rw.integrations.state import ReweightState
from megatron_rw.reweighting import (
    DeferredReweighter,
    Observer,
    ReweightConfig,
    Reweighter,
    SampleSums,
    make_reweighter,
)
from megatron_rw.reweighting.config import flag

# In smaller sets the weights depend on the number of samples more than on the losses.
_SMALL_SET = 8


class StepReweighting:
    """Runs the steps of one model with sample weights.

    `config.enabled` must hold. `iteration` returns the completed iterations of the run. `observe`
    is called with every weighted set, on the ranks of the last pipeline stage.
    """

    def __init__(
        self,
        config: ReweightConfig,
        state: ReweightState,
        iteration: Callable[[], int],
        observe: Observer | None = None,
    ) -> None:
        self._config = config
        self._state = state
        self._iteration = iteration
        self._observe = observe
        self._reweighter: Reweighter | None = None
        # Of the present step, or of the last one.
        self.num_microbatches = 1
        self._keeps_token_divisor = False
        # Whether a training step is running, and is in the passes that only score the samples.
        self.running = False
        self.scoring = False

    def run(self, schedule: Schedule, call: dict[str, Any]) -> Any:
        """Runs one training step, as `SteppedForward.run_step`."""
        model = call["model"] if isinstance(call["model"], list) else [call["model"]]
        reweighter = self._reweighter or self._build(model)
        self.num_microbatches = call["num_microbatches"]
        reweighter.begin(self._state.begin(self._iteration()), self.num_microbatches)
        # With token counts as divisors, `weigh` needs the step's total from the start.
        counts_first = self._keeps_token_divisor and not reweighter.scores_first
        self.running = True
        try:
            if reweighter.scores_first or (counts_first and self.num_microbatches > 1):
                data = ReplayedData(call["data_iterator"])
                if counts_first:
                    reweighter.step_tokens = self._count_tokens(data)
                else:
                    self.scoring = True
                    run_forward_only(schedule, call | {"data_iterator": data.iterators()})
                    self.scoring = False
                call = call | {"data_iterator": data.iterators()}
            result = schedule(**call)
        finally:
            self.running = self.scoring = False
        if isinstance(reweighter, DeferredReweighter):
            self._finish_deferred(reweighter, model)
        return result

    def weigh(self, sums: SampleSums, domain: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Weights one micro-batch, on the last pipeline stage; arguments as of `Reweighter.weigh`.

        Returns `(loss, divisor)` for the schedule, a scalar and an int scalar. While the step only
        scores, the loss is 0.
        """
        reweighter = self._reweighter
        assert reweighter is not None
        assert self.running
        one = torch.ones((), dtype=torch.int, device=sums.tokens.device)
        if self.scoring:
            reweighter.score(sums, domain)
            return torch.zeros_like(one, dtype=torch.float), one
        loss = reweighter.weigh(sums, domain)
        if self._keeps_token_divisor:
            # Megatron divides by the step's tokens, and losses that the model adds itself are
            # scaled for that. Over ranks and micro-batches, Σ (loss·tokens/M) / tokens = Σ loss/M.
            assert reweighter.step_tokens is not None
            scale = reweighter.step_tokens.to(loss.dtype) / self.num_microbatches
            return loss * scale, sums.tokens.sum().to(torch.int)
        # Megatron averages the gradient over dp·cp ranks and M micro-batches, and the objective is
        # the sum of the ranks' parts, hence the factor dp·cp. A divisor of 1 keeps Megatron from
        # dividing by this rank's token count, which differs between shards. Under
        # --calculate-per-token-loss it sums over ranks and micro-batches instead, and divides by
        # the sum of the divisors, which is dp·cp·M.
        return loss * reweighter.ranks.size, one

    def _build(self, model: list[Any]) -> Reweighter:
        config = get_model_config(model[0])
        others = groups.other_losses(config)
        check_scope(self._config, config)
        if self._config.scope == "deferred" and not all(
            isinstance(chunk, DistributedDataParallel) for chunk in model
        ):
            raise UserError(
                f"{flag('scope')} deferred scales gradients in Megatron's DistributedDataParallel "
                f"buffers, which {type(model[0]).__name__} does not have: use another "
                f"{flag('scope')}."
            )
        self._keeps_token_divisor = bool(others) and config.calculate_per_token_loss
        reweighter = make_reweighter(self._config, groups.data_parallel_ranks(), self._observe)
        if isinstance(reweighter, DeferredReweighter) and self._state.moments is not None:
            reweighter.moments = self._state.moments
        self._reweighter = reweighter
        return reweighter

    def _finish_deferred(self, reweighter: DeferredReweighter, model: list[Any]) -> None:
        device = groups.device()
        shared = torch.ones(3, dtype=torch.float64, device=device)
        if groups.has_loss():
            factor = reweighter.finish().to(shared)
            shared = torch.cat([factor.view(1), reweighter.moments.to(device)])
        groups.share_with_pipeline(shared)
        self._state.moments = shared[1:]
        for chunk in model:
            chunk.scale_gradients(shared[0])

    def _count_tokens(self, data: ReplayedData) -> Tensor:
        """Returns the active tokens of the step, before it begins. Collective over the stage."""
        total = 0.0
        for drawn in data.peek(self.num_microbatches):
            if "loss_mask" not in drawn:
                raise UserError(
                    "--calculate-per-token-loss with losses that the model adds itself needs the "
                    "step's number of tokens beforehand, and the data has no loss_mask: drop that "
                    f"flag, or use {flag('scope')} global."
                )
            total += float(drawn["loss_mask"].sum())
        count = torch.tensor(total, dtype=torch.float64, device=groups.device())
        return groups.sum_over_replicas(count) if groups.has_loss() else count


def check_scope(config: ReweightConfig, model_config: Any) -> None:
    """Refuses what a scope cannot keep exact.

    `model_config` is Megatron's `TransformerConfig`, or its parsed arguments.
    """
    others = groups.other_losses(model_config)
    if config.scope == "deferred" and others:
        raise UserError(
            f"{flag('scope')} deferred multiplies the step's gradients by a normaliser that is "
            f"known only at its end, and would scale the losses of {', '.join(others)} with them: "
            f"use {flag('scope')} microbatch or global."
        )
    graphs = model_config.cuda_graph_impl
    if graphs == "full_iteration" or (graphs != "none" and config.scope == "global"):
        raise UserError(
            f"--cuda-graph-impl {graphs} captures a step as it is, without what {flag('scope')} "
            f"{config.scope} does before and after it: drop that flag"
            + (f", or use another {flag('scope')}." if graphs != "full_iteration" else ".")
        )


def check_set_size(scope: str, micro_batch_size: int, replicas: int, batch_size: int) -> str | None:
    """Refuses sets of one sample, and returns a warning for small ones.

    `micro_batch_size` is that of one rank, `batch_size` that of a step over all ranks.
    """
    if scope == "microbatch":
        size = micro_batch_size * replicas
        composition = (
            f"--micro-batch-size {micro_batch_size} x {replicas} data-parallel replicas = {size}"
        )
        remedy = f"raise --micro-batch-size, or use {flag('scope')} global or deferred"
    else:
        size = batch_size
        composition = f"--global-batch-size {size}"
        remedy = "raise --global-batch-size"
    if size < 2:
        raise UserError(
            f"samples compete for weight within {composition} sample, and one sample always has "
            f"weight 1: {remedy}."
        )
    if size < _SMALL_SET:
        return (
            f"samples compete for weight within {composition} samples. Below {_SMALL_SET} the "
            "weights depend on the set's size more than on the losses (of two samples, linupper "
            f"always gives 0.269 and 0.731): {remedy}."
        )
    return None
