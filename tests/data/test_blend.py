import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_rw.data.indexed.domains import DomainRecord
from megatron_rw.data.indexed.output import blend_weights
from megatron_rw.errors import UserError

COUNTS = st.dictionaries(st.text("abc", min_size=1), st.integers(1, 10**13), min_size=1, max_size=6)


def records(counts: dict[str, int]) -> dict[str, DomainRecord]:
    return {
        name: DomainRecord(f"{name}_text_document", count * 7 % 1000 + 1, count, 5)
        for name, count in counts.items()
    }


@given(counts=COUNTS, temperature=st.floats(0.1, 1000) | st.just(math.inf))
def test_weights_are_in_proportion_to_counts(counts: dict[str, int], temperature: float) -> None:
    weights = blend_weights(records(counts), "tokens", temperature)
    assert list(weights) == list(counts)
    assert math.fsum(weights.values()) == pytest.approx(1)
    largest = max(counts, key=lambda name: counts[name])
    for name, count in counts.items():
        ratio = (count / counts[largest]) ** (1 / temperature)
        assert weights[name] / weights[largest] == pytest.approx(ratio, rel=1e-9)


def test_documents_are_counted_and_weights_given_on_request() -> None:
    there = records({"a": 10, "b": 40})
    assert blend_weights(there, "documents") == pytest.approx({"a": 71 / 352, "b": 281 / 352})
    weights = blend_weights(there, given={"b": 3, "a": 1})
    assert list(weights.items()) == [("a", 0.25), ("b", 0.75)]


@pytest.mark.parametrize(
    ("counts", "how", "message"),
    [
        ({"a": 1, "b": 1}, {"given": {"a": 1, "b": 1, "wki": 1}}, "are of a, b, wki, and the"),
        ({"a": 1, "b": 1}, {"given": {"a": 1}}, "are of a, and the domains are a, b; give each"),
        ({"a": 10**9, "b": 1}, {"temperature": 0.01}, "'b' a weight of 0; give a higher one"),
        ({"a": 1, "b": 0}, {}, "the domain 'b' has no tokens to weigh it by; leave it out"),
    ],
)
def test_weights_that_cannot_be_are_refused(
    counts: dict[str, int], how: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        blend_weights(records(counts), **how)
