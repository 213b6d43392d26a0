"""What the user is told about weights and domains, summed on the device between log lines."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rw.reweighting.reweighter import WeightedLoss
from megatron_rw.reweighting.samples import SampleSet
from megatron_rw.reweighting.weights import effective_sample_size


def _sum_by_domain(values: Tensor, domain: Tensor, num_domains: int) -> Tensor:
    """Add up `[k, n]` values by domain, giving `[k, D]`.

    A product with the one-hot matrix rather than `index_add_`, whose order on CUDA varies.
    """
    one_hot = torch.nn.functional.one_hot(domain, num_domains).to(values.dtype)
    return values @ one_hot


class DomainLosses:
    """Token-mean loss by domain, from sums that stay on this rank until they are read.

    Args:
        num_domains: D.
    """

    def __init__(self, num_domains: int) -> None:
        self.num_domains = num_domains
        self._sums: Tensor | None = None

    @torch.no_grad()
    def add(self, loss_sum: Tensor, tokens: Tensor, domain: Tensor | None) -> None:
        """Add one micro-batch of this rank.

        Args:
            loss_sum: `[b]`, nats.
            tokens: `[b]`.
            domain: `[b]` int64; all of domain 0 when None.
        """
        if domain is None:
            domain = torch.zeros_like(tokens, dtype=torch.long)
        rows = torch.stack([loss_sum, tokens]).float()
        sums = _sum_by_domain(rows, domain, self.num_domains)
        self._sums = sums if self._sums is None else self._sums + sums

    def read(self, group: dist.ProcessGroup | None, *, reset: bool = True) -> LossByDomain:
        """Reduce over the group and give the losses. Collective; waits for the device.

        Args:
            group: every rank of it has added at least one micro-batch.
            reset: start again from zero.
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
    """Unweighted losses, nats per token; None where no token was seen."""

    overall: float | None
    by_domain: list[float | None]


@dataclass(frozen=True)
class DomainReport:
    """One domain over a logging interval; None where the domain was not seen.

    Attributes:
        lm_loss: unweighted, nats per token.
        weight_share: its share of the weight, mean over sets.
        sample_share: its share of the samples.
        ess: effective sample size within the domain, as a fraction of its samples.
    """

    lm_loss: float | None
    weight_share: float
    sample_share: float
    ess: float | None


@dataclass(frozen=True)
class ReweightReport:
    """The weights over a logging interval.

    Attributes:
        objective: Σ w·l, mean over sets.
        ess: effective sample size as a fraction of the set, mean over sets.
        max_weight: the largest weight of the interval.
        relative_max_weight: |S|·w_max, mean over sets. The paper's theory assumes at most 2.
        set_size: samples that competed, mean over sets.
        nonfinite_samples: how many samples were left out because their loss was not finite.
        sample_loss_min: smallest sample loss of the interval, nats per token.
        sample_loss_max: largest.
        domains: by domain index.
    """

    objective: float
    ess: float
    max_weight: float
    relative_max_weight: float
    set_size: float
    nonfinite_samples: int
    sample_loss_min: float
    sample_loss_max: float
    domains: list[DomainReport]


@dataclass(frozen=True)
class _Totals:
    """Sums over sets, on the device.

    Attributes:
        sums: `[6]` sets, objective, ESS, |S|, |S|·w_max, non-finite samples.
        domain_sums: `[5, D]` loss sum, tokens, samples, weight, ESS.
        peaks: `[3]` −smallest loss, largest loss, largest weight: all three grow.
    """

    sums: Tensor
    domain_sums: Tensor
    peaks: Tensor

    def plus(self, other: _Totals) -> _Totals:
        return _Totals(
            self.sums + other.sums,
            self.domain_sums + other.domain_sums,
            torch.maximum(self.peaks, other.peaks),
        )


class WeightMetrics:
    """Sums over the sets of a logging interval. Every rank holds the same, without collectives.

    Args:
        num_domains: D.
    """

    def __init__(self, num_domains: int) -> None:
        self.num_domains = num_domains
        self.last: WeightedLoss | None = None
        self._totals: _Totals | None = None

    def reset(self) -> None:
        """Start a new interval."""
        self._totals = None

    @torch.no_grad()
    def add(self, weighted: WeightedLoss) -> None:
        """Add one set; no host synchronisation."""
        samples, weights = weighted.samples, weighted.weights.float()
        losses = samples.losses.float()
        used = samples.has_tokens & torch.isfinite(losses)
        size, max_weight = used.sum(), weights.amax()
        new = _Totals(
            sums=torch.stack(
                [
                    torch.ones_like(max_weight),
                    weighted.objective.float(),
                    effective_sample_size(weights),
                    size,
                    size * max_weight,
                    samples.has_tokens.sum() - size,
                ]
            ),
            domain_sums=self._by_domain(samples, weights, used),
            peaks=torch.stack(
                [
                    (-losses).masked_fill(~used, -torch.inf).amax(),
                    losses.masked_fill(~used, -torch.inf).amax(),
                    max_weight,
                ]
            ),
        )
        self._totals = new if self._totals is None else self._totals.plus(new)
        self.last = weighted

    def _by_domain(self, samples: SampleSet, weights: Tensor, used: Tensor) -> Tensor:
        rows = torch.stack(
            [
                torch.where(used, samples.loss_sum.float(), 0.0),
                torch.where(used, samples.tokens.float(), 0.0),
                used.float(),
                weights,
                weights.square(),
            ]
        )
        sums = _sum_by_domain(rows, samples.domain, self.num_domains)
        weight, squares = sums[3], sums[4]
        sums[4] = torch.where(squares > 0, weight.square() / squares, 0.0)
        return sums

    def read(self) -> ReweightReport | None:
        """The interval so far; waits for the device. None when it holds no set."""
        if self._totals is None:
            return None
        sets, objective, ess, size, relative_max, nonfinite = self._totals.sums.tolist()
        low, high, max_weight = self._totals.peaks.tolist()
        domains = self._totals.domain_sums.t().tolist()
        return ReweightReport(
            objective=objective / sets,
            ess=ess / max(size, 1.0),
            max_weight=max_weight,
            relative_max_weight=relative_max / sets,
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
