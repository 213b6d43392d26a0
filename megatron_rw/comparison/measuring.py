"""What the pairs of an arm have measured, each by itself and together."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from megatron_rw.comparison.inference import Estimate, estimate
from megatron_rw.comparison.pairing import Pair
from megatron_rw.comparison.runs import LOSS, Run


@dataclass(frozen=True)
class PairResult:
    """A pair's final measures, and the differences of its curves of `LOSS` by tokens.

    `tokens_to_baseline` is the share of the baseline's tokens at which the run's curve reaches the
    end of the baseline's, or None if it does not. It needs evaluations: the rise and fall of
    validations is also that of their text. Tokens count from the runs' beginning.
    """

    unit: str
    run: str
    baseline: str
    measures: Mapping[str, float]
    baseline_measures: Mapping[str, float]
    tokens_to_baseline: float | None
    weight_ratios: Mapping[str, float]
    curve: Mapping[int, float]

    def difference(self, measure: str = LOSS) -> float:
        """The run's value minus the baseline's."""
        return self.measures[measure] - self.baseline_measures[measure]


@dataclass(frozen=True)
class Summary:
    """The pairs of an arm, and their means.

    `differences` are those from the baseline and `values` the arm's own, by measure. `reached`
    counts the pairs with a `tokens_to_baseline`, whose mean is None unless all have one.
    """

    pairs: tuple[PairResult, ...]
    differences: Mapping[str, Estimate]
    values: Mapping[str, float]
    weight_ratios: Mapping[str, float]
    tokens_to_baseline: float | None
    reached: int
    curve: Mapping[int, Estimate]

    @property
    def loss(self) -> Estimate:
        """The difference that decides."""
        return self.differences[LOSS]


def measure(pair: Pair, noise_domains: str, evaluated: bool) -> PairResult:
    """Measures a pair, by the runs' evaluations or their last validations."""
    ours, theirs = (_curve(run, noise_domains, evaluated) for run in (pair.run, pair.baseline))
    shares = _share_to_reach(ours, *list(theirs.items())[-1]) if evaluated else None
    return PairResult(
        unit=pair.unit,
        run=str(pair.run.folder),
        baseline=str(pair.baseline.folder),
        measures=_final(pair.run, noise_domains, evaluated),
        baseline_measures=_final(pair.baseline, noise_domains, evaluated),
        tokens_to_baseline=shares,
        weight_ratios=pair.run.weight_ratios,
        curve={at: loss - theirs[at] for at, loss in ours.items() if at in theirs},
    )


def summarize(pairs: Sequence[PairResult]) -> Summary:
    """Averages the pairs of an arm.

    Several pairs of one trunk, with other seeds, share much of what chance does. Their differences
    are averaged first, so that n counts trunks.
    """
    both = [pair.measures.keys() & pair.baseline_measures.keys() for pair in pairs]
    shares = [p.tokens_to_baseline for p in pairs if p.tokens_to_baseline is not None]
    return Summary(
        pairs=tuple(pairs),
        differences={
            name: _by_unit(pairs, [pair.difference(name) for pair in pairs])
            for name in pairs[0].measures
            if all(name in names for names in both)
        },
        values=means(pair.measures for pair in pairs),
        weight_ratios=means(pair.weight_ratios for pair in pairs),
        tokens_to_baseline=fmean(shares) if len(shares) == len(pairs) else None,
        reached=len(shares),
        curve={
            at: _by_unit(pairs, [pair.curve[at] for pair in pairs])
            for at in pairs[0].curve
            if all(at in pair.curve for pair in pairs)
        },
    )


def means(found: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Returns the mean of every name that all mappings have."""
    first, *others = found
    return {
        name: fmean([value, *(other[name] for other in others)])
        for name, value in first.items()
        if all(name in other for other in others)
    }


def _by_unit(pairs: Sequence[PairResult], values: Sequence[float]) -> Estimate:
    units: dict[str, list[float]] = {}
    for pair, value in zip(pairs, values, strict=True):
        units.setdefault(pair.unit, []).append(value)
    return estimate([fmean(found) for found in units.values()])


def _final(run: Run, noise_domains: str, evaluated: bool) -> dict[str, float]:
    size = {} if run.ess is None else {"ess": run.ess}
    return {**run.records(evaluated)[-1].measures(noise_domains), **size}


def _curve(run: Run, noise_domains: str, evaluated: bool) -> dict[int, float]:
    """Returns the loss of each record by the tokens that led to it."""
    return {
        (record.iteration - run.begin) * run.tokens_per_step: record.measures(noise_domains)[LOSS]
        for record in run.records(evaluated)
    }


def _share_to_reach(curve: Mapping[int, float], total: int, target: float) -> float | None:
    """Returns where a curve first reaches the target, between two validations on a straight line.

    Before the first validation nothing is known, so that is the earliest place.
    """
    before: tuple[int, float] | None = None
    for at, loss in curve.items():
        if loss <= target and total > 0:
            if before is None:
                return at / total
            fraction = (before[1] - target) / (before[1] - loss)
            return (before[0] + fraction * (at - before[0])) / total
        before = at, loss
    return None
