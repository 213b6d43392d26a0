import json
import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_rw.data.indexed.domains import (
    DomainRecord,
    DomainsFile,
    domain_names,
    look_up,
)
from megatron_rw.errors import UserError
from tests.data.datasets import TOKENIZER

WIKI = DomainRecord("w_text_document", 185, 123456, 4095)
NAMES = st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=20)
COUNTS = st.integers(0, 2**60)


def wiki_file(directory: Path) -> Path:
    path = directory / "domains.json"
    DomainsFile(TOKENIZER, {"wiki": WIKI}).save(path)
    return path


@given(names=st.lists(NAMES, unique=True, max_size=5), counts=st.tuples(COUNTS, COUNTS, COUNTS))
def test_load_returns_what_was_saved(
    tmp_path: Path, names: list[str], counts: tuple[int, int, int]
) -> None:
    path = tmp_path / "domains.json"
    records = {f"domain {name}": DomainRecord(f"{name}_document", *counts) for name in names}
    saved = DomainsFile(TOKENIZER, records)
    saved.save(path)
    loaded = DomainsFile.load(path)
    assert loaded == saved
    assert list(loaded.domains) == list(records)
    assert [entry.name for entry in path.parent.iterdir()] == ["domains.json"]


def test_format_is_the_documented_one(tmp_path: Path) -> None:
    assert json.loads(wiki_file(tmp_path).read_text()) == {
        "version": 1,
        "tokenizer": {
            "type": "SentencePieceTokenizer",
            "model": "t/bpe.model",
            "sha256": "ab" * 32,
            "vocab_size": 4096,
        },
        "domains": {
            "wiki": {
                "prefix": "w_text_document",
                "documents": 185,
                "tokens": 123456,
                "max_token_id": 4095,
            }
        },
    }


@pytest.mark.parametrize(
    ("prefix", "name"),
    [
        ("/data/wiki_text_document", "wiki"),
        ("books_text_document", "books"),
        ("data/code_document", "code"),
        ("data/my_content_document", "my_content"),
        ("data/plain", "plain"),
        ("data/notes_text", "notes_text"),
        ("data/_document", "_document"),
    ],
)
def test_without_a_file_the_basename_names_the_domain(prefix: str, name: str) -> None:
    assert domain_names([prefix]) == [name]
    assert look_up([prefix])[0].record is None


def test_the_file_beside_the_data_names_the_domain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wiki_file(tmp_path)
    monkeypatch.chdir(tmp_path)
    prefixes = [
        "w_text_document",
        f"{tmp_path}/w_text_document",
        "x_text_document",
        "sub/w_document",
    ]
    assert domain_names(prefixes) == ["wiki", "wiki", "x", "w"]
    assert [dataset.record for dataset in look_up(prefixes)] == [WIKI, WIKI, None, None]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("{", "not JSON"),
        ("[]", "not a JSON object"),
        (lambda c: c.pop("version") and c, "version is missing"),
        (lambda c: c.update(version=2), "version 2, but only 1 is known"),
        (lambda c: c.update(tokenizer=[]), r"tokenizer is \[\], not an object"),
        (lambda c: c["tokenizer"].update(vocab_size="4096"), "tokenizer.vocab_size is '4096', not"),
        (lambda c: c["tokenizer"].update(vocab_size=True), "tokenizer.vocab_size is True, not an"),
        (lambda c: c.update(domains={"a": 1}), "domains.a is 1, not an object"),
        (lambda c: c["domains"]["wiki"].pop("tokens") and c, "domains.wiki.tokens is missing"),
        (lambda c: c["domains"]["wiki"].update(tokens=-1), r"domains.wiki.tokens is negative"),
        (lambda c: c["domains"]["wiki"].update(prefix="../w"), "domains.wiki.prefix is '../w'"),
        (
            lambda c: c["domains"].update(again=c["domains"]["wiki"]),
            "several domains have the prefix 'w_text_document'",
        ),
    ],
)
def test_a_malformed_file_is_an_error_that_names_it(
    tmp_path: Path, change: Any, message: str
) -> None:
    path = wiki_file(tmp_path)
    content = json.loads(path.read_text())
    path.write_text(change if isinstance(change, str) else json.dumps(change(content) or content))
    with pytest.raises(UserError, match=message) as caught:
        domain_names([f"{tmp_path}/w_text_document"])
    assert str(path) in str(caught.value)
    assert "tools/preprocess_data.py" in str(caught.value)


def test_each_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"part-{number:05}" for number in range(600)]
    for part in ("a", "b"):
        records = {name: DomainRecord(f"{name}_document", 1, 2, 3) for name in names}
        (tmp_path / part).mkdir()
        DomainsFile(TOKENIZER, records).save(tmp_path / part / "domains.json")
    prefixes = [f"{tmp_path}/{part}/{name}_document" for part in ("a", "b") for name in names]
    reading = Mock(side_effect=DomainsFile.load)
    monkeypatch.setattr(DomainsFile, "load", reading)
    started = time.process_time()
    datasets = look_up(prefixes)
    assert [dataset.domain for dataset in datasets] == names * 2
    assert all(dataset.record for dataset in datasets)
    assert {dataset.tokenizer for dataset in datasets} == {TOKENIZER}
    assert reading.call_count == 2
    assert time.process_time() - started < 2
