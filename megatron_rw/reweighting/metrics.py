"""Metrics of weights and domains, summed on the device between log lines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rw.kernels.options import Statistic
from megatron_rw.reweighting.sets import WeightedSet

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
    """One domain over a logging interval; None stands for values that are not known."""

    lm_loss: float | None  # Unweighted loss, nats per token; None if no token was seen.
    weight_share: float  # Share of the weight, mean over sets.
    sample_share: float  # Share of the units.
    weight_ratio: float | None  # Share of the weight over share of the units, if it was seen.
    # Effective sample size within the domain, as a fraction; None if the domain was not seen, and
    # for units that are not gathered.
    ess: float | None


@dataclass(frozen=True)
class ReweightReport:
    """The weights over a logging interval."""

    objective: float  # Σ w·l, mean over sets.
    ess: float  # Effective sample size as a fraction of the set, mean over units.
    max_weight: float  # The largest weight of the interval.
    # The largest weight over what it would be without a strategy, mean over sets; |S|·w_max where
    # all would be alike. The paper's theory assumes at most 2.
    relative_max_weight: float
    over_bound: float  # Share of the sets in which that exceeds 2.
    # Share of the units whose signal the scope `deferred` clamped, because it was outside the range
    # of the previous step; None in the other scopes.
    beyond_range: float | None
    set_size: float  # Number of units that competed, mean over sets.
    temperature: float  # r of the last set.
    nonfinite_samples: int  # Number of units left out because their loss was not finite.
    # Number of units that counted as a signal of 0, because theirs was missing; None for signals
    # that cannot be.
    missing_signals: int | None
    sample_loss_min: float  # The smallest and the largest of the interval, nats per token.
    sample_loss_max: float
    domains: list[DomainReport]  # By the domain's index.


@dataclass(frozen=True)
class _Totals:
    """Sums over sets, on the device."""

    # `[5]` sets, ESS, |S|, largest relative weight, sets where that exceeds 2.
    set_sums: Tensor
    # `[4 + 5·D]` objective, non-finite units, units beyond the range, units without a signal; and
    # `[5, D]` loss sum, tokens, units, weight, ESS by domain.
    unit_sums: Tensor
    peaks: Tensor  # `[3]` −smallest loss, largest loss, largest weight.

    def plus(self, other: _Totals) -> _Totals:
        return _Totals(
            self.set_sums + other.set_sums,
            self.unit_sums + other.unit_sums,
            torch.maximum(self.peaks, other.peaks),
        )


class WeightMetrics:
    """Sums over the sets of a logging interval, without collectives until they are read.

    `add` only keeps the set. The sums are computed for many sets at once, so that the metrics cost
    little per micro-batch.
    """

    # Most units of sets that are kept, of at most 40 bytes each.
    _MOST_PENDING = 1 << 16

    def __init__(self, num_domains: int) -> None:
        self.num_domains = num_domains
        self.last: WeightedSet | None = None
        self._pending: list[WeightedSet] = []
        self._totals: _Totals | None = None

    def reset(self) -> None:
        """Starts a new interval."""
        self._pending.clear()
        self._totals = None

    def add(self, weighted: WeightedSet) -> None:
        """Adds one set, without waiting for the device."""
        size = weighted.weights.numel()
        if self._pending and (
            self._pending[0].weights.numel() != size
            or len(self._pending) * size >= self._MOST_PENDING
        ):
            self._fold()
        self.last = weighted
        self._pending.append(weighted)

    @torch.no_grad()
    def _fold(self) -> None:
        """Adds the k pending sets, all of n units, to the totals."""
        if not self._pending:
            return
        sets, units = self._pending, [weighted.units for weighted in self._pending]
        weights = torch.stack([weighted.weights for weighted in sets]).float()
        statistics = torch.stack([weighted.statistics for weighted in sets]).float()
        losses = torch.stack([each.losses for each in units]).float()
        tokens = torch.stack([each.tokens for each in units]).float()
        base = torch.stack([e.tokens.sign() if e.base is None else e.base for e in units]).float()
        domain = torch.stack([each.domain for each in units]).long()
        masks = [[each.missing for each in units], [weighted.beyond for weighted in sets]]
        missing, beyond = (sum(m.sum() for m in found if m is not None) for found in masks)
        self._pending = []

        has_tokens = tokens > 0
        used = has_tokens & torch.isfinite(losses)
        competes = used & (base > 0)
        size, largest = statistics[:, Statistic.COUNT], statistics[:, Statistic.LARGEST]
        losses = torch.where(used, losses, 0.0)
        unit_sums = [(weights * losses).sum(), (has_tokens & ~used).sum(), beyond, missing]
        by_domain = self._by_domain(losses, tokens, weights, base, domain, used)
        new = _Totals(
            set_sums=torch.stack(
                [
                    weights.new_full((), len(sets)),
                    (statistics[:, Statistic.ESS] * size).sum(),
                    size.sum(),
                    largest.sum(),
                    (largest > LARGEST_RELATIVE_WEIGHT).sum(),
                ]
            ),
            unit_sums=torch.cat([_stacked(unit_sums, weights), by_domain.view(-1)]),
            peaks=torch.stack(
                [
                    torch.where(competes, -losses, -torch.inf).amax(),
                    torch.where(competes, losses, -torch.inf).amax(),
                    weights.amax(),
                ]
            ),
        )
        self._totals = new if self._totals is None else self._totals.plus(new)

    def _by_domain(
        self,
        losses: Tensor,
        tokens: Tensor,
        weights: Tensor,
        base: Tensor,
        domain: Tensor,
        used: Tensor,
    ) -> Tensor:
        """Returns `[5, D]`, as in `_Totals.unit_sums`, of k sets `[k, n]`."""
        counted = torch.where(used, tokens, 0.0)
        base = torch.where(used, base, 0.0)
        squares = torch.where(base > 0, weights.square() / base, 0.0)
        competes = (base > 0).float()
        rows = torch.stack([losses * counted, counted, competes, weights, base, squares], dim=1)
        by_set = _sum_by_domain(rows, domain, self.num_domains)
        units, weight, whole, squared = by_set[:, 2:].unbind(dim=1)
        # The effective sample size is defined for one set, so it is computed before sets are added.
        product = whole * squared
        ess = torch.where(product > 0, units * weight.square() / product, 0.0)
        return torch.cat([by_set[:, :4].sum(dim=0), ess.sum(dim=0)[None]])

    def read(
        self, group: dist.ProcessGroup | None = None, copies: int = 1
    ) -> ReweightReport | None:
        """Returns the interval so far, or None if it has no set. Waits for the device.

        Units that are not gathered, documents and tokens, are summed over `group`, collectively,
        in which `copies` ranks hold the same ones.
        """
        self._fold()
        if self._totals is None or self.last is None:
            return None
        unit_sums, peaks = self._totals.unit_sums.clone(), self._totals.peaks.clone()
        if group is not None:
            dist.all_reduce(unit_sums, group=group)
            dist.all_reduce(peaks, op=dist.ReduceOp.MAX, group=group)
            unit_sums /= copies
        sets, ess, size, relative_max, over = self._totals.set_sums.tolist()
        objective, nonfinite, beyond, missing = unit_sums[:4].tolist()
        low, high, max_weight = peaks.tolist()
        by_domain = unit_sums[4:].view(5, -1).t().tolist()
        last = self.last
        return ReweightReport(
            objective=objective / sets,
            ess=ess / max(size, 1.0),
            max_weight=max_weight,
            relative_max_weight=relative_max / sets,
            over_bound=over / sets,
            beyond_range=None if last.beyond is None else beyond / max(size, 1.0),
            set_size=size / sets,
            temperature=float(last.temperature),
            nonfinite_samples=int(nonfinite),
            missing_signals=None if last.units.missing is None else int(missing),
            sample_loss_min=-low,
            sample_loss_max=high,
            domains=[
                DomainReport(
                    lm_loss=loss_sum / tokens if tokens > 0 else None,
                    weight_share=weight / sets,
                    sample_share=units / max(size, 1.0),
                    weight_ratio=weight / sets * size / units if units > 0 else None,
                    ess=domain_ess / units if units > 0 and group is None else None,
                )
                for loss_sum, tokens, units, weight, domain_ess in by_domain
            ],
        )


def _stacked(values: Sequence[Tensor | int], like: Tensor) -> Tensor:
    """Returns scalars as one `[k]`; a sum of nothing is the number 0."""
    # Filled on the device, so that the host waits for no copy.
    filled = [v if isinstance(v, Tensor) else like.new_full((), v) for v in values]
    return torch.stack([value.to(like) for value in filled])
