"""The comparison of arms with a baseline: differences of paired runs, and what follows of them."""

import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from statistics import fmean
from typing import Final, get_args

from megatron_rw.comparison.inference import (
    Verdict,
    decide,
    half_width,
    holm,
    rule,
    smallest_found,
)
from megatron_rw.comparison.measuring import PairResult, Summary, means, measure, summarize
from megatron_rw.comparison.pairing import Arms, Pair, Pairing, differing, pair_runs
from megatron_rw.comparison.settings import Settings
from megatron_rw.errors import UserError

_INCOMPARABLE: Final = "not comparable"


@dataclass(frozen=True)
class ArmResult:
    """What can be said of an arm.

    `p_value` is Holm's. `band` is that of `Chance` for as many differences, None without such runs.
    """

    name: str
    verdict: Verdict
    p_value: float | None
    smallest_found: float | None
    band: float | None
    summary: Summary

    @property
    def outcome(self) -> str:
        """The verdict, and whether all measures of all pairs are the same to the last bit."""
        same = all(found.sd == found.mean == 0.0 for found in self.summary.differences.values())
        return f"{self.verdict} (identical)" if same else self.verdict


@dataclass(frozen=True)
class Chance:
    """How far baseline runs of the same trunk and another seed are from each other.

    `sd` is the standard deviation around 0 of the differences of so many pairs, in nats. Those of
    a trunk share a run, so that trunks are its degrees of freedom.
    """

    pairs: int
    trunks: int
    sd: float | None

    def band(self, n: int) -> float | None:
        """Half the interval that a mean of n such differences has."""
        return None if self.sd is None else half_width(self.sd, n, self.trunks)


@dataclass(frozen=True)
class Comparison:
    """The arms beside the baseline, in the order given, and the baseline's own means.

    `unit` is what is replicated: a trunk or a seed. `evaluated` says whether evaluations are
    compared and not validations.
    """

    baseline: str
    baseline_values: Mapping[str, float]
    arms: tuple[ArmResult, ...]
    unit: str
    chance: Chance
    margin: float
    rule: str
    warnings: tuple[str, ...]
    evaluated: bool

    @property
    def headline(self) -> str:
        """The outcome by the rule, in a sentence."""
        if all(arm.summary.loss.n < 2 for arm in self.arms):
            against = f"{_count(len(self.arms), 'arm')} against {self.baseline}"
            return f"{against}, one run each: this cannot tell better from luck."
        sizes = sorted({arm.summary.loss.n for arm in self.arms})
        parts = []
        for verdict in get_args(Verdict):
            arms = [arm for arm in self.arms if arm.verdict == verdict]
            listed = "; ".join(f"{arm.name} {signed(arm.summary.loss.mean, 3)}" for arm in arms)
            names = f" ({listed})" if verdict in ("better", "worse") else ""
            if arms:
                parts.append(f"{len(arms)} {'is' if len(arms) == 1 else 'are'} {verdict}{names}")
        return (
            f"Of {_count(len(self.arms), 'arm')} against {self.baseline} over "
            f"{f'{sizes[0]} to ' if len(sizes) > 1 else ''}{_count(sizes[-1], self.unit)}, "
            f"{', '.join(parts)}."
        )


def signed(value: float, digits: int = 4) -> str:
    """Returns a difference with its sign."""
    return f"{value:+.{digits}f}".replace("-", "\N{MINUS SIGN}")


def compare(arms: Arms, settings: Settings) -> Comparison:
    """Compares the runs of all arms with the baseline's.

    Final measures come from evaluations if every run has one, and from the last validations
    otherwise. Differences of several seeds of a trunk are averaged first, see `summarize`. Raises a
    `UserError` if runs cannot be paired.
    """
    pairing = pair_runs(arms, settings.baseline)
    pairs = [pair for found in pairing.pairs.values() for pair in found]
    runs = {run.folder: run for p in (*pairs, *pairing.chance) for run in (p.baseline, p.run)}
    having = sum(bool(run.evaluations) for run in runs.values())
    evaluated = having == len(runs)
    warnings = list(pairing.warnings)
    if having and not evaluated:
        warnings.append(
            f"{having} of {len(runs)} runs have an evaluation; the last validations are compared"
        )
    for run in () if evaluated else runs.values():
        if not run.validations:
            raise UserError(f"{run.folder}: has an evaluation alone, and others have none")

    def measured(pairs: Sequence[Pair]) -> list[PairResult]:
        return [measure(pair, settings.noise_domains, evaluated) for pair in pairs]

    summaries = {name: summarize(measured(found)) for name, found in pairing.pairs.items()}
    wrong, like, unlike = _checked(pairing, evaluated)
    chance = _chance(measured(like))
    bases = {pair.baseline: pair.baseline_measures for s in summaries.values() for pair in s.pairs}
    trunks = any(pair.baseline.trunk for pair in pairs)
    return Comparison(
        baseline=settings.baseline,
        baseline_values=means(bases.values()),
        arms=_judge(summaries, wrong, chance, settings.margin),
        unit="trunk" if trunks else "seed",
        chance=chance,
        margin=settings.margin,
        rule=rule(settings.margin, len(summaries)),
        warnings=(*warnings, *unlike),
        evaluated=evaluated,
    )


def _checked(pairing: Pairing, evaluated: bool) -> tuple[set[str], list[Pair], list[str]]:
    """Returns the arms that are not comparable, the pairs that tell of chance, and warnings."""
    wrong, like, warnings = set(), [], []
    for name, pairs in pairing.pairs.items():
        unlike = [differing(pair, evaluated) for pair in pairs]
        wrong |= {name for _, essential in unlike if essential}
        for kind, texts in (
            (_INCOMPARABLE, [text for _, essential in unlike for text in essential]),
            ("differs in more than the arm", [text for other, _ in unlike for text in other]),
        ):
            if texts:
                warnings.append(f"{name}: {kind}: {'; '.join(dict.fromkeys(texts))}")
    for pair in pairing.chance:
        if essential := differing(pair, evaluated)[1]:
            warnings.append(f"{pair.run.folder}: left out of chance: {', '.join(essential)}")
        else:
            like.append(pair)
    return wrong, like, warnings


def _chance(pairs: Sequence[PairResult]) -> Chance:
    squares = [pair.difference() ** 2 for pair in pairs]
    sd = math.sqrt(fmean(squares)) if squares else None
    return Chance(len(squares), len({pair.unit for pair in pairs}), sd)


def _judge(
    summaries: Mapping[str, Summary],
    wrong: Set[str],
    chance: Chance,
    margin: float,
) -> tuple[ArmResult, ...]:
    """Returns the verdict on each arm, by one family of tests; `wrong` are not comparable."""
    tests = [None if name in wrong else s.loss.p_value for name, s in summaries.items()]
    return tuple(
        ArmResult(
            name=name,
            verdict=_INCOMPARABLE if name in wrong else decide(summary.loss, p_value, margin),
            p_value=p_value,
            smallest_found=smallest_found(summary.loss, len(summaries)),
            band=chance.band(summary.loss.n),
            summary=summary,
        )
        for (name, summary), p_value in zip(summaries.items(), holm(tests), strict=True)
    )


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"
