"""What a sample takes of each domain: the same of all, by weight, or in proportion to size."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence

from megatron_rw.data.text.chunks import Reading
from megatron_rw.data.text.sampling import Sample, divide
from megatron_rw.data.text.sources import Source
from megatron_rw.data.text.spread_reading import DocumentReader, Part, plan, volume
from megatron_rw.data.tokenizers.sentencepiece_training import sentences
from megatron_rw.errors import UserError

# Text is only a part of what is read of a line, and a domain of what a file holds.
READ_PER_KEPT = 16

DomainOf = Callable[[Source], str]


def parse_weights(values: Sequence[str]) -> dict[str, float]:
    """Parses `--domain-weights`.

    Args:
        values: Each `DOMAIN=WEIGHT`.

    Raises:
        UserError: For one that is not, or is given twice, or if none is above zero.
    """
    weights: dict[str, float] = {}
    for value in values:
        domain, _, number = value.rpartition("=")
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        if not domain or not 0 <= weight < math.inf:
            raise UserError(
                f"--domain-weights {value}: give DOMAIN=WEIGHT, the weight zero or more"
            )
        if domain in weights:
            raise UserError(f"--domain-weights {value}: {domain} is given twice; give it once")
        weights[domain] = weight
    if weights and not any(weights.values()):
        raise UserError("--domain-weights: all are 0; give one that is more")
    return weights


def plan_reading(
    sources: Sequence[Source],
    reading: Reading,
    domain_of: DomainOf | None,
    weights: Mapping[str, float] | None,
    limit: int,
) -> list[Part]:
    """Chooses what to read of the inputs for a sample.

    Args:
        sources: The inputs.
        reading: How they are read.
        domain_of: The domain of a source's documents; None if each document names its own.
        weights: Domain to weight; `{}` gives all the same, None is in proportion to size.
        limit: UTF-8 bytes of the sample.

    Raises:
        UserError: If sources name the domains and one has no weight, or some weight no source.
    """
    if domain_of is None or weights is None:
        return plan(sources, reading, READ_PER_KEPT * limit)
    groups: dict[str, list[Source]] = {}
    for source in sources:
        groups.setdefault(domain_of(source), []).append(source)
    if weights:
        for domain, group in groups.items():
            _check_weight(domain, weights, group[0])
        _check_domains(weights, groups)
        groups = {domain: group for domain, group in groups.items() if weights[domain] > 0}
    budgets = divide(
        [sum(map(volume, group)) for group in groups.values()],
        [weights.get(domain, 1.0) for domain in groups],
        limit,
    )
    return [
        part
        for group, budget in zip(groups.values(), budgets, strict=True)
        for part in plan(group, reading, READ_PER_KEPT * budget)
    ]


def draw_sample(
    parts: Sequence[Part],
    reader: DocumentReader,
    domain_of: DomainOf | None,
    weights: Mapping[str, float] | None,
    limit: int,
) -> Sample:
    """Reads the parts and keeps a sample of them.

    Args:
        parts: What to read.
        reader: Reads it.
        domain_of: As for `plan_reading`.
        weights: As for `plan_reading`.
        limit: UTF-8 bytes to keep.

    Raises:
        UserError: If too many lines are bad, a domain has no weight or a weight no domain.
    """
    sample = Sample(limit, weights)
    found = set()
    for part in parts:
        of_source = domain_of(part.task.source) if domain_of is not None else ""
        for of_document, text in reader.documents(part):
            domain = of_source if of_document is None else of_document
            if weights:
                found.add(domain)
                _check_weight(domain, weights, part.task.source)
                if weights[domain] == 0:
                    continue
            sample.add(domain, sentences(text), part.fraction)
    reader.finish()
    if domain_of is None and weights:
        _check_domains(weights, found)
    return sample


def _check_weight(domain: str, weights: Mapping[str, float], source: Source) -> None:
    if domain not in weights:
        raise UserError(
            f"--domain-weights: none for domain '{domain}' of {source.path}; add {domain}=WEIGHT "
            "(0 leaves it out)"
        )


def _check_domains(weights: Mapping[str, float], found: Collection[str]) -> None:
    for domain in weights:
        if domain not in found:
            raise UserError(
                f"--domain-weights: no domain '{domain}' in --input, which has "
                f"{', '.join(sorted(found))}; leave it out"
            )
