import dataclasses
import itertools
import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from megatron_rw.data import inspect_dataset
from megatron_rw.data.indexed import documents as blocks
from megatron_rw.data.indexed.domains import DomainsFile, TokenizerRecord
from megatron_rw.data.indexed.integrity import fingerprint
from megatron_rw.data.indexed.lengths import Lengths, check_picture
from megatron_rw.data.indexed.pair import HEADER
from megatron_rw.data.tokenizers import decoding
from megatron_rw.data.tokenizers.tokenizer import load_tokenizer, model_sha256
from megatron_rw.errors import UserError
from tests.data.conftest import make_texts
from tests.data.datasets import (
    TOKENIZER,
    Document,
    exit_status,
    record,
    write_dataset,
    write_directory,
)
from tests.data.tiny_tokenizers import sentencepiece_flags

EOD = 2


def inspect(*flags: object) -> int:
    decoding._load.cache_clear()
    return exit_status(inspect_dataset.main, *flags)


def report(capsys: pytest.CaptureFixture[str], *flags: object) -> tuple[int, list[dict[str, Any]]]:
    status = inspect(*flags, "--json")
    return status, json.loads(capsys.readouterr().out)["datasets"]


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
    return write_directory(tmp_path / "in", {"a": documents[:20], "b": documents[20:]}, made_by)


def test_a_report_tells_what_core_wrote(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "_DOCUMENTS", 2)
    documents: list[Document] = [[[1, 2], [3]], [[4]], [[9, 9, 9, 9]], [[5]]]
    write_directory(tmp_path, {"a": documents, "b": documents[:1]})
    status, found = report(capsys, tmp_path)
    assert status == 0
    assert [dataset["domain"] for dataset in found] == ["a", "b"]
    size = sum((tmp_path / f"a_text_document.{kind}").stat().st_size for kind in ("bin", "idx"))
    assert found[0] == {
        "prefix": f"{tmp_path}/a_text_document",
        "domain": "a",
        "dtype": "uint16",
        "sequences": 5,
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
    assert inspect(tmp_path / "a_text_document", tmp_path / "b_text_document") == 0
    text = capsys.readouterr().out
    assert f"  1               2 {'#' * 40}\n" in text
    assert f"2-3               1 {'#' * 20}\n" in text
    assert text.count("domain '") == 2


def test_every_token_is_checked_on_request(
    corpus: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "_BYTES", 100)
    status, found = report(capsys, corpus, "--check")
    records = DomainsFile.load(corpus / "domains.json").domains
    assert status == 0
    assert [dataset["without_eod"] for dataset in found] == [7, 3]
    assert [dataset["eod"] for dataset in found] == [EOD, EOD]
    assert [dataset["max_token_id"] for dataset in found] == [
        entry.max_token_id for entry in records.values()
    ]
    assert inspect(corpus, "--check") == 0
    assert "without EOD  7 (token 2)" in capsys.readouterr().out
    (corpus / "domains.json").unlink()
    assert inspect(corpus, "--check") == 0
    assert "without EOD  not known: give --tokenizer-model" in capsys.readouterr().out


ONE: list[Document] = [[[1, 2, 3]], [[4], [5, 6]]]


def change(path: Path, place: int, value: bytes) -> None:
    data = bytearray(path.read_bytes())
    data[place : place + len(value)] = value
    path.write_bytes(data)


def claim(directory: Path, **claims: Any) -> None:
    content = DomainsFile.load(directory / "domains.json")
    changed = dataclasses.replace(content.domains["a"], **claims)
    DomainsFile(content.tokenizer, {"a": changed}).save(directory / "domains.json")


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda d: (d / "a_text_document.bin").unlink(), "a_text_document.bin: no such file"),
        (lambda d: change(d / "a_text_document.idx", 0, b"x"), "is no index of a dataset"),
        (
            lambda d: change(d / "a_text_document.idx", HEADER.size + 20, struct.pack("<q", 2)),
            "document 1 does not begin where the lengths of those before it say",
        ),
        (
            lambda d: change(d / "a_text_document.bin", 2, struct.pack("<H", 4096)),
            "the largest token id is 4096, and the vocabulary has 4096",
        ),
        (
            lambda d: write_dataset(d / "a_text_document", [[[1, -5, 3]], [[6], [5, 2]]], np.int32),
            "a token id is -5",
        ),
        (lambda d: claim(d, documents=3), "documents is 2, and domains.json says 3"),
        (lambda d: claim(d, tokens=7), "tokens is 6, and domains.json says 7"),
        (lambda d: claim(d, max_token_id=5), "max_token_id is 6, and domains.json says 5"),
    ],
)
def test_what_is_wrong_is_told_and_the_rest_looked_at(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], spoil: Any, problem: str
) -> None:
    good = write_dataset(tmp_path / "good", ONE)
    spoil(write_directory(tmp_path / "in", {"a": ONE}))
    status, found = report(capsys, tmp_path / "in", good, "--check")
    assert status == 1
    assert problem in found[0]["problems"][0]
    assert found[1]["problems"] == []
    assert inspect(tmp_path / "in", "--check") == 1
    assert "  PROBLEM: " in capsys.readouterr().out


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


def test_a_picture_is_drawn(corpus: Path, tmp_path: Path) -> None:
    assert inspect(corpus, "--picture", tmp_path / "lengths.png") == 0
    with Image.open(tmp_path / "lengths.png") as picture:
        colors = picture.convert("RGB").getcolors(1 << 20)
    # White, black, and a line for each of the two domains.
    assert sum(count > 500 for count, _ in colors or []) >= 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "lengths.png"]


def test_a_picture_that_cannot_be_drawn_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"lengths.txt: no kind of picture; name it \."):
        check_picture(tmp_path / "lengths.txt")
    with pytest.raises(UserError, match="there is no directory"):
        check_picture(tmp_path / "gone" / "lengths.png")
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(UserError, match="not installed; run: pip install matplotlib"):
        check_picture(tmp_path / "lengths.png")


def test_a_document_is_decoded(
    corpus: Path, tmp_path: Path, texts: list[str], model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = load_tokenizer(sentencepiece_flags(model))
    for name, number, text in (("a", 0, texts[0]), ("a", 19, texts[19]), ("b", 4, texts[24])):
        prefix = corpus / f"{name}_text_document"
        assert inspect(prefix, "--document", number) == 0
        ids = tokenizer.encode_batch([text])[0].tolist()
        assert capsys.readouterr().out == tokenizer.detokenize(ids) + "\n"
        assert inspect(prefix, "--document", number, "--ids", "--json") == 0
        found = json.loads(capsys.readouterr().out)
        ending = [EOD] if texts.index(text) % 3 else []
        assert found == {"prefix": str(prefix), "document": number, "ids": ids + ending}
    prefix = write_dataset(tmp_path / "parts", [[[5]], [ids[:3], ids[3:]], [[6]]])
    assert inspect(prefix, "--document", 1, "--tokenizer-model", model) == 0
    assert capsys.readouterr().out == tokenizer.detokenize(ids) + "\n"


def test_another_tokenizer_than_recorded_is_told(
    corpus: Path, tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    content = DomainsFile.load(corpus / "domains.json")
    changed = dataclasses.replace(content.tokenizer, sha256="ab" * 32)
    DomainsFile(changed, content.domains).save(corpus / "domains.json")
    prefix = corpus / "a_text_document"
    assert inspect(prefix, "--document", 0) == 0
    error = capsys.readouterr().err
    assert f"warning: {model} is not the tokenizer that made this dataset" in error
    assert model_sha256(model) in error
    assert "abab" in error
    gone = dataclasses.replace(content.tokenizer, model=str(tmp_path / "gone.model"))
    DomainsFile(gone, content.domains).save(corpus / "domains.json")
    assert inspect(prefix, "--document", 0) == 2
    assert "gone.model, the tokenizer that domains.json names, is not" in capsys.readouterr().err
    assert inspect(prefix, "--document", 0, "--tokenizer-model", model) == 0
    assert "warning" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["in", "--document", "0"], "--document: there are 2 datasets; give one of in/a_text"),
        (["in/a_text_document", "--document", "20"], "has documents 0 to 19"),
        (["in/a_text_document", "--document", "-1"], "has documents 0 to 19"),
        (["bare", "--document", "0"], "no domains.json tells which tokenizer"),
        (["bare", "--find", "a"], "no domains.json tells which tokenizer"),
        (["gone"], "gone: neither a directory nor a dataset's path"),
        (["."], ".: has no datasets"),
        ("a --document 1 --check".split(), "--check and --picture go with the report only"),
        ("a --ids".split(), "--ids goes with --document"),
        ("a --document 1 --find x".split(), "--find"),
    ],
)
def test_what_cannot_be_shown_is_told(
    corpus: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    flags: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    if flags[0] == "bare":
        write_dataset(tmp_path / "bare", ONE)
    assert inspect(*flags) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error


def test_an_id_beyond_the_vocabulary_cannot_be_decoded(
    tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    prefix = write_dataset(tmp_path / "a", [[[1, 400]]])
    assert inspect(prefix, "--document", 0, "--tokenizer-model", model) == 2
    assert "a token id is 400, and the tokenizer has 400" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["345", "very from eas", "日本", "café", "not in any of them"])
def test_documents_that_contain_a_text_are_listed(
    corpus: Path,
    texts: list[str],
    model: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    text: str,
) -> None:
    monkeypatch.setattr(blocks, "_DOCUMENTS", 7)
    tokenizer: Any = load_tokenizer(sentencepiece_flags(model))
    decoded = [
        tokenizer.detokenize(tokenizer.encode_batch([original])[0].tolist()) for original in texts
    ]
    containing = [
        (str(corpus / f"{'a' if i < 20 else 'b'}_text_document"), i % 20, document.count(text))
        for i, document in enumerate(decoded)
        if text in document
    ]
    assert (text == "not in any of them") == (not containing)
    assert inspect(corpus, "--find", text, "--json") == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(f["prefix"], f["document"], f["count"]) for f in found] == containing
    assert all(text in f["context"] and len(f["context"]) <= len(text) + 80 for f in found)
    assert inspect(corpus, "--find", text) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(containing)


def test_a_reader_that_has_seen_enough_is_no_error(tmp_path: Path) -> None:
    prefixes = [str(write_dataset(tmp_path / f"{number}", ONE)) for number in range(30)]
    process = subprocess.Popen(
        [sys.executable, "tools/inspect_dataset.py", *prefixes],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={"PYTHONPATH": "."},
    )
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == 0
