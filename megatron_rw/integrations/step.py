"""A training step with reweighting: the method's life cycle tied to Megatron core's schedule."""

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

# With fewer samples the weights say more about |S| than about the losses.
SMALL_SET = 8


class StepReweighting:
    """Runs the steps of one model with sample weights.

    Args:
        config: `config.enabled` must hold.
        state: the checkpointed state.
        iteration: completed iterations of the run.
        observe: told of every set, on the ranks of the last pipeline stage.

    Attributes:
        num_microbatches: of the step under way, or the last.
        running: a training step is under way.
        scoring: its forward pass that only scores.
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
        self.num_microbatches = 1
        self._step_tokens: Tensor | None = None
        self._keeps_token_divisor = False
        self.running = False
        self.scoring = False

    def run(self, schedule: Schedule, call: dict[str, Any]) -> Any:
        """Run one training step: `SteppedForward.run_step`.

        Args:
            schedule: core's own.
            call: its arguments by name.

        Returns:
            What the schedule returns.

        Raises:
            UserError: the model has losses of its own that the scope cannot keep exact, or its
                gradients cannot be scaled.
        """
        model = call["model"] if isinstance(call["model"], list) else [call["model"]]
        reweighter = self._reweighter or self._build(model)
        self.num_microbatches = call["num_microbatches"]
        reweighter.begin(self._state.begin(self._iteration()), self.num_microbatches)
        self._step_tokens = None
        counts_first = self._keeps_token_divisor and not reweighter.scores_first
        self.running = True
        try:
            if reweighter.scores_first or (counts_first and self.num_microbatches > 1):
                data = ReplayedData(call["data_iterator"])
                call = call | {"data_iterator": data.iterator}
                if counts_first:
                    self._step_tokens = self._count_tokens(data)
                else:
                    self.scoring = True
                    run_forward_only(schedule, call)
                    self.scoring = False
                    data.rewind()
            result = schedule(**call)
        finally:
            self.running = self.scoring = False
        if isinstance(reweighter, DeferredReweighter):
            self._finish_deferred(reweighter, model)
        return result

    def weigh(self, sums: SampleSums, domain: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The loss that the schedule wants for one micro-batch, on the last pipeline stage.

        Args:
            sums: of this rank's tokens, with gradient.
            domain: `[b]` int64, for the observer.

        Returns:
            `(loss, divisor)`, a scalar and an int scalar. While scoring the loss is 0.
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
            # Losses that the model adds itself are scaled for a division by the step's tokens.
            tokens = reweighter.step_tokens if self._step_tokens is None else self._step_tokens
            assert tokens is not None
            scale = tokens.to(loss.dtype) / self.num_microbatches
            return loss * scale, sums.tokens.sum().to(torch.int)
        # Megatron averages the gradient over dp·cp ranks and M micro-batches, and the ranks' parts
        # add up to the objective. A divisor of 1 keeps it from dividing by this rank's token count,
        # which differs between shards; its sum, dp·cp·M, is what --calculate-per-token-loss, which
        # sums over both instead, divides by.
        return loss * reweighter.ranks.size, one

    def _build(self, model: list[Any]) -> Reweighter:
        config = get_model_config(model[0])
        others = groups.other_losses(config)
        check_scope(self._config, config)
        if self._config.scope == "deferred":
            _check_scalable(model)
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
        """Active tokens of the step, before it begins.

        Raises:
            UserError: the data has no `loss_mask`.
        """
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
    """Refuse what a scope cannot keep exact.

    Args:
        config: the reweighting settings.
        model_config: Megatron's `TransformerConfig` or its parsed arguments.

    Raises:
        UserError: names the flag and the remedy.
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


def _check_scalable(model: list[Any]) -> None:
    if not all(isinstance(chunk, DistributedDataParallel) for chunk in model):
        raise UserError(
            f"{flag('scope')} deferred scales gradients in Megatron's DistributedDataParallel "
            f"buffers, which {type(model[0]).__name__} does not have: use another {flag('scope')}."
        )


def check_set_size(scope: str, micro_batch_size: int, replicas: int, batch_size: int) -> str | None:
    """Refuse a set in which no sample competes.

    Args:
        scope: as in `ReweightConfig`.
        micro_batch_size: samples of a micro-batch on one rank.
        replicas: data-parallel size.
        batch_size: samples of a step over all ranks.

    Returns:
        A warning where the set is small; None otherwise.

    Raises:
        UserError: the set has one sample.
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
    if size < SMALL_SET:
        return (
            f"samples compete for weight within {composition} samples. Below {SMALL_SET} the "
            "weights depend on the set's size more than on the losses (of two samples, linupper "
            f"always gives 0.269 and 0.731): {remedy}."
        )
    return None
