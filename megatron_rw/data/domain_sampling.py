"""What a sample takes of each domain: the same of all, by weight, or in proportion to size."""

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from megatron_rw.data.command import InputError
from megatron_rw.data.sampling import Sample, divide
from megatron_rw.data.sentencepiece_training import sentences
from megatron_rw.data.spread_reading import Part, domain_of_file, plan, read_documents, volume

# Text is only a part of what is read of a line, and a domain of what a file holds.
READ_PER_KEPT = 16


def parse_weights(values: Sequence[str]) -> dict[str, float]:
    """Parses `--domain-weights`.

    Args:
        values: Each `DOMAIN=WEIGHT`.

    Raises:
        InputError: For one that is not, or is given twice, or if none is above zero.
    """
    weights: dict[str, float] = {}
    for value in values:
        domain, _, number = value.rpartition("=")
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        if not domain or not 0 <= weight < math.inf:
            raise InputError(
                f"--domain-weights {value}: give DOMAIN=WEIGHT, the weight zero or more"
            )
        if domain in weights:
            raise InputError(f"--domain-weights {value}: {domain} is given twice; give it once")
        weights[domain] = weight
    if weights and not any(weights.values()):
        raise InputError("--domain-weights: all are 0; give one that is more")
    return weights


def plan_reading(
    paths: Sequence[Path], domain_key: str | None, weights: Mapping[str, float] | None, limit: int
) -> list[Part]:
    """Chooses what to read of the inputs for a sample.

    Args:
        paths: The inputs.
        domain_key: Field of the domain; None takes it from the file's name.
        weights: Domain to weight; `{}` gives all the same, None is in proportion to size.
        limit: UTF-8 bytes of the sample.

    Raises:
        InputError: If files name the domains and some have no weight or some weights no domain.
    """
    if domain_key is not None or weights is None:
        return plan(paths, READ_PER_KEPT * limit)
    files: dict[str, list[Path]] = {}
    for path in paths:
        files.setdefault(domain_of_file(path), []).append(path)
    if weights:
        for domain, of_domain in files.items():
            _check_weight(domain, weights, of_domain[0])
        _check_domains(weights, files)
        files = {domain: of for domain, of in files.items() if weights[domain] > 0}
    budgets = divide(
        [sum(map(volume, of_domain)) for of_domain in files.values()],
        [weights.get(domain, 1.0) for domain in files],
        limit,
    )
    return [
        part
        for of_domain, budget in zip(files.values(), budgets, strict=True)
        for part in plan(of_domain, READ_PER_KEPT * budget)
    ]


def draw_sample(
    parts: Sequence[Part],
    json_key: str,
    domain_key: str | None,
    weights: Mapping[str, float] | None,
    limit: int,
) -> Sample:
    """Reads the parts and keeps a sample of them.

    Args:
        parts: What to read.
        json_key: Field of the text.
        domain_key: Field of the domain; None takes it from the file's name.
        weights: As for `plan_reading`.
        limit: UTF-8 bytes to keep.

    Raises:
        InputError: At a bad line, or for a domain without weight or a weight without domain.
    """
    sample = Sample(limit, weights)
    found = set()
    for part in parts:
        for domain, text in read_documents(part, json_key, domain_key):
            if weights:
                found.add(domain)
                _check_weight(domain, weights, part.path)
                if weights[domain] == 0:
                    continue
            sample.add(domain, sentences(text), part.fraction)
    if domain_key is not None and weights:
        _check_domains(weights, found)
    return sample


def _check_weight(domain: str, weights: Mapping[str, float], path: Path) -> None:
    if domain not in weights:
        raise InputError(
            f"--domain-weights: none for domain '{domain}' of {path}; add {domain}=WEIGHT "
            "(0 leaves it out)"
        )


def _check_domains(weights: Mapping[str, float], found: Collection[str]) -> None:
    for domain in weights:
        if domain not in found:
            raise InputError(
                f"--domain-weights: no domain '{domain}' in --input, which has "
                f"{', '.join(sorted(found))}; leave it out"
            )
