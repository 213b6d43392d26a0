"""Metrics of weights and domains, summed on the device between log lines."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rw.kernels.options import Statistic
from megatron_rw.reweighting.scopes import WeightedSet

# The paper's convergence proof assumes that |S|·w_max is at most this.
LARGEST_RELATIVE_WEIGHT = 2.0


def _sum_by_domain(values: Tensor, domain: Tensor, num_domains: int) -> Tensor:
    """Adds up values `[…, k, n]` by domain `[…, n]`, and returns `[…, k, D]`.

    It multiplies by a one-hot matrix, because the order of `index_add_` on CUDA varies.
    """
    one_hot = torch.nn.functional.one_hot(domain, num_domains).to(values.dtype)
    return values @ one_hot


class DomainLosses:
    """Token-mean loss by domain, from sums that stay on this rank until they are read."""

    def __init__(self, num_domains: int) -> None:
        self.num_domains = num_domains
        self._sums: Tensor | None = None

    @torch.no_grad()
    def add(self, loss_sum: Tensor, tokens: Tensor, domain: Tensor | None) -> None:
        """Adds one micro-batch of this rank: `[b]` loss sums in nats, tokens, and int64 domains.

        Without domains, all samples are of domain 0.
        """
        if domain is None:
            domain = torch.zeros_like(tokens, dtype=torch.long)
        rows = torch.stack([loss_sum, tokens]).float()
        sums = _sum_by_domain(rows, domain, self.num_domains)
        self._sums = sums if self._sums is None else self._sums + sums

    def read(self, group: dist.ProcessGroup | None, *, reset: bool = True) -> LossByDomain:
        """Returns the losses over a group. Collective; waits for the device.

        Either every rank of the group has added a micro-batch, or none has. With `reset` the sums
        start again from zero.
        """
        if self._sums is None:
            return LossByDomain(None, [None] * self.num_domains)
        total = self._sums.clone()
        if reset:
            self._sums = None
        if group is not None:
            dist.all_reduce(total, group=group)
        loss_sum, tokens = total.sum(dim=1).tolist()
        return LossByDomain(
            overall=loss_sum / tokens if tokens > 0 else None,
            by_domain=[s / n if n > 0 else None for s, n in zip(*total.tolist(), strict=True)],
        )


@dataclass(frozen=True)
class LossByDomain:
    """Unweighted losses, nats per token; None if no token was seen."""

    overall: float | None
    by_domain: list[float | None]


@dataclass(frozen=True)
class DomainReport:
    """One domain over a logging interval; None stands for values of a domain that was not seen."""

    lm_loss: float | None  # Unweighted loss, nats per token.
    weight_share: float  # Share of the weight, mean over sets.
    sample_share: float  # Share of the samples.
    ess: float | None  # Effective sample size within the domain, as a fraction of its samples.


@dataclass(frozen=True)
class ReweightReport:
    """The weights over a logging interval."""

    objective: float  # Σ w·l, mean over sets.
    ess: float  # Effective sample size as a fraction of the set, mean over sets.
    max_weight: float  # The largest weight of the interval.
    relative_max_weight: float  # |S|·w_max, mean over sets. The paper's theory assumes at most 2.
    over_bound: float  # Share of the sets in which |S|·w_max exceeds 2.
    # Share of the samples whose loss the scope `deferred` clamped, because it was outside the range
    # of the previous step; None in the other scopes.
    beyond_range: float | None
    set_size: float  # Number of samples that competed, mean over sets.
    nonfinite_samples: int  # Number of samples left out because their loss was not finite.
    sample_loss_min: float  # The smallest and the largest of the interval, nats per token.
    sample_loss_max: float
    domains: list[DomainReport]  # By the domain's index.


@dataclass(frozen=True)
class _Totals:
    """Sums over sets, on the device."""

    # `[8]` sets, objective, ESS, |S|, |S|·w_max, sets where that exceeds 2, non-finite samples,
    # samples beyond the range.
    sums: Tensor
    domain_sums: Tensor  # `[5, D]` loss sum, tokens, samples, weight, ESS.
    peaks: Tensor  # `[3]` −smallest loss, largest loss, largest weight.

    def plus(self, other: _Totals) -> _Totals:
        return _Totals(
            self.sums + other.sums,
            self.domain_sums + other.domain_sums,
            torch.maximum(self.peaks, other.peaks),
        )


class WeightMetrics:
    """Sums over the sets of a logging interval, the same on every rank without collectives.

    `add` only keeps the set. The sums are computed for many sets at once, so that the metrics cost
    little per micro-batch.
    """

    # Most sets that are kept, of 16 bytes a sample.
    _MOST_PENDING = 64

    def __init__(self, num_domains: int) -> None:
        self.num_domains = num_domains
        self.last: WeightedSet | None = None
        self._pending: list[WeightedSet] = []
        self._totals: _Totals | None = None
        self._clamps = False

    def reset(self) -> None:
        """Starts a new interval."""
        self._pending.clear()
        self._totals = None

    def add(self, weighted: WeightedSet) -> None:
        """Adds one set, without waiting for the device."""
        size = weighted.weights.numel()
        if len(self._pending) == self._MOST_PENDING or (
            self._pending and self._pending[0].weights.numel() != size
        ):
            self._fold()
        self.last = weighted
        self._pending.append(weighted)

    @torch.no_grad()
    def _fold(self) -> None:
        """Adds the k pending sets, all of n samples, to the totals."""
        if not self._pending:
            return
        samples = [weighted.samples for weighted in self._pending]
        weights = torch.stack([weighted.weights for weighted in self._pending]).float()
        statistics = torch.stack([weighted.statistics for weighted in self._pending]).float()
        losses = torch.stack([s.losses for s in samples]).float()
        tokens = torch.stack([s.tokens for s in samples]).float()
        domain = torch.stack([s.domain for s in samples]).long()
        beyond = [weighted.beyond for weighted in self._pending if weighted.beyond is not None]
        self._clamps = bool(beyond)
        self._pending.clear()

        has_tokens = tokens > 0
        used = has_tokens & torch.isfinite(losses)
        size, largest = statistics[:, Statistic.COUNT], statistics[:, Statistic.LARGEST]
        relative_max = size * largest
        new = _Totals(
            sums=torch.stack(
                [
                    weights.new_tensor(len(samples)),
                    statistics[:, Statistic.OBJECTIVE].sum(),
                    statistics[:, Statistic.ESS].sum(),
                    size.sum(),
                    relative_max.sum(),
                    (relative_max > LARGEST_RELATIVE_WEIGHT).sum(),
                    has_tokens.sum() - size.sum(),
                    torch.stack(beyond).sum() if beyond else weights.new_zeros(()),
                ]
            ),
            domain_sums=self._by_domain(losses, tokens, weights, domain, used),
            peaks=torch.stack(
                [-statistics[:, Statistic.LOW], statistics[:, Statistic.HIGH], largest]
            ).amax(dim=1),
        )
        self._totals = new if self._totals is None else self._totals.plus(new)

    def _by_domain(
        self, losses: Tensor, tokens: Tensor, weights: Tensor, domain: Tensor, used: Tensor
    ) -> Tensor:
        """Returns `[5, D]`, as `_Totals.domain_sums`, of k sets `[k, n]`."""
        counted = torch.where(used, tokens, 0.0)
        rows = torch.stack(
            [
                torch.where(used, losses, 0.0) * counted,
                counted,
                used.float(),
                weights,
                weights.square(),
            ],
            dim=1,
        )
        by_set = _sum_by_domain(rows, domain, self.num_domains)
        weight, squares = by_set[:, 3], by_set[:, 4]
        # The effective sample size is defined for one set, so it is computed before sets are added.
        ess = torch.where(squares > 0, weight.square() / squares, 0.0)
        sums = by_set.sum(dim=0)
        sums[4] = ess.sum(dim=0)
        return sums

    def read(self) -> ReweightReport | None:
        """Returns the interval so far, or None if it has no set. Waits for the device."""
        self._fold()
        if self._totals is None:
            return None
        sets, objective, ess, size, relative_max, over, nonfinite, beyond = (
            self._totals.sums.tolist()
        )
        low, high, max_weight = self._totals.peaks.tolist()
        domains = self._totals.domain_sums.t().tolist()
        return ReweightReport(
            objective=objective / sets,
            ess=ess / max(size, 1.0),
            max_weight=max_weight,
            relative_max_weight=relative_max / sets,
            over_bound=over / sets,
            beyond_range=beyond / max(size, 1.0) if self._clamps else None,
            set_size=size / sets,
            nonfinite_samples=int(nonfinite),
            sample_loss_min=-low,
            sample_loss_max=high,
            domains=[
                DomainReport(
                    lm_loss=loss_sum / tokens if tokens > 0 else None,
                    weight_share=weight / sets,
                    sample_share=samples / max(size, 1.0),
                    ess=domain_ess / samples if samples > 0 else None,
                )
                for loss_sum, tokens, samples, weight, domain_ess in domains
            ],
        )
