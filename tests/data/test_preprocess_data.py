import gzip
import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from megatron_rw.data import domains, preprocess_data
from megatron_rw.data.command import InputError
from megatron_rw.data.dataset_writer import DatasetWriter
from megatron_rw.data.encoding import Batch, Encoder, encode_in_order
from megatron_rw.data.tokenizer import fingerprint, optimal_dtype
from tests.data.conftest import make_texts, write_jsonl

EOD = 2


def preprocess(*flags: object) -> int:
    return preprocess_data.main([str(flag) for flag in flags])


def megatron_tokenize(model: str) -> Callable[[str], list[int]]:
    """The tokenizer as Megatron's training program builds it from its flags."""
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

    flags = SimpleNamespace(
        tokenizer_type="SentencePieceTokenizer",
        tokenizer_model=model,
        chat_template=None,
        tokenizer_sentencepiece_ignore_extra_whitespaces=True,
        tokenizer_sentencepiece_legacy=False,
        special_tokens=None,
        metadata_path=None,
        pad_vocab_size=False,
    )
    tokenize: Callable[[str], list[int]] = build_tokenizer(flags).tokenize
    return tokenize


def read_back(prefix: Path | str) -> tuple[Any, list[list[int]]]:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(str(prefix))
    assert list(dataset.document_indices) == list(range(len(dataset) + 1))
    return dataset, [dataset[index].tolist() for index in range(len(dataset))]


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture
def corpus(tmp_path: Path) -> list[Path]:
    """Two files that between them hold the domains a, b and c."""
    records = [
        {"text": text, "domain": "abc"[index % 3], "body": text.upper()}
        for index, text in enumerate(make_texts(60, 2))
    ]
    return [
        write_jsonl(tmp_path / "first.part0.jsonl", records[:35]),
        write_jsonl(tmp_path / "second.jsonl.gz", records[35:]),
    ]


def records_of(paths: list[Path]) -> list[dict[str, str]]:
    lines: list[bytes] = []
    for path in paths:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            lines += file
    return [json.loads(line) for line in lines]


def test_datasets_hold_what_the_tokenizer_makes(
    tmp_path: Path, corpus: list[Path], model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "deep" / "out"
    assert preprocess(
        "--input", *corpus, "--output-dir", out, "--tokenizer-model", model,
        "--domain-key", "domain", "--append-eod", "--workers", 1,
    ) == 0  # fmt: skip
    names = [f"{domain}_text_document.{kind}" for domain in "abc" for kind in ("bin", "idx")]
    assert sorted(files(out)) == sorted([*names, "blend.txt", "domains.json"])

    tokenize = megatron_tokenize(model)
    records = records_of(corpus)
    manifest = domains.DomainsFile.load(out / "domains.json")
    assert manifest.tokenizer == domains.TokenizerRecord(
        "SentencePieceTokenizer", model, hashlib.sha256(Path(model).read_bytes()).hexdigest(), 400
    )
    assert list(manifest.domains) == ["a", "b", "c"]
    for domain, record in manifest.domains.items():
        expected = [[*tokenize(r["text"]), EOD] for r in records if r["domain"] == domain]
        dataset, found = read_back(out / record.prefix)
        assert dataset.index.dtype == np.uint16
        assert found == expected
        assert record.documents == len(expected)
        assert record.tokens == sum(map(len, expected))
        assert record.max_token_id == max(map(max, expected))

    table = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in table] == ["domain", "a", "b", "c", "all"]
    text_bytes = sum(len(r["text"].encode()) for r in records)
    tokens = sum(record.tokens for record in manifest.domains.values())
    assert table[-1].split() == ["all", "60", f"{tokens:,}", f"{text_bytes / tokens:.2f}", "100.0%"]


def test_megatron_reads_the_blend(tmp_path: Path, corpus: list[Path], model: str) -> None:
    from megatron.core.datasets.utils import get_blend_from_list

    out = tmp_path / "out"
    preprocess(
        "--input", *corpus, "--output-dir", out, "--tokenizer-model", model, "--workers", 1
    )  # fmt: skip
    prefixes, weights = get_blend_from_list((out / "blend.txt").read_text().split())
    assert all(os.path.isabs(prefix) for prefix in prefixes)
    assert domains.domain_names(prefixes) == ["first", "second"]
    tokens = [sum(map(len, read_back(prefix)[1])) for prefix in prefixes]
    records = [domains.domain_record(prefix) for prefix in prefixes]
    assert [record.tokens for record in records if record] == tokens
    assert weights == pytest.approx([count / sum(tokens) for count in tokens], rel=1e-5)


def test_domain_by_file_key_choice_and_no_eod(
    tmp_path: Path, corpus: list[Path], model: str
) -> None:
    out = tmp_path / "out"
    preprocess(
        "--input", *corpus, "--output-dir", out, "--tokenizer-model", model, "--json-key", "body",
        "--workers", 1,
    )  # fmt: skip
    tokenize = megatron_tokenize(model)
    for path, domain in zip(corpus, ("first", "second"), strict=True):
        _, found = read_back(out / f"{domain}_text_document")
        assert found == [tokenize(record["body"]) for record in records_of([path])]


def test_workers_do_not_change_the_output(
    tmp_path: Path, corpus: list[Path], model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs = []
    for workers, batch_bytes in ((1, 1 << 19), (2, 700), (3, 1)):
        monkeypatch.setattr(preprocess_data, "_BATCH_BYTES", batch_bytes)
        out = tmp_path / "out"
        assert preprocess(
            "--input", *corpus, "--output-dir", out, "--tokenizer-model", model, "--overwrite",
            "--domain-key", "domain", "--append-eod", "--workers", workers,
        ) == 0  # fmt: skip
        outputs.append(files(out))
    assert outputs[0] == outputs[1] == outputs[2]


@settings(
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    documents=st.lists(
        st.tuples(st.text(st.characters(codec="utf-8"), min_size=1), st.sampled_from("xyz")),
        min_size=1,
        max_size=20,
    ),
    eod=st.booleans(),
    batch_bytes=st.integers(1, 300),
)
def test_any_text_is_stored_in_order(
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    model: str,
    documents: list[tuple[str, str]],
    eod: bool,
    batch_bytes: int,
) -> None:
    directory = tmp_path_factory.mktemp("any")
    records = [{"text": text, "d": domain} for text, domain in documents]
    path = write_jsonl(directory / "in.jsonl", records)
    monkeypatch.setattr(preprocess_data, "_BATCH_BYTES", batch_bytes)
    flags = ["--append-eod"] if eod else []
    assert preprocess(
        "--input", path, "--output-dir", directory / "out", "--tokenizer-model", model,
        "--domain-key", "d", "--workers", 1, *flags,
    ) == 0  # fmt: skip
    tokenize = megatron_tokenize(model)
    for domain in {domain for _, domain in documents}:
        _, found = read_back(directory / "out" / f"{domain}_text_document")
        texts = [text for text, of in documents if of == domain]
        assert found == [tokenize(text) + [EOD] * eod for text in texts]


GOOD = b'{"text": "a model", "domain": "d"}\n'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a', "invalid JSON (Unterminated string"),
        (b"[" * 100_000, "invalid JSON (maximum recursion depth"),
        (b'["text"]', "line 3: an array, not an object"),
        (b'{"txt": "a", "domain": "d"}', "no field 'text' (--json-key); the line has: domain, txt"),
        (b'{"text": 5, "domain": "d"}', "field 'text' (--json-key) is a number, not a string"),
        (b'{"text": null, "domain": "d"}', "is null, not a string"),
        (b'{"text": "", "domain": "d"}', "field 'text' (--json-key) is empty; remove the line"),
        (b'{"text": "\xff", "domain": "d"}', "not UTF-8 (invalid start byte at byte 10)"),
        (b'{"text": "a\\ud800", "domain": "d"}', "half of a surrogate pair at character 1"),
        (b'{"text": "a"}', "no field 'domain' (--domain-key)"),
        (b'{"text": "a", "domain": ""}', "field 'domain' (--domain-key) is empty"),
        (b'{"text": "a", "domain": "../d"}', "the domain '../d' cannot be part of a file name"),
        (b'{"text": "a", "domain": ".d"}', "the domain '.d' cannot be part of a file name"),
        (b'{"text": "a", "domain": "d\\n"}', "the domain 'd\\n' cannot be part of a file name"),
    ],
)
@pytest.mark.parametrize("workers", [1, 2])
def test_a_bad_line_stops_with_its_place(
    tmp_path: Path,
    model: str,
    capsys: pytest.CaptureFixture[str],
    line: bytes,
    message: str,
    workers: int,
) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(GOOD + b"\n" + line + b"\n" + b"{\n")
    out = tmp_path / "out"
    status = preprocess(
        "--input", path, "--output-dir", out, "--tokenizer-model", model,
        "--domain-key", "domain", "--workers", workers,
    )  # fmt: skip
    error = capsys.readouterr().err
    assert status == 2
    assert error.startswith(f"error: {path}, line 3: ")
    assert message in error
    assert error.count("\n") == 1
    assert files(out) == {}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("cut.jsonl.gz", gzip.compress(GOOD * 2000)[:-12], "damaged gzip data after line"),
        ("not.jsonl.gz", GOOD, "damaged gzip data after line 0 (Not a gzipped file"),
        ("empty.jsonl", b"\n \n", "no documents; leave the file out of --input"),
        ("-d.jsonl", GOOD, "the domain '-d' cannot be part of a file name here"),
        ("text.txt", GOOD, "only .jsonl and .jsonl.gz are read"),
    ],
)
def test_a_bad_file_stops_with_its_name(
    tmp_path: Path,
    model: str,
    capsys: pytest.CaptureFixture[str],
    name: str,
    content: bytes,
    message: str,
) -> None:
    good = tmp_path / "good.jsonl"
    good.write_bytes(GOOD)
    (tmp_path / name).write_bytes(content)
    out = tmp_path / "out"
    status = preprocess(
        "--input", good, tmp_path / name, "--output-dir", out, "--tokenizer-model", model,
        "--workers", 1,
    )  # fmt: skip
    error = capsys.readouterr().err
    assert status == 2
    assert error.startswith("error: ")
    assert name in error
    assert message in error
    assert not out.exists() or files(out) == {}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--input", "gone.jsonl"], "--input gone.jsonl: no such file"),
        (["--tokenizer-model", "gone.model"], "--tokenizer-model gone.model: no such file"),
        (["--tokenizer-model", __file__], "cannot be loaded as SentencePieceTokenizer"),
        (["--output-dir", "a b"], "Megatron splits blend.txt at white space"),
    ],
)
def test_a_bad_flag_stops_with_its_name(
    tmp_path: Path,
    model: str,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    flags: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.jsonl").write_bytes(GOOD)
    usual = ["--input", "in.jsonl", "--output-dir", "out", "--tokenizer-model", model]
    assert preprocess(*usual, *flags) == 2
    error = capfd.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: {flags[0]}")
    assert message in error
    assert sorted(files(tmp_path)) == ["in.jsonl"]


def test_zero_workers_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    usual = ["--input", "in.jsonl", "--output-dir", "out", "--tokenizer-model", "m"]
    with pytest.raises(SystemExit, match="2"):
        preprocess(*usual, "--workers", 0)
    assert "--workers must be at least 1" in capsys.readouterr().err


def test_datasets_are_replaced_only_when_asked_and_only_by_complete_ones(
    tmp_path: Path, corpus: list[Path], model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    usual = ("--output-dir", out, "--tokenizer-model", model, "--workers", 1)
    preprocess("--input", *corpus, *usual)
    before = files(out)

    assert preprocess("--input", corpus[0], *usual) == 2
    assert "holds datasets already; give another directory, or --overwrite" in (
        capsys.readouterr().err
    )
    bad = tmp_path / "first.jsonl"
    bad.write_bytes(GOOD + b"{")
    assert preprocess("--input", bad, *usual, "--overwrite") == 2
    assert files(out) == before

    assert preprocess("--input", corpus[0], *usual, "--overwrite", "--append-eod") == 0
    assert sorted(files(out)) == [
        "blend.txt", "domains.json", "first_text_document.bin", "first_text_document.idx",
    ]  # fmt: skip
    assert files(out)["first_text_document.bin"] != before["first_text_document.bin"]


class FakeTokenizer:
    """Makes a token of each number in a text; words stand for trouble."""

    eod = None

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[Any]]:
        dtype = optimal_dtype(self.vocab_size)
        return [np.array(self._tokenize(text), dtype) for text in texts]

    def detokenize(self, ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))

    def _tokenize(self, text: str) -> list[int]:
        if text == "die":
            os._exit(9)
        if text == "slow":
            time.sleep(0.3)
            return [0]
        return [int(word) for word in text.split()]


def batch(*texts: str) -> Batch:
    lines = [json.dumps({"text": text}).encode() for text in texts]
    return Batch(Path("f.jsonl"), list(enumerate(lines, start=1)))


def test_a_slow_batch_does_not_lose_its_place() -> None:
    encoder = Encoder(FakeTokenizer(100), "text", None, None)
    batches = [batch("slow")] + [batch(str(number)) for number in range(1, 20)]
    encoded = encode_in_order(iter(batches), encoder, 2)
    assert [item.ids.tolist() for item in encoded] == [[number] for number in range(20)]


def test_a_killed_worker_is_an_error_not_a_hang() -> None:
    encoder = Encoder(FakeTokenizer(100), "text", None, None)
    with pytest.raises(InputError, match="was killed, most likely for lack of memory"):
        list(encode_in_order(iter([batch("1"), batch("die"), batch("2")]), encoder, 2))


def test_text_that_makes_no_token_is_an_error() -> None:
    encoder = Encoder(FakeTokenizer(100), "text", None, 0)
    with pytest.raises(InputError, match=r"f\.jsonl, line 2: the tokenizer makes no token"):
        encoder(batch("1", " "))


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65499, np.uint16), (65500, np.int32)])
def test_the_vocabulary_chooses_the_dtype(
    tmp_path: Path, vocab_size: int, dtype: type[Any]
) -> None:
    assert optimal_dtype(vocab_size) is dtype
    encoder = Encoder(FakeTokenizer(vocab_size), "text", None, None)
    largest = vocab_size - 1
    with DatasetWriter(tmp_path, encoder.dtype) as writer:
        writer.add(encoder(batch(f"1 2 {largest}", "3")))
        assert writer.finalize()["f"].max_token_id == largest
    dataset, found = read_back(tmp_path / "f_text_document")
    assert dataset.index.dtype == dtype
    assert found == [[1, 2, largest], [3]]


def test_fingerprint_of_a_directory(tmp_path: Path) -> None:
    (tmp_path / "b").write_text("1")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "c").write_text("2")
    digest = [hashlib.sha256(text).hexdigest() for text in (b"1", b"2")]
    listing = f"{digest[1]}  a/c\n{digest[0]}  b\n"
    assert fingerprint(str(tmp_path)) == hashlib.sha256(listing.encode()).hexdigest()
