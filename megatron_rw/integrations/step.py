"""Runs training steps with reweighting, within Megatron core's schedules."""

from argparse import Namespace
from collections.abc import Callable
from typing import Any, Protocol

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.utils import get_model_config
from torch import Tensor

from megatron_rw.errors import UserError
from megatron_rw.integrations import groups
from megatron_rw.integrations.gradients import (
    GradientComparison,
    check_comparison,
    compare_gradients,
)
from megatron_rw.integrations.schedule import ReplayedData, Schedule, run_forward_only
from megatron_rw.integrations.state import ReweightState
from megatron_rw.kernels.options import Plan
from megatron_rw.reweighting import (
    DeferredReweighter,
    Observer,
    ReweightConfig,
    Reweighter,
    TokenBatch,
    make_reweighter,
)
from megatron_rw.reweighting.config import flag

# In smaller sets the weights depend on the number of samples more than on the losses.
_SMALL_SET = 8


class ReferencePass(Protocol):
    """Another model, which scores the micro-batches of a step before the training model does."""

    def run(self, schedule: Schedule, call: dict[str, Any], step: int) -> list[Tensor]:
        """Runs its forward passes, in place of those that `schedule(**call)` would run.

        `step` counts the completed steps of reweighted training. Returns the token losses of each
        micro-batch in fp32, shaped as the model's output, `[b, s/cp]`; none on ranks without it.
        """


class StepReweighting:
    """Runs the steps of one model with sample weights.

    `config.enabled` must hold. `iteration` returns the completed iterations of the run. `observe`
    is called with every weighted set, on the ranks of the last pipeline stage. `reference` runs
    before the passes of each step whose weights follow a signal. `ends` says whether weights are
    uniform again; see `ending`.
    """

    def __init__(
        self,
        config: ReweightConfig,
        state: ReweightState,
        iteration: Callable[[], int],
        observe: Observer | None = None,
        reference: ReferencePass | None = None,
        ends: Callable[[], bool] = lambda: False,
    ) -> None:
        self._config = config
        self._state = state
        self._iteration = iteration
        self._observe = observe
        self._reference = reference
        self._ends = ends
        # By micro-batch of the step, and the number of the present one in its pass.
        self._reference_losses: list[Tensor] = []
        self._micro_batch = 0
        self._reweighter: Reweighter | None = None
        # Of the present step, or of the last one.
        self.num_microbatches = 1
        self._keeps_token_divisor = False
        # Whether a training step is running, and is in the passes that only score the samples.
        self.running = False
        self.scoring = False
        # Whether the passes leave no trace: they only score, or are the uniform ones of a
        # comparison.
        self.unobserved = False
        # Whether the weights of the passes follow no signal.
        self.uniform = False
        # The latest, if there was one since it was last set to None.
        self.gradients: GradientComparison | None = None

    def run(self, schedule: Schedule, call: dict[str, Any]) -> Any:
        """Runs one training step, as `SteppedForward.run_step`."""
        model = call["model"] if isinstance(call["model"], list) else [call["model"]]
        reweighter = self._reweighter or self._build(model)
        self.num_microbatches = call["num_microbatches"]
        step = self._state.begin(self._iteration())
        interval = self._config.gradient_interval
        if interval == 0 or (step + 1) % interval:
            return self._passes(reweighter, step, schedule, call, model)
        data = ReplayedData(call["data_iterator"])

        def passes(uniform: bool) -> Any:
            reweighter.compares = uniform
            try:
                again = call | {"data_iterator": data.iterators()}
                return self._passes(reweighter, step, schedule, again, model)
            finally:
                reweighter.compares = False

        result, self.gradients = compare_gradients(model, passes)
        return result

    def _passes(
        self,
        reweighter: Reweighter,
        step: int,
        schedule: Schedule,
        call: dict[str, Any],
        model: list[Any],
    ) -> Any:
        """Runs the passes of a step, and finalises its gradient."""
        reweighter.begin(step, self.num_microbatches, uniform=self._ends())
        self.unobserved = reweighter.compares
        self.uniform = reweighter.uniform or reweighter.compares
        reference = None if self.uniform else self._reference
        # With token counts as divisors, `weigh` needs the step's total from the start.
        counts_first = self._keeps_token_divisor and not reweighter.scores_first
        counts_first = counts_first and self.num_microbatches > 1
        self.running = True
        try:
            if reference is not None or reweighter.scores_first or counts_first:
                data = ReplayedData(call["data_iterator"])
                if reference is not None:
                    replayed = call | {"data_iterator": data.iterators()}
                    self._reference_losses = reference.run(schedule, replayed, step)
                if counts_first:
                    reweighter.step_tokens = self._count_tokens(data)
                if reweighter.scores_first:
                    self.scoring = self.unobserved = True
                    self._micro_batch = 0
                    again = call | {"data_iterator": data.iterators()}
                    run_forward_only(schedule, again, self._config.signal == "entropy")
                    self.scoring, self.unobserved = False, reweighter.compares
                call = call | {"data_iterator": data.iterators()}
            self._micro_batch = 0
            result = schedule(**call)
        finally:
            self.running = self.scoring = self.unobserved = False
        if isinstance(reweighter, DeferredReweighter):
            self._finish_deferred(reweighter, model)
        return result

    def reference_losses(self) -> Tensor | None:
        """Returns the reference's losses of the micro-batch that `weigh` is called for next.

        They are fp32, `[b, s/cp]` as the model's output; None without a reference.
        """
        return None if self._reference is None else self._reference_losses[self._micro_batch]

    def weigh(self, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        """Weights one micro-batch, on the last pipeline stage.

        Returns `(loss, divisor)` for the schedule, a scalar and an int scalar. While the step only
        scores, the loss is 0.
        """
        reweighter = self._reweighter
        assert reweighter is not None
        assert self.running
        self._micro_batch += 1
        one = torch.ones((), dtype=torch.int, device=batch.mask.device)
        if self.scoring:
            reweighter.score(batch)
            return torch.zeros_like(one, dtype=torch.float), one
        loss = reweighter.weigh(batch)
        if self._keeps_token_divisor:
            # Megatron divides by the step's tokens, and losses that the model adds itself are
            # scaled for that. Over ranks and micro-batches, Σ (loss·tokens/M) / tokens = Σ loss/M.
            assert reweighter.step_tokens is not None
            scale = reweighter.step_tokens.to(loss.dtype) / self.num_microbatches
            return loss * scale, batch.mask.sum().to(torch.int)
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
        if self._config.gradient_interval:
            check_comparison(config)
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
        if isinstance(reweighter, DeferredReweighter) and self._state.plan is not None:
            reweighter.plan = self._state.plan
        self._reweighter = reweighter
        return reweighter

    def _finish_deferred(self, reweighter: DeferredReweighter, model: list[Any]) -> None:
        device = groups.device()
        shared = torch.ones(1 + len(Plan), dtype=torch.float64, device=device)
        if groups.has_loss():
            factor = reweighter.finish().to(shared)
            shared = torch.cat([factor.view(1), reweighter.plan.to(device)])
        groups.share_with_pipeline(shared)
        if not reweighter.compares:
            self._state.plan = shared[1:]
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


def ending(
    config: ReweightConfig, iteration: Callable[[], int], args: Namespace | None
) -> Callable[[], bool]:
    """Returns what says, in each step, whether --reweight-until has been reached.

    `iteration` returns the completed iterations of the run. `args` are Megatron's arguments,
    validated, which hold the schedule of the learning rate; only `decay` needs them.
    """

    def reached() -> bool:
        if config.until != "decay":
            return config.until is not None and iteration() >= int(config.until)
        assert args is not None
        if args.train_samples:
            end = args.lr_decay_samples or args.train_samples
            return bool(args.consumed_train_samples >= end - args.lr_wsd_decay_samples)
        end = args.lr_decay_iters or args.train_iters
        return bool(iteration() >= end - args.lr_wsd_decay_iters)

    return reached


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
