"""The scopes: which samples compete for weight, and when their weights are known.

A training step calls `begin`, for the scope `global` one `score` per micro-batch, one `weigh` per
micro-batch, each with a backward pass, and `finish`. The gradient of the step is

    (1/M)·Σ_m Σ_ranks ∇weigh(m) · finish()

over M micro-batches and the data- and context-parallel ranks. It equals the gradient of
Σ_{i∈S} w_i·l_i with constant weights, averaged over the sets S of the step: one set per
micro-batch in the scope `microbatch`, a single set otherwise.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass
from typing import override

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rw.kernels.options import SampleWeights, Statistic
from megatron_rw.kernels.sums import SampleSums
from megatron_rw.kernels.weights import weigh_samples
from megatron_rw.reweighting.config import ReweightConfig, temperature_at
from megatron_rw.reweighting.samples import ReduceGroup, SampleSet, gather_samples


@dataclass(frozen=True)
class WeightedSet:
    """A set of samples and their weights, the same on every data- and context-parallel rank."""

    samples: SampleSet
    weights: Tensor  # `[n]`, w_i, in the order of `samples`.
    statistics: Tensor  # `[9]`, indexed by `megatron_rw.kernels.Statistic`.
    # Scalar, number of samples whose losses were clamped, because they were outside the range that
    # losses were scaled by; None if that range is the set's own.
    beyond: Tensor | None = None

    @property
    def objective(self) -> Tensor:
        """Scalar, Σ_{i∈S} w_i·l_i."""
        # 0·NaN is NaN, so samples without weight are left out of the sum.
        return torch.where(self.weights > 0, self.weights * self.samples.losses, 0.0).sum()


Observer = Callable[[WeightedSet], None]


class Reweighter(abc.ABC):
    """Weights the samples of training steps, on the ranks that have the loss.

    `config.enabled` must hold. The samples of `ranks` compete, or those of this process alone.
    `observe` is called with every set once its weights are known.
    """

    # Whether the step needs a forward pass and `score` of all its micro-batches before the first
    # `weigh`.
    scores_first = False

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
        self._observe = observe or (lambda weighted: None)
        self._step = 0
        self._num_microbatches = 1
        # Active tokens of the step over all ranks, from when they are known.
        self.step_tokens: Tensor | None = None

    def begin(self, step: int, num_microbatches: int = 1) -> None:
        """Begins a step of M = `num_microbatches` calls of `weigh`.

        `step` are the completed steps of reweighted training. With the same number again, as when
        Megatron repeats a step to find a hardware fault, the weights are the same again.
        """
        self._step = step
        self._num_microbatches = num_microbatches
        self.step_tokens = None

    def score(self, sums: SampleSums, domain: Tensor | None = None) -> None:
        """Notes a micro-batch before the step's first `weigh`, whose arguments it takes.

        The last call of the step is collective.
        """
        raise RuntimeError(f"scope {self.config.scope} needs no scores")

    @abc.abstractmethod
    def weigh(self, sums: SampleSums, domain: Tensor | None = None) -> Tensor:
        """Returns this rank's part of the objective, a scalar with gradient.

        It does not wait for the device. `sums` are over this rank's tokens, with gradient; `domain`
        is `[b]` int64 for the observer, and None stands for all 0.
        """

    def finish(self) -> Tensor | None:
        """Ends a step; returns a scalar to multiply the step's gradients by, or None for 1."""
        return None

    def _weigh_set(self, sums: SampleSums, domain: Tensor | None) -> WeightedSet:
        """Gathers the set that this rank's samples are part of, and weights it. Collective."""
        samples = gather_samples(sums, domain, self.ranks)
        weighted = WeightedSet(samples, *self._weights(samples.losses, samples.has_tokens))
        self._observe(weighted)
        return weighted

    def _weights(
        self, losses: Tensor, mask: Tensor, given_range: Tensor | None = None
    ) -> SampleWeights:
        strategy, delta = self.config.strategy, self.config.delta
        assert strategy != "none"
        temperature = temperature_at(self.config, self._step)
        return weigh_samples(losses, strategy, temperature, delta, mask, given_range)


def make_reweighter(
    config: ReweightConfig, ranks: ReduceGroup | None = None, observe: Observer | None = None
) -> Reweighter:
    """Returns the reweighter for `config.scope`; see `Reweighter`."""
    return _BY_SCOPE[config.scope](config, ranks, observe)


class MicrobatchReweighter(Reweighter):
    """The set is a micro-batch across the data-parallel group, as in the authors' code.

    There is one collective per micro-batch.
    """

    @override
    def weigh(self, sums: SampleSums, domain: Tensor | None = None) -> Tensor:
        weighted = self._weigh_set(sums, domain)
        own = weighted.samples.local
        if self._num_microbatches == 1:
            self.step_tokens = weighted.samples.tokens.sum()
        return _weighted_sum(sums.loss_sum, weighted.weights[own], weighted.samples.tokens[own])


class GlobalReweighter(MicrobatchReweighter):
    """The set is all samples of the step, scored by a forward pass before the first backward pass.

    There is one collective per step. A step of one micro-batch needs no pass for scores.
    """

    @override
    def begin(self, step: int, num_microbatches: int = 1) -> None:
        super().begin(step, num_microbatches)
        self.scores_first = num_microbatches > 1
        self._scored: list[_Row] = []
        self._known: WeightedSet | None = None
        self._weighed = 0

    @override
    @torch.no_grad()
    def score(self, sums: SampleSums, domain: Tensor | None = None) -> None:
        self._scored.append((sums, domain))
        if len(self._scored) == self._num_microbatches:
            self._known = self._weigh_set(*_concatenate(self._scored))
            self.step_tokens = self._known.samples.tokens.sum()

    @override
    def weigh(self, sums: SampleSums, domain: Tensor | None = None) -> Tensor:
        if not self.scores_first:
            return super().weigh(sums, domain)
        if self._known is None:
            raise RuntimeError(
                f"{len(self._scored)} of {self._num_microbatches} micro-batches were scored "
                "before the first backward pass"
            )
        count = sums.tokens.numel()
        start = self._known.samples.local.start + self._weighed * count
        own = slice(start, start + count)
        self._weighed += 1
        weights, tokens = self._known.weights[own], self._known.samples.tokens[own]
        # Megatron takes the mean over micro-batches, but the objective is a sum over them.
        return self._num_microbatches * _weighted_sum(sums.loss_sum, weights, tokens)


class DeferredReweighter(Reweighter):
    """The set is all samples of the step, scaled by the range of the previous step's losses.

    With that range, a sample's weight ŵ_i depends on its own loss only, up to the normaliser of the
    set, which `finish` returns as a factor: over ranks and micro-batches, the objective is
    Σ ŵ_i·l_i / |S| before that factor, |S|/Σ ŵ_j. There is one collective per step and, with
    context parallelism, one per micro-batch in the context-parallel group.

    Before the first step there is no range, and all weights are equal. A step without an active
    sample has gradient 0 and does not change the range.
    """

    # `[2]` fp64, the range (l_min, l_max) that the next step will use.
    moments = torch.tensor([torch.inf, -torch.inf], dtype=torch.float64)
    _used = moments
    _seen_step: int | None = None

    @override
    def begin(self, step: int, num_microbatches: int = 1) -> None:
        super().begin(step, num_microbatches)
        if step != self._seen_step:
            self._used = self.moments
            self._seen_step = step
        self._rows: list[_Row] = []

    @override
    def weigh(self, sums: SampleSums, domain: Tensor | None = None) -> Tensor:
        loss_sum, tokens = whole = self._over_shards(sums)
        self._rows.append((whole, domain))
        weights = self._weights(loss_sum / tokens.clamp(min=1.0), tokens > 0, self._used).weights
        return _weighted_sum(sums.loss_sum, weights, tokens) / (tokens.numel() * self.ranks.dp_size)

    @override
    @torch.no_grad()
    def finish(self) -> Tensor:
        sums, domain = _concatenate(self._rows)
        if self.ranks.cp_rank > 0:
            # `_over_shards` has summed over context parallelism; only one rank may add the sums.
            sums = SampleSums(*map(torch.zeros_like, sums))
        samples = gather_samples(sums, domain, self.ranks)
        weights, statistics = self._weights(samples.losses, samples.has_tokens, self._used)
        total = statistics[Statistic.TOTAL]
        divisor = total.clamp(min=torch.finfo(total.dtype).tiny)
        beyond = self._count_beyond(samples)
        self._observe(WeightedSet(samples, weights / divisor, statistics, beyond))
        self._update_moments(statistics)
        return torch.where(total > 0, weights.numel() / divisor, 1.0)

    @torch.no_grad()
    def _over_shards(self, sums: SampleSums) -> SampleSums:
        if self.ranks.cp_size == 1:
            return SampleSums(sums.loss_sum.detach(), sums.tokens)
        table = torch.stack(sums)
        dist.all_reduce(table, group=self.ranks.cp_group)
        return SampleSums(*table)

    def _count_beyond(self, samples: SampleSet) -> Tensor:
        low, high = self._used.to(samples.losses.device, samples.losses.dtype)
        outside = (samples.losses < low) | (samples.losses > high)
        return (outside & samples.active & (low <= high)).sum()

    def _update_moments(self, statistics: Tensor) -> None:
        seen = statistics[Statistic.LOW : Statistic.HIGH + 1].double()
        used = self._used.to(seen.device)
        kept = torch.where(used.isfinite(), used, seen)
        updated = seen + self.config.moment_decay * (kept - seen)
        self.moments = torch.where(seen.isfinite(), updated, used)


_BY_SCOPE = {
    "microbatch": MicrobatchReweighter,
    "global": GlobalReweighter,
    "deferred": DeferredReweighter,
}


_Row = tuple[SampleSums, Tensor | None]


def _concatenate(rows: list[_Row]) -> _Row:
    """Joins the micro-batches of a step into one of `[M·b]`."""
    sums = SampleSums(*map(torch.cat, zip(*(row for row, _ in rows), strict=True)))
    domains = [domain for _, domain in rows if domain is not None]
    return sums, torch.cat(domains) if domains else None


def _weighted_sum(own_loss_sum: Tensor, weights: Tensor, tokens: Tensor) -> Tensor:
    """Returns Σ w_i·l_i over this rank's samples and its part of their tokens.

    `own_loss_sum` is over this rank's tokens, with gradient; `tokens` are all of the sample's. All
    arguments are `[b]`.
    """
    # 0·NaN is NaN, so samples without weight are left out of the sum.
    return (torch.where(weights > 0, own_loss_sum, 0.0) * (weights / tokens.clamp(min=1.0))).sum()
