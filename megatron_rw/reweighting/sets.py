"""Weights of a set of units: gathered from all ranks, or left where they are and reduced.

Sequences are gathered. Their weights are those of one call of the kernel, the same on every rank.
Documents and tokens stay on their ranks. The ranges of all ranks are reduced, and where the plan
needs more than the range, a histogram of `BINS` bins over it; from these every rank makes the same
plan, and another reduction sums up the weights that follow from it. With a given plan the weights
do not depend on the range, and both are reduced at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rw.kernels.options import Plan, Statistic, Units, UnitWeights, Weighting
from megatron_rw.kernels.torch_weights import (
    competing,
    finished,
    planned_exponents,
    planned_temperature,
)
from megatron_rw.kernels.weights import weigh_units
from megatron_rw.reweighting.units import ReduceGroup, Unit, UnitSet, UnitSums, begin_sum

BINS = 4096


@dataclass(frozen=True)
class WeightedSet:
    """A set and its weights.

    Sequences are those of all ranks, the same on each; documents and tokens are this rank's alone.
    The statistics are of the whole set in both cases.
    """

    units: UnitSet
    weights: Tensor  # `[n]`, w, in the order of the units.
    statistics: Tensor  # `[5]`, indexed by `megatron_rw.kernels.Statistic`.
    plan: Tensor  # `[5]` of this set, indexed by `megatron_rw.kernels.Plan`.
    temperature: Tensor | float  # r as it was used, on the device where the set decides it.
    tokens: Tensor  # Scalar, active tokens of the whole set.
    # `[n]` bool, signals that were clamped because they were outside the range of the plan that was
    # given; None if the plan is the set's own.
    beyond: Tensor | None = None

    @property
    def objective(self) -> Tensor:
        """Scalar, Σ w·l over the units that are here."""
        # 0·NaN is NaN, so units without weight are left out of the sum.
        return torch.where(self.weights > 0, self.weights * self.units.losses, 0.0).sum()

    def normalised(self) -> WeightedSet:
        """Returns the set with weights that sum to 1, or to 0 where there are none."""
        total = self.statistics[Statistic.TOTAL]
        divisor = total.clamp(min=torch.finfo(total.dtype).tiny)
        return dataclasses.replace(self, weights=self.weights / divisor)


@torch.no_grad()
def begin_set(
    sums: UnitSums,
    unit: Unit,
    by_tokens: bool,
    weighting: Weighting,
    ranks: ReduceGroup,
    given: Tensor | None = None,
    order: torch.Generator | None = None,
) -> Callable[[], WeightedSet]:
    """Begins to weight the set that this rank's units are part of.

    It returns a function that ends this and returns the set. Both calls are collective, and the
    host waits for the device in neither. If the units are sequences, or a plan is given, only the
    second call waits for other ranks.

    Sequences take one all-reduce. Documents and tokens take one of 2 numbers, unless a plan is
    given, one of 64 KiB where the set's own plan needs a histogram, and one of 8 numbers for each
    rank.

    Args:
        sums: Of this rank's units; of sequences over its own tokens, of documents over all.
        unit: What the sums are of.
        by_tokens: As in `UnitSet.of`.
        weighting: How weights follow from signals.
        ranks: Whose units compete.
        given: `[5]`, the plan of another set; the weights are not normalised then.
        order: Deals the weights of sequences to random ones of them, the same on every rank.
    """
    if unit != "sequence":
        here = UnitSet.of(sums, by_tokens, slice(0, sums.tokens.numel()))
        weighed = _begin_in_place(here, weighting, ranks, given, copies_of(unit, ranks))
        return lambda: _set_of(here, *weighed(), weighting, given, in_place=True)
    start = ranks.dp_rank * sums.tokens.numel()
    local = slice(start, start + sums.tokens.numel())
    gathered = sums.begin_gather(ranks)

    def end() -> WeightedSet:
        units = UnitSet.of(gathered(), by_tokens, local)
        signals = units.signals if order is None else _dealt(units, order)
        asked = Units(signals, units.active, units.base)
        found = weigh_units(asked, weighting, given)
        return _set_of(units, found, units.tokens.sum(), weighting, given, in_place=False)

    return end


def _set_of(
    units: UnitSet,
    found: UnitWeights,
    tokens: Tensor,
    weighting: Weighting,
    given: Tensor | None,
    *,
    in_place: bool,
) -> WeightedSet:
    beyond = None
    if given is not None:
        low, high = given[: Plan.HIGH + 1].to(units.signals)
        outside = (units.signals < low) | (units.signals > high)
        beyond = outside & units.active & (low <= high)
    plan = found.plan if given is None else given
    temperature = weighting.temperature
    if in_place or given is not None or weighting.target_ess is not None:
        temperature = planned_temperature(weighting, plan)
    return WeightedSet(units, *found, temperature, tokens, beyond)


def copies_of(unit: Unit, ranks: ReduceGroup) -> int:
    """Returns how many ranks of the group hold the same units, which are not gathered."""
    return ranks.cp_size if unit == "document" else 1


def _dealt(units: UnitSet, order: torch.Generator) -> Tensor:
    """Returns the signals of the units in the set, dealt to random ones of them."""
    active = units.active if units.base is None else units.active & (units.base > 0)
    chance = torch.rand(len(active), generator=order, device=active.device)
    # Both begin with the active units: in a random order, and in that of their places.
    dealt = chance.masked_fill(~active, 2.0).argsort()
    places = (~active).long().argsort(stable=True)
    signals = units.signals.clone()
    signals[places] = units.signals[dealt]
    return signals


def _begin_in_place(
    units: UnitSet, weighting: Weighting, ranks: ReduceGroup, given: Tensor | None, copies: int
) -> Callable[[], tuple[UnitWeights, Tensor]]:
    """Begins to weight units that stay on their ranks, and to count the tokens of all ranks.

    See `begin_set`.
    """
    signals, base, active = competing(Units(units.signals, units.active, units.base))
    ends = torch.stack([-signals, signals]).masked_fill(~active, -torch.inf).amax(dim=1)

    def plan_for(ends: Tensor) -> Tensor:
        return _common_plan(signals, base, active, ends, weighting, ranks, copies)

    if given is None:
        if ranks.group is not None:
            dist.all_reduce(ends, op=dist.ReduceOp.MAX, group=ranks.group)
        used = plan = plan_for(ends)
    else:
        used = given.to(signals)
    exponents = planned_exponents(signals, weighting, used)
    relative = exponents.exp().masked_fill(~active, 0.0)
    weights = base * relative
    own = [active.sum(), base.sum(), weights.sum(), (weights * relative).sum(), units.tokens.sum()]
    mine = torch.stack([*(each.to(base) for each in own), relative.amax(), *ends])
    every = mine[None]
    if ranks.group is not None:
        every = mine.new_zeros(ranks.size, len(mine))
        every[ranks.rank] = mine
    wait = begin_sum(every, ranks)

    def end() -> tuple[UnitWeights, Tensor]:
        *sums, tokens = wait()[:, :5].sum(dim=0) / copies
        largest, *all_ends = every[:, 5:].amax(dim=0)
        made = plan if given is None else plan_for(torch.stack(all_ends))
        return finished(weights, sums, largest, made, normalised=given is None), tokens

    return end


def _common_plan(
    signals: Tensor,
    base: Tensor,
    active: Tensor,
    ends: Tensor,
    weighting: Weighting,
    ranks: ReduceGroup,
    copies: int,
) -> Tensor:
    """Returns the plan of all ranks' units, `[5]`; `ends` are −smallest and largest signal."""
    low, high = -ends[0], ends[1]
    needs_histogram = (
        weighting.strategy == "topk"
        or weighting.range == "quantile"
        or weighting.target_ess is not None
        or weighting.max_weight is not None
    )
    if not needs_histogram:
        return weigh_units(Units(torch.stack([low, high])), weighting).plan
    width = ((high - low) / (BINS - 1)).clamp(min=torch.finfo(low.dtype).tiny)
    bins = ((signals - low) / width).nan_to_num(0.0).clamp(0, BINS - 2).long()
    bins = bins.masked_fill(signals >= high, BINS - 1)
    counted = torch.stack([active.double(), base.double()])
    if signals.is_cuda:
        # Sums of multiples of 2^-20 do not depend on the order in which a GPU adds them.
        counted = (counted * 2**20).round() / 2**20
    table = counted.new_zeros(2, BINS).scatter_add_(1, bins.expand(2, -1), counted)
    if ranks.group is not None:
        dist.all_reduce(table, group=ranks.group)
    counts, mass = (table / copies).to(signals.dtype)
    # Each edge is a little below its bin, so that rounding leaves none of its units out.
    steps = torch.arange(BINS, dtype=low.dtype, device=low.device) - 0.01
    edges = low + width * steps.clamp(min=0.0)
    edges[-1] = high
    histogram = Units(edges, counts > 0, mass, counts)
    # With a plan given, whichever it is, the one that is returned is made for other units.
    return weigh_units(histogram, weighting, ends.new_zeros(len(Plan))).plan
