"""The scopes: which units compete for weight, and when their weights are known.

A training step calls `begin`, for the scope `global` one `score` per micro-batch, one `weigh` per
micro-batch, each with a backward pass, and `finish`. The gradient of the step is

    (1/M)·Σ_m Σ_ranks ∇weigh(m) · finish()

over M micro-batches and the data- and context-parallel ranks. It equals the gradient of
Σ_{x∈S} w_x·l_x with constant weights, averaged over the sets S of the step: one set per
micro-batch in the scope `microbatch`, a single set otherwise.
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import override

import numpy as np
import torch
from torch import Tensor

from megatron_rw.kernels.options import Plan, Statistic, Units, Weighting
from megatron_rw.kernels.weights import planned_weights
from megatron_rw.reweighting.config import ReweightConfig, weighting_at, without_strategy
from megatron_rw.reweighting.sets import WeightedSet, begin_set
from megatron_rw.reweighting.units import ReduceGroup, TokenBatch, UnitSet, UnitSums

Observer = Callable[[WeightedSet], None]


class Reweighter(abc.ABC):
    """Weights the units of training steps, on the ranks that have the loss.

    `config.enabled` must hold. The units of `ranks` compete, or those of this process alone.
    `observe` is called with every set once its weights are known.
    """

    # Whether the step needs a forward pass and `score` of all its micro-batches before the first
    # `weigh`.
    scores_first = False
    # Whether the passes are those of a comparison: without a strategy, and unobserved. The plan of
    # the next step does not move.
    compares = False

    def __init__(
        self,
        config: ReweightConfig,
        ranks: ReduceGroup | None = None,
        observe: Observer | None = None,
    ) -> None:
        if not config.enabled:
            raise ValueError("strategy none has no weights; use Megatron's own loss")
        self.config = config
        self.ranks = ranks or ReduceGroup()
        self._observer = observe
        self._step = 0
        self._num_microbatches = 1
        # Whether the step's weights are those without a strategy.
        self.uniform = False
        # Active tokens of the step over all ranks, from when they are known.
        self.step_tokens: Tensor | None = None

    def begin(self, step: int, num_microbatches: int = 1, *, uniform: bool = False) -> None:
        """Begins a step of M = `num_microbatches` calls of `weigh`.

        `step` are the completed steps of reweighted training. With the same number again, as when
        Megatron repeats a step to find a hardware fault, the weights are the same again. With
        `uniform` they are those without a strategy.
        """
        self._step = step
        self._num_microbatches = num_microbatches
        self.uniform = uniform
        self.step_tokens = None
        self._drawn = 0

    def score(self, batch: TokenBatch) -> None:
        """Notes a micro-batch before the step's first `weigh`, whose argument it takes.

        The last call of the step is collective.
        """
        raise RuntimeError(f"scope {self.config.scope} needs no scores")

    @abc.abstractmethod
    def weigh(self, batch: TokenBatch) -> Tensor:
        """Returns this rank's part of a micro-batch's objective, a scalar with gradient.

        It does not wait for the device.
        """

    def finish(self) -> Tensor | None:
        """Ends a step; returns a scalar to multiply the step's gradients by, or None for 1."""
        return None

    def _observe(self, weighted: WeightedSet) -> None:
        if self._observer is not None and not self.compares:
            self._observer(weighted)

    def _weighting(self) -> Weighting:
        weighting = weighting_at(self.config, self._step)
        return without_strategy(weighting) if self.uniform or self.compares else weighting

    def _sums(self, batch: TokenBatch) -> UnitSums:
        """Adds up the units of the next micro-batch of the step."""
        config = self.config
        needed = {
            "documents": config.unit == "document",
            "signal": config.signal != "loss" and not (self.uniform or self.compares),
            "sample_weights": config.sample_weights is not None,
        }
        for name, needs in needed.items():
            if needs and getattr(batch, name) is None:
                raise ValueError(f"the configuration needs the {name} of a TokenBatch")
        sums = UnitSums.of(batch, self.config.unit, self.ranks)
        if self.config.control == "random-drop":
            chance = torch.rand(
                sums.tokens.shape,
                generator=self._chance(sums.tokens.device, self.ranks.rank),
                device=sums.tokens.device,
                dtype=sums.tokens.dtype,
            )
            # Context-parallel ranks add their sums of sequences and documents.
            alone = self.config.unit == "token" or self.ranks.cp_rank == 0
            known = torch.full_like(chance, float(alone))
            sums = dataclasses.replace(sums, signal_sum=chance * known, signal_tokens=known)
        self._drawn += 1
        return sums

    def _chance(self, device: torch.device, rank: int) -> torch.Generator:
        """Returns random numbers of this step's next micro-batch, the same when it is repeated."""
        # Mixed, because generators of the CPU take 32 bits of a seed only.
        seed = np.random.SeedSequence([self.config.control_seed, self._step, self._drawn, rank])
        return torch.Generator(device).manual_seed(int(seed.generate_state(1)[0]))

    def _weigh_set(self, sums: UnitSums) -> WeightedSet:
        """Weights the set that this rank's units are part of. Collective."""
        config = self.config
        if config.unit == "document":
            sums = sums.over_shards(self.ranks)
        order = None
        if config.control == "permute":
            order = self._chance(sums.tokens.device, 0)
        weighting = self._weighting()
        weighted = begin_set(
            sums, config.unit, config.by_tokens, weighting, self.ranks, None, order
        )()
        self._observe(weighted)
        return weighted


def make_reweighter(
    config: ReweightConfig, ranks: ReduceGroup | None = None, observe: Observer | None = None
) -> Reweighter:
    """Returns the reweighter for `config.scope`; see `Reweighter`."""
    return _BY_SCOPE[config.scope](config, ranks, observe)


class MicrobatchReweighter(Reweighter):
    """The set is a micro-batch across the data-parallel group, as in the authors' code.

    There is one collective per micro-batch. Where units are not gathered there are two, or three
    with a histogram.
    """

    @override
    def weigh(self, batch: TokenBatch) -> Tensor:
        weighted = self._weigh_set(self._sums(batch))
        if self._num_microbatches == 1:
            self.step_tokens = weighted.tokens
        own = weighted.units.local
        return _weighted_sum(batch, self.config, weighted.weights[own], weighted.units.tokens[own])


class GlobalReweighter(MicrobatchReweighter):
    """The set is all units of the step, scored by a forward pass before the first backward pass.

    There is one collective per step. Where units are not gathered there are two, or three with a
    histogram. A step of one micro-batch needs no pass for scores.
    """

    @override
    def begin(self, step: int, num_microbatches: int = 1, *, uniform: bool = False) -> None:
        super().begin(step, num_microbatches, uniform=uniform)
        self.scores_first = num_microbatches > 1
        self._scored: list[UnitSums] = []
        self._known: WeightedSet | None = None
        self._weighed = 0

    @override
    @torch.no_grad()
    def score(self, batch: TokenBatch) -> None:
        self._scored.append(self._sums(batch))
        if len(self._scored) == self._num_microbatches:
            self._known = self._weigh_set(_joined(self._scored))
            self._start = self._known.units.local.start
            self.step_tokens = self._known.tokens

    @override
    def weigh(self, batch: TokenBatch) -> Tensor:
        if not self.scores_first:
            return super().weigh(batch)
        if self._known is None:
            raise RuntimeError(
                f"{len(self._scored)} of {self._num_microbatches} micro-batches were scored "
                "before the first backward pass"
            )
        count = self._scored[self._weighed].tokens.numel()
        own = slice(self._start, self._start + count)
        self._weighed += 1
        self._start += count
        weights, tokens = self._known.weights[own], self._known.units.tokens[own]
        # Megatron takes the mean over micro-batches, but the objective is a sum over them.
        return self._num_microbatches * _weighted_sum(batch, self.config, weights, tokens)


class DeferredReweighter(Reweighter):
    """The set is all units of the step, weighted by the plan of the previous step's set.

    With that plan, a unit's weight ŵ depends on its own signal only, up to the normaliser of the
    set, which `finish` returns as a factor: over ranks and micro-batches, the objective is
    Σ ŵ·l / C before that factor, C/Σ ŵ, where C is about the number of units. There is one
    collective per step, which runs during the last backward pass. Where units are not gathered, a
    histogram is a second one. With context parallelism there is also one per micro-batch in the
    context-parallel group, unless the units are tokens.

    Before the first step there is no plan, and all weights are those without a strategy. A step
    without an active unit has gradient 0 and does not change the plan.
    """

    # `[5]` fp64, the plan that the next step will use; see `megatron_rw.kernels.Plan`.
    plan = torch.tensor([torch.inf, -torch.inf, 1.0, 0.0, 0.0], dtype=torch.float64)
    _used = plan
    _seen_step: int | None = None

    @override
    def begin(self, step: int, num_microbatches: int = 1, *, uniform: bool = False) -> None:
        super().begin(step, num_microbatches, uniform=uniform)
        if step != self._seen_step:
            self._used = self.plan
            self._seen_step = step
        self._rows: list[UnitSums] = []
        self._set: Callable[[], WeightedSet] | None = None
        self._scale = 0

    @override
    def weigh(self, batch: TokenBatch) -> Tensor:
        sums = self._sums(batch)
        if self.config.unit != "token":
            sums = sums.over_shards(self.ranks)
        self._rows.append(sums)
        units = UnitSet.of(sums, self.config.by_tokens, slice(0, sums.tokens.numel()))
        asked = Units(units.signals, units.active, units.base)
        weighting = self._weighting()
        weights = planned_weights(asked, weighting, self._given(weighting))
        if len(self._rows) == 1:
            # About Σ ŵ, so that gradients are about as large as without weights until `finish`.
            self._scale = len(sums.tokens) * self.ranks.dp_size
            if self.config.by_tokens or self.config.unit == "token":
                self._scale = batch.mask.numel() * self.ranks.size
        if len(self._rows) == self._num_microbatches:
            # The reduction goes on during the backward pass.
            self._set = self._begin_set()
        return _weighted_sum(batch, self.config, weights, units.tokens) / self._scale

    def _given(self, weighting: Weighting) -> Tensor:
        """Returns the plan that the step's weights follow."""
        if weighting.strategy != "topk" or weighting.top_share < 1.0:
            return self._used
        # A share of 1 keeps every unit, also those below the earlier threshold.
        plan = self._used.clone()
        plan[Plan.THRESHOLD] = -torch.inf
        return plan

    def _begin_set(self) -> Callable[[], WeightedSet]:
        config, sums = self.config, _joined(self._rows)
        if config.unit == "sequence" and self.ranks.cp_rank > 0:
            # `weigh` has summed over context parallelism; only one rank may add the sums.
            sums = sums.with_table(torch.zeros_like(sums.table()))
        weighting = self._weighting()
        plan = self._given(weighting)
        return begin_set(sums, config.unit, config.by_tokens, weighting, self.ranks, plan)

    @override
    @torch.no_grad()
    def finish(self) -> Tensor:
        if self._set is None or len(self._rows) != self._num_microbatches:
            raise RuntimeError(
                f"{len(self._rows)} of {self._num_microbatches} micro-batches were weighed"
            )
        weighted = self._set()
        self._observe(weighted.normalised())
        seen, used = weighted.plan.double(), self._used.to(weighted.plan.device)
        kept = torch.where(used[Plan.LOW].isfinite(), used, seen)
        updated = seen + self.config.moment_decay * (kept - seen)
        if self.config.target_ess is not None:
            # The mean is of 1/r: with a target of 1, as in a warm-up, r has nearly no bound.
            sharpness = 1 / seen[Plan.TEMPERATURE]
            sharpness += self.config.moment_decay * (1 / kept[Plan.TEMPERATURE] - sharpness)
            updated[Plan.TEMPERATURE] = 1 / sharpness
        if not self.compares:
            self.plan = torch.where(seen[Plan.LOW].isfinite(), updated, used)
        total = weighted.statistics[Statistic.TOTAL]
        tiny = torch.finfo(total.dtype).tiny
        scale = self._scale * self._num_microbatches
        return torch.where(total > 0, scale / total.clamp(min=tiny), 1.0)


_BY_SCOPE = {
    "microbatch": MicrobatchReweighter,
    "global": GlobalReweighter,
    "deferred": DeferredReweighter,
}


def _joined(rows: list[UnitSums]) -> UnitSums:
    """Joins the micro-batches of a step into one."""
    return rows[0].with_table(torch.cat([row.table() for row in rows], dim=1))


def _weighted_sum(
    batch: TokenBatch, config: ReweightConfig, weights: Tensor, tokens: Tensor
) -> Tensor:
    """Returns Σ w·l over this rank's units and its part of their tokens, with gradient.

    The weights and tokens are `[n]`, those of the units as a whole.
    """
    by_token = weights / tokens.clamp(min=1.0)
    # 0·NaN is NaN, so units without weight are left out of the sums.
    if config.unit == "sequence":
        return (torch.where(weights > 0, batch.sequence_sums().loss_sum, 0.0) * by_token).sum()
    by_token = by_token.view(len(batch.mask), -1)
    if config.unit == "document":
        assert batch.documents is not None
        by_token = by_token.gather(1, batch.documents)
    used = (by_token > 0) & (batch.mask > 0)
    return (torch.where(used, batch.losses, 0.0) * (by_token * batch.mask)).sum()
