import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_rw.data.indexed.domains import DomainRecord, DomainsFile, TokenizerRecord
from megatron_rw.data.indexed.output import blend_weights, check_output_dir, publish
from megatron_rw.data.indexed.pair import PairWriter
from megatron_rw.errors import UserError

TOKENIZER = TokenizerRecord("SentencePieceTokenizer", "t/bpe.model", "ab" * 32, 4096)
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


@pytest.mark.parametrize("given", [{"a": 1, "b": 1, "wki": 1}, {"a": 1}])
def test_every_domain_and_nothing_else_is_given_a_weight(given: dict[str, float]) -> None:
    with pytest.raises(UserError, match=f"are of {', '.join(given)}, and the domains are a, b"):
        blend_weights(records({"a": 1, "b": 1}), given=given)


def test_a_weight_of_0_is_an_error() -> None:
    with pytest.raises(UserError, match="leaves the domain 'b' a weight of 0; give a higher one"):
        blend_weights(records({"a": 10**9, "b": 1}), temperature=0.01)
    with pytest.raises(UserError, match="the domain 'b' has no tokens to weigh it by"):
        blend_weights(records({"a": 1, "b": 0}))


def put(output_dir: Path, scratch: Path, names: str, tokenizer: TokenizerRecord | None) -> None:
    scratch.mkdir()
    for name in names:
        with PairWriter(scratch / f"{name}_text_document", np.uint16) as writer:
            writer.write_tokens(np.array([len(names)], np.uint16))
            writer.add_documents(np.array([1]))
            writer.finalize()
    there = records(dict.fromkeys(names, 1))
    publish(scratch, output_dir, there, blend_weights(there), tokenizer)


def test_finished_datasets_replace_those_that_were_there(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").touch()
    for turn, names in enumerate(("abc", "bd")):
        assert check_output_dir(out, overwrite=turn > 0) == out
        put(out, tmp_path / str(turn), names, TOKENIZER)
        assert sorted(path.name for path in out.iterdir()) == sorted(
            ["blend.txt", "domains.json", "mine.txt"]
            + [f"{name}_text_document.{kind}" for name in names for kind in ("bin", "idx")]
        )
        loaded = DomainsFile.load(out / "domains.json")
        assert loaded == DomainsFile(TOKENIZER, records(dict.fromkeys(names, 1)))
        assert (out / "b_text_document.bin").read_bytes() == bytes([len(names), 0])
        assert list(tmp_path.joinpath(str(turn)).iterdir()) == []
    assert (
        out / "blend.txt"
    ).read_text() == f"0.5 {out}/b_text_document\n0.5 {out}/d_text_document\n"


def test_without_a_tokenizer_there_is_no_domains_file(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    put(tmp_path / "out", tmp_path / "0", "a", None)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "a_text_document.bin", "a_text_document.idx", "blend.txt",
    ]  # fmt: skip
    with pytest.raises(UserError, match=r"holds datasets already \(blend\.txt\); give another"):
        check_output_dir(tmp_path / "out", overwrite=False)


def test_a_directory_that_cannot_be_filled_is_refused(tmp_path: Path) -> None:
    (tmp_path / "domains.json").write_text("{")
    with pytest.raises(UserError, match=r"domains\.json: not JSON"):
        check_output_dir(tmp_path, overwrite=True)
    with pytest.raises(UserError, match=r"Megatron splits blend\.txt at white space"):
        check_output_dir(tmp_path / "a b", overwrite=True)
