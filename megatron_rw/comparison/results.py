"""The comparison of arms with a baseline: differences of paired runs, and what follows of them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import get_args

from megatron_rw.comparison.inference import (
    Verdict,
    decide,
    half_width,
    holm,
    rule,
    smallest_found,
)
from megatron_rw.comparison.measuring import PairResult, Summary, means, measure, summarize
from megatron_rw.comparison.pairing import Arms, Pair, differing, pair_runs
from megatron_rw.comparison.settings import Settings


@dataclass(frozen=True)
class ArmResult:
    """What can be said of an arm.

    `p_value` is Holm's. `band` is what half the interval of a mean of as many differences between
    runs of the baseline would be, None without such runs.
    """

    name: str
    verdict: Verdict
    p_value: float | None
    smallest_found: float | None
    band: float | None
    warnings: tuple[str, ...]
    summary: Summary

    @property
    def outcome(self) -> str:
        """The verdict, and whether all measures of all pairs are the same to the last bit."""
        same = all(found.sd == found.mean == 0.0 for found in self.summary.differences.values())
        return f"{self.verdict} (identical)" if same else self.verdict


@dataclass(frozen=True)
class Comparison:
    """The arms beside the baseline, in the order given, and the baseline's own means.

    `unit` is what is replicated, trunks, seeds or pairs. `chance_sd` is the standard deviation
    around 0 of the differences of `chance_pairs` pairs of baseline runs that differ in the seed
    alone, in nats. `in_tokens` is False if the runs do not tell their tokens: curves then count
    steps.
    """

    baseline: str
    baseline_values: Mapping[str, float]
    arms: tuple[ArmResult, ...]
    unit: str
    chance_sd: float | None
    chance_pairs: int
    in_tokens: bool
    margin: float
    rule: str
    warnings: tuple[str, ...]

    @property
    def headline(self) -> str:
        """The outcome by the rule, in a sentence."""
        sizes = sorted({arm.summary.loss.n for arm in self.arms})
        parts = []
        for verdict in get_args(Verdict):
            arms = [arm for arm in self.arms if arm.verdict == verdict]
            listed = ", ".join(f"{arm.name} {signed(arm.summary.loss.mean, 3)}" for arm in arms)
            names = f" ({listed})" if verdict in ("better", "worse") else ""
            one, several = ("has", "have") if "each" in verdict else ("is", "are")
            if arms:
                parts.append(f"{len(arms)} {one if len(arms) == 1 else several} {verdict}{names}")
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
    pairing = pair_runs(arms, settings.baseline, settings.pair_by)
    every = [*(pair for pairs in pairing.pairs.values() for pair in pairs), *pairing.chance]
    runs = {run.folder: run for pair in every for run in (pair.baseline, pair.run)}
    having = sum(run.evaluation is not None for run in runs.values())
    evaluated = having == len(runs)

    def measured(pairs: Sequence[Pair]) -> list[PairResult]:
        return [measure(pair, settings.noise_domains, evaluated) for pair in pairs]

    summaries = {name: summarize(measured(pairs)) for name, pairs in pairing.pairs.items()}
    adjusted = holm([summary.loss.p_value for summary in summaries.values()])
    chance = [pair.difference() for pair in measured(pairing.chance)]
    chance_sd = math.sqrt(fmean(d * d for d in chance)) if chance else None
    results = []
    for (name, summary), p_value in zip(summaries.items(), adjusted, strict=True):
        wrong, warnings = _warnings(pairing.pairs[name], evaluated)
        sd, n = summary.loss.sd, summary.loss.n
        arm = ArmResult(
            name=name,
            verdict="not comparable" if wrong else decide(summary.loss, p_value, settings.margin),
            p_value=None if wrong else p_value,
            smallest_found=None if sd is None else smallest_found(sd, n, len(summaries)),
            band=None if chance_sd is None else half_width(chance_sd, n, len(chance)),
            warnings=warnings,
            summary=summary,
        )
        results.append(arm)
    bases = {pair.baseline: pair.baseline_measures for s in summaries.values() for pair in s.pairs}
    trunks = any(pair.baseline.trunk for pair in every)
    mixed = f"{having} of {len(runs)} runs have an evaluation; the last validations are compared"
    return Comparison(
        baseline=settings.baseline,
        baseline_values=means(bases.values()),
        arms=tuple(results),
        unit="pair" if settings.pair_by == "order" else "trunk" if trunks else "seed",
        chance_sd=chance_sd,
        chance_pairs=len(chance),
        in_tokens=all(run.tokens_per_step > 1 for run in runs.values()),
        margin=settings.margin,
        rule=rule(settings.margin, len(results)),
        warnings=(
            *pairing.warnings,
            *((mixed,) if 0 < having < len(runs) else ()),
            *(f"{arm.name}: {text}" for arm in results for text in arm.warnings),
        ),
    )


def _warnings(pairs: Sequence[Pair], evaluated: bool) -> tuple[bool, tuple[str, ...]]:
    """Returns whether losses of pairs cannot be compared, and what differs, each thing once."""
    found = [differing(pair, evaluated) for pair in pairs]
    wrong = [f"not comparable: {text}" for _, texts in found for text in texts]
    others = [f"differs in more than the arm: {text}" for texts, _ in found for text in texts]
    return bool(wrong), tuple(dict.fromkeys(wrong + others))


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"
