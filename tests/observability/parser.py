"""A strict reader of Prometheus' text format, written from its specification."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

_NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
_LABEL = r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\\n]|\\\\|\\"|\\n)*)"'
_SAMPLE = re.compile(rf"({_NAME})(?:\{{({_LABEL}(?:,{_LABEL})*)\}})? (\S+)")
_NUMBER = re.compile(r"[+-]?\d+(\.\d+)?(e[+-]?\d+)?|NaN|[+-]Inf")
_ESCAPES = {r"\\": "\\", r"\"": '"', r"\n": "\n"}

Labels = frozenset[tuple[str, str]]


@dataclass
class Metric:
    kind: str
    text: str
    samples: dict[Labels, float] = field(default_factory=dict)

    @property
    def value(self) -> float:
        """Of a metric without labels."""
        return self.samples[frozenset()]

    def of(self, **labels: str) -> float:
        return self.samples[frozenset(labels.items())]


def parse(text: str) -> dict[str, Metric]:
    """Metrics by name; AssertionError where the format, or a convention of names, is broken."""
    assert text.endswith("\n")
    metrics: dict[str, Metric] = {}
    lines = iter(text[:-1].split("\n"))
    for line in lines:
        if line.startswith("# "):
            help_ = re.fullmatch(rf"# HELP ({_NAME}) (.+)", line)
            type_ = re.fullmatch(rf"# TYPE ({_NAME}) (gauge|counter)", next(lines))
            assert help_, line
            assert type_, line
            name = type_[1]
            assert help_[1] == name
            assert name not in metrics, "the samples of a metric are not together"
            assert name.endswith("_total") == (type_[2] == "counter"), name
            metrics[name] = Metric(type_[2], _unescaped(help_[2]))
            continue
        sample = _SAMPLE.fullmatch(line)
        assert sample, line
        # Written below the header of its own metric.
        assert sample[1] == list(metrics)[-1], line
        labels = [(key, _unescaped(text)) for key, text in re.findall(_LABEL, sample[2] or "")]
        assert len(dict(labels)) == len(labels), line
        assert _NUMBER.fullmatch(sample[sample.re.groups]), line
        samples = metrics[sample[1]].samples
        assert frozenset(labels) not in samples, f"twice: {line}"
        samples[frozenset(labels)] = float(sample[sample.re.groups])
    assert all(metric.samples for metric in metrics.values())
    return metrics


def _unescaped(text: str) -> str:
    return re.sub(r"\\.", lambda found: _ESCAPES[found[0]], text)
