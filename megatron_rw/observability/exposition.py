"""Prometheus' text exposition format, version 0.0.4."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

Samples = Sequence[tuple[Mapping[str, str], float]]


@dataclass(frozen=True)
class Family:
    """A metric with its samples.

    Attributes:
        name: with unit and suffix as Prometheus has them.
        kind: the metric's type.
        text: what it is, for people.
        samples: labels and value of each.
    """

    name: str
    kind: Literal["gauge", "counter"]
    text: str
    samples: Samples

    def lines(self) -> Iterable[str]:
        """As exposed, without line ends."""
        yield f"# HELP {self.name} {_escaped(self.text)}"
        yield f"# TYPE {self.name} {self.kind}"
        for labels, value in self.samples:
            inner = ",".join(
                f'{name}="{_escaped(text, quotes=True)}"' for name, text in labels.items()
            )
            yield f"{self.name}{f'{{{inner}}}' if inner else ''} {_number(value)}"


def exposition(families: Iterable[Family]) -> str:
    """The text; a metric without a sample is left out."""
    return "".join(f"{line}\n" for family in families if family.samples for line in family.lines())


def _escaped(text: str, quotes: bool = False) -> str:
    text = text.replace("\\", r"\\").replace("\n", r"\n")
    return text.replace('"', r"\"") if quotes else text


def _number(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    return repr(value)
