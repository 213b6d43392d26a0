import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_rw.data.indexed.domains import DomainRecord, DomainsFile, TokenizerRecord
from megatron_rw.data.indexed.output import blend_weights, check_output_dir, publish
from megatron_rw.errors import UserError
from tests.data.datasets import TOKENIZER, files, write_dataset

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


def put(out: Path, scratch: Path, names: str, tokenizer: TokenizerRecord | None) -> list[str]:
    """Publishes a dataset of each name, and returns the names of the files that are there then."""
    for name in names:
        write_dataset(scratch / f"{name}_text_document", [[[len(names)]]])
    there = records(dict.fromkeys(names, 1))
    publish(scratch, out, there, blend_weights(there), tokenizer)
    assert list(scratch.iterdir()) == []
    return sorted(files(out))


def test_finished_datasets_replace_those_that_were_there(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").touch()
    for turn, names in enumerate(("abc", "bd")):
        assert check_output_dir(out, overwrite=turn > 0) == out
        pairs = [f"{name}_text_document.{kind}" for name in names for kind in ("bin", "idx")]
        expected = sorted(["blend.txt", "domains.json", "mine.txt", *pairs])
        assert put(out, tmp_path / str(turn), names, TOKENIZER) == expected
        loaded = DomainsFile.load(out / "domains.json")
        assert loaded == DomainsFile(TOKENIZER, records(dict.fromkeys(names, 1)))
        assert (out / "b_text_document.bin").read_bytes() == bytes([len(names), 0])
    lines = [f"0.5 {out}/b_text_document", f"0.5 {out}/d_text_document"]
    assert (out / "blend.txt").read_text().splitlines() == lines


def test_a_directory_that_cannot_be_filled_is_refused(tmp_path: Path) -> None:
    # Without a tokenizer there is no domains.json.
    names = ["a_text_document.bin", "a_text_document.idx", "blend.txt"]
    assert put(tmp_path, tmp_path / "0", "a", None) == names
    with pytest.raises(UserError, match=r"holds datasets already \(blend\.txt\); give another"):
        check_output_dir(tmp_path, overwrite=False)
    (tmp_path / "domains.json").write_text("{")
    with pytest.raises(UserError, match=r"domains\.json: not JSON"):
        check_output_dir(tmp_path, overwrite=True)
    with pytest.raises(UserError, match=r"Megatron splits blend\.txt at white space"):
        check_output_dir(tmp_path / "a b", overwrite=True)
