"""`blend.txt`: how often Megatron draws from each domain, for its `--data-args-path`."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Literal

from megatron_rw.data.indexed.domains import DomainRecord
from megatron_rw.errors import UserError

BLEND_FILE = "blend.txt"


def blend_weights(
    records: Mapping[str, DomainRecord],
    by: Literal["tokens", "documents"] = "tokens",
    temperature: float = 1.0,
    given: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """Returns the weight of each domain: count^(1/temperature), or the one given.

    A temperature of 1 draws every token (or document) equally often, a higher one draws more often
    from small domains, and an infinite one from all domains alike. Weights that are given are above
    0 and of any sum; the temperature and what is counted are then ignored. The weights returned are
    above 0 and of sum 1, in the order of `records`.

    Raises:
        UserError: If the given weights are not those of the domains, or a weight would be 0.
    """
    if given is not None:
        check_weights(records, given)
        return _normalized({name: given[name] for name in records})
    counts = {name: getattr(record, by) for name, record in records.items()}
    for name, count in counts.items():
        if count == 0:
            raise UserError(f"the domain '{name}' has no {by} to weigh it by; leave it out")
    # In logarithms, since a low temperature takes a count beyond what a float can hold.
    logs = {name: math.log(count) / temperature for name, count in counts.items()}
    largest = max(logs.values(), default=0.0)
    weights = {name: math.exp(log - largest) for name, log in logs.items()}
    for name, weight in weights.items():
        if weight == 0:
            raise UserError(
                f"the temperature {temperature:g} of the blend leaves the domain '{name}' a weight "
                "of 0; give a higher one"
            )
    return _normalized(weights)


def check_weights(names: Collection[str], given: Mapping[str, float]) -> None:
    """Checks that every domain is given a weight, and nothing else.

    Raises:
        UserError: If not.
    """
    if set(given) != set(names):
        raise UserError(
            f"--blend-weights are of {', '.join(sorted(given))}, and the domains are "
            f"{', '.join(sorted(names))}; give each of them one"
        )


def _normalized(weights: Mapping[str, float]) -> dict[str, float]:
    total = math.fsum(weights.values())
    return {name: weight / total for name, weight in weights.items()}
