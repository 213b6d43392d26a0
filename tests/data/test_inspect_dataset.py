import dataclasses
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_rw.data import inspect_dataset
from megatron_rw.data.indexed import documents as blocks
from megatron_rw.data.indexed.domains import DomainRecord, DomainsFile, TokenizerRecord
from megatron_rw.data.indexed.inspection import Lengths
from megatron_rw.data.indexed.integrity import fingerprint
from megatron_rw.data.tokenizers import decoding
from megatron_rw.data.tokenizers.tokenizer import load_tokenizer, model_sha256
from tests.data.conftest import make_texts
from tests.data.datasets import (
    TOKENIZER,
    Document,
    Ended,
    call,
    record,
    write_dataset,
    write_directory,
)
from tests.data.tiny_tokenizers import sentencepiece_flags

EOD = 2


def inspect(*flags: object, status: int = 0) -> Ended:
    decoding._load.cache_clear()
    return call(inspect_dataset.main, *flags, status=status)


def report(*flags: object, status: int = 0) -> list[dict[str, Any]]:
    content: dict[str, list[dict[str, Any]]]
    content = json.loads(inspect(*flags, "--json", status=status).out)
    return content["datasets"]


@pytest.fixture
def texts() -> list[str]:
    return make_texts(30, 5)


@pytest.fixture
def corpus(tmp_path: Path, texts: list[str], model: str) -> Path:
    """A directory of two domains, of 20 and 10 texts; every third has no end-of-document token."""
    tokenizer = load_tokenizer(sentencepiece_flags(model))
    documents: list[Document] = [
        [[*tokenizer.encode_batch([text])[0].tolist(), *([EOD] if number % 3 else [])]]
        for number, text in enumerate(texts)
    ]
    digest = model_sha256(model)
    made_by = TokenizerRecord("SentencePieceTokenizer", model, digest, tokenizer.vocab_size)
    domains = {"a": documents[:20], "b": documents[20:]}
    return write_directory(tmp_path / "in", domains, tokenizer=made_by)


def test_a_report_tells_what_core_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "_DOCUMENTS", 2)
    documents: list[Document] = [[[1, 2, 3]], [[4]], [[9, 9, 9, 9]], [[5]]]
    write_directory(tmp_path, {"a": documents, "b": documents[:1]})
    found = report(tmp_path)
    assert [dataset["domain"] for dataset in found] == ["a", "b"]
    size = sum((tmp_path / f"a_text_document.{kind}").stat().st_size for kind in ("bin", "idx"))
    assert found[0] == {
        "prefix": f"{tmp_path}/a_text_document",
        "domain": "a",
        "dtype": "uint16",
        "documents": 4,
        "tokens": 9,
        "bytes": size,
        "fingerprint": fingerprint(f"{tmp_path}/a_text_document"),
        "record": dataclasses.asdict(record("a", documents)),
        "tokenizer": dataclasses.asdict(TOKENIZER),
        "lengths": {
            "shortest": 1,
            "mean": 2.25,
            "longest": 4,
            "histogram": [
                {"from": 1, "to": 1, "documents": 2},
                {"from": 2, "to": 3, "documents": 1},
                {"from": 4, "to": 7, "documents": 1},
            ],
        },
        "tokens_read": False,
        "max_token_id": None,
        "eod": None,
        "without_eod": None,
        "problems": [],
    }
    text = inspect(tmp_path / "a_text_document", tmp_path / "b_text_document").out
    assert f"  1               2 {'#' * 40}\n" in text
    assert f"2-3               1 {'#' * 20}\n" in text
    assert text.count("domain '") == 2


def test_every_token_is_checked_on_request(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "_BYTES", 100)
    records = DomainsFile.load(corpus / "domains.json").domains.values()
    found = report(corpus, "--check")
    assert [(dataset["eod"], dataset["without_eod"]) for dataset in found] == [(EOD, 7), (EOD, 3)]
    assert [d["max_token_id"] for d in found] == [entry.max_token_id for entry in records]
    assert "without EOD  7 (token 2)" in inspect(corpus, "--check").out
    (corpus / "domains.json").unlink()
    assert "without EOD  not known: give --tokenizer-model" in inspect(corpus, "--check").out


ONE: list[Document] = [[[1, 2, 3]], [[4, 5, 6]]]


def test_what_is_wrong_is_told_and_the_rest_looked_at(tmp_path: Path) -> None:
    good = write_dataset(tmp_path / "good", ONE)
    bad = write_dataset(
        tmp_path / "in" / "a_text_document", [[[1, -5, 4096]], [[6, 5, 2]]], np.int32
    )
    claims = DomainsFile(TOKENIZER, {"a": DomainRecord(bad.name, 3, 7, 5)})
    claims.save(tmp_path / "in" / "domains.json")
    found = report(tmp_path / "in", good, "--check", status=1)
    assert found[0]["problems"] == [
        f"{bad}.bin: a token id is -5",
        f"{bad}.bin: the largest token id is 4096, and the vocabulary has 4096",
        f"{bad}: documents is 2, and domains.json says 3",
        f"{bad}: tokens is 6, and domains.json says 7",
        f"{bad}: max_token_id is 4,096, and domains.json says 5",
    ]
    assert found[1]["problems"] == []
    assert inspect(tmp_path / "in", "--check", status=1).out.count("  PROBLEM: ") == 5


@given(st.lists(st.lists(st.integers(0, 1 << 40), max_size=9), max_size=4))
def test_lengths_are_counted_by_powers_of_two(parts: list[list[int]]) -> None:
    lengths = Lengths()
    for part in parts:
        lengths.add(np.array(part, np.int64))
    everything = list(itertools.chain.from_iterable(parts))
    bins = lengths.bins()
    assert sum(count for _, _, count in bins) == lengths.documents == len(everything)
    for low, high, count in bins:
        assert count == sum(low <= length <= high for length in everything)
    if everything:
        assert (lengths.shortest, lengths.longest) == (min(everything), max(everything))
        assert [low for low, _, _ in bins[1:]] == [high + 1 for _, high, _ in bins[:-1]]


def test_a_document_is_decoded(corpus: Path, tmp_path: Path, texts: list[str], model: str) -> None:
    tokenizer = load_tokenizer(sentencepiece_flags(model))
    for name, number, text in (("a", 0, texts[0]), ("a", 19, texts[19]), ("b", 4, texts[24])):
        prefix = corpus / f"{name}_text_document"
        ids = tokenizer.encode_batch([text])[0].tolist()
        assert inspect(prefix, "--document", number).out == tokenizer.detokenize(ids) + "\n"
        ending = [EOD] if texts.index(text) % 3 else []
        expected = {"prefix": str(prefix), "document": number, "ids": ids + ending}
        assert json.loads(inspect(prefix, "--document", number, "--ids", "--json").out) == expected
    prefix = write_dataset(tmp_path / "plain", [[[5]], [ids], [[6]]])
    decoded = inspect(prefix, "--document", 1, "--tokenizer-model", model)
    assert decoded.out == tokenizer.detokenize(ids) + "\n"


def test_samples_of_a_run_are_shown_as_text(corpus: Path, tmp_path: Path) -> None:
    """A unit of several tokens by itself, a single token after those before it."""
    path = tmp_path / "samples.jsonl"
    prefix = str(corpus / "b_text_document")
    where: dict[str, Any] = {
        "dataset": prefix,
        "document": 3,
        "iteration": 7,
        "weight": 2.5,
        "loss": 4.125,
    }
    ids = json.loads(inspect(prefix, "--document", 3, "--ids", "--json").out)["ids"]
    model = DomainsFile.load(corpus / "domains.json").tokenizer.model
    tokenizer = load_tokenizer(sentencepiece_flags(model))
    units = [(0, 9, "highest"), (20, 1, "lowest"), (3, 1, "lowest")]
    lines = [where | {"offset": o, "tokens": n, "which": which} for o, n, which in units]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = [json.loads(line) for line in inspect("--samples", path, "--json").out.splitlines()]
    assert found[0]["text"] == tokenizer.detokenize(ids[:9])
    for line, shown in zip(lines[1:], found[1:], strict=True):
        assert shown["before"] + shown["text"] == tokenizer.detokenize(ids[: line["offset"] + 1])
        assert len(shown["before"]) > len(shown["text"]) > 0
    text = inspect("--samples", path).out
    assert text.startswith(
        f"iteration 7, highest weight 2.5, loss 4.125: {prefix} --document 3, tokens 0 to 8\n"
        f"{found[0]['text']}\n"
    )
    assert f"{found[1]['before']}>>> {found[1]['text']}\n" in text
    path.write_text('{"dataset": "x"}\n')
    assert f"{path}:1: not a line" in inspect("--samples", path, status=2).error
    assert "--samples alone" in inspect(prefix, "--samples", path, status=2).error


def test_another_tokenizer_than_recorded_is_told(corpus: Path, model: str) -> None:
    content = DomainsFile.load(corpus / "domains.json")
    changed = dataclasses.replace(content.tokenizer, sha256="ab" * 32)
    show = (corpus / "a_text_document", "--document", 0)
    assert inspect(*show).err == ""
    DomainsFile(changed, content.domains).save(corpus / "domains.json")
    told = inspect(*show).err
    assert f"warning: {model} is not the tokenizer that made this dataset" in told
    assert model_sha256(model) in told
    assert "abab" in told


@pytest.mark.parametrize("text", ["345", "very from eas", "日本", "café", "not in any of them"])
def test_documents_that_contain_a_text_are_listed(
    corpus: Path, texts: list[str], model: str, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setattr(blocks, "_DOCUMENTS", 7)
    tokenizer = load_tokenizer(sentencepiece_flags(model))
    decoded = [tokenizer.detokenize(ids.tolist()) for ids in tokenizer.encode_batch(texts)]
    containing = [
        (str(corpus / f"{'a' if i < 20 else 'b'}_text_document"), i % 20, document.count(text))
        for i, document in enumerate(decoded)
        if text in document
    ]
    assert (text == "not in any of them") == (not containing)
    found = [
        json.loads(line) for line in inspect(corpus, "--find", text, "--json").out.splitlines()
    ]
    assert [(f["prefix"], f["document"], f["count"]) for f in found] == containing
    assert all(text in f["context"] and len(f["context"]) <= len(text) + 80 for f in found)
    assert len(inspect(corpus, "--find", text).out.splitlines()) == len(containing)


def test_a_reader_that_has_seen_enough_is_no_error(tmp_path: Path) -> None:
    prefixes = [str(write_dataset(tmp_path / f"{number}", ONE)) for number in range(30)]
    command = [sys.executable, "tools/inspect_dataset.py", *prefixes]
    process = subprocess.Popen(command, stdout=-1, stderr=-1, env={"PYTHONPATH": "."})
    assert process.stdout
    process.stdout.close()
    assert process.communicate()[1] == b""
    assert process.returncode == 0
