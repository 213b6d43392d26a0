import gzip
import hashlib
import json
from collections.abc import Callable
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from backports import zstd
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.utils import get_blend_from_list

from megatron_rw.data.indexed.domains import DomainRecord, DomainsFile, TokenizerRecord
from megatron_rw.data.text import chunks
from megatron_rw.data.tokenizers.library_tokenizer import build_core_tokenizer
from tests.data.conftest import Preprocess, make_texts, write_jsonl
from tests.data.datasets import datasets, files, fresh, read_dataset, write_dataset
from tests.data.tiny_tokenizers import sentencepiece_flags

EOD = 2
RECORDS = [
    {"text": text, "domain": "abc"[index % 3], "body": text.upper()}
    for index, text in enumerate(make_texts(60, 2))
]


type Tokenize = Callable[[str], list[int]]


@pytest.fixture(scope="session")
def tokenize(model: str) -> Any:
    """The tokenizer as Megatron's training program builds it from its flags."""
    return build_core_tokenizer(sentencepiece_flags(model)).tokenize


def domains(directory: Path) -> dict[str, DomainRecord]:
    return dict(DomainsFile.load(directory / "domains.json").domains)


@pytest.fixture
def many_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some fifty chunks instead of one, where files are as small as here."""
    monkeypatch.setattr(chunks, "_SMALLEST", 200)
    monkeypatch.setattr(chunks, "_LARGEST", 200)


@pytest.fixture
def corpus(tmp_path: Path) -> list[Path]:
    """Two files that between them hold the domains a, b and c."""
    return [
        write_jsonl(tmp_path / "first.part0.jsonl", RECORDS[:35]),
        write_jsonl(tmp_path / "second.jsonl.gz", RECORDS[35:]),
    ]


def test_datasets_hold_what_the_tokenizer_makes(
    tmp_path: Path, corpus: list[Path], model: str, run: Preprocess, tokenize: Tokenize
) -> None:
    out = tmp_path / "deep" / "out"
    table = run(corpus, out, "--domain-key domain --append-eod").out.splitlines()
    names = [f"{domain}_text_document.{kind}" for domain in "abc" for kind in ("bin", "idx")]
    assert sorted(files(out)) == sorted([*names, "blend.txt", "domains.json"])

    digest = hashlib.sha256(Path(model).read_bytes()).hexdigest()
    made_by = TokenizerRecord("SentencePieceTokenizer", model, digest, 400)
    assert DomainsFile.load(out / "domains.json").tokenizer == made_by
    records = domains(out)
    assert list(records) == ["a", "b", "c"]
    for domain, record in records.items():
        expected = [[*tokenize(r["text"]), EOD] for r in RECORDS if r["domain"] == domain]
        assert read_dataset(out / record.prefix, np.uint16) == [[ids] for ids in expected]
        counts = (len(expected), sum(map(len, expected)), max(map(max, expected)))
        assert (record.documents, record.tokens, record.max_token_id) == counts

    assert [line.split()[0] for line in table[:-1]] == ["domain", "a", "b", "c", "all"]
    text_bytes = sum(len(r["text"].encode()) for r in RECORDS)
    tokens = [record.tokens for record in records.values()]
    per_token = f"{text_bytes / sum(tokens):.2f}"
    assert table[4].split() == ["all", "60", f"{sum(tokens):,}", per_token, "100.0%"]
    assert table[5].startswith("0.0 MB in ")

    prefixes, weights = get_blend_from_list((out / "blend.txt").read_text().split())
    assert prefixes == [str(out / record.prefix) for record in records.values()]
    assert weights == pytest.approx([count / sum(tokens) for count in tokens], rel=1e-5)


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        ("", ["web", "y"]),
        ("--domain-by file", ["part-01", "part-02", "y"]),
        ("--domain-by directory", ["web", "code"]),
        ("--domain all", ["all"]),
        ("--domain-key domain", ["b", "a", "c"]),
    ],
)
def test_the_domain_is_where_it_is_said_to_be(
    tmp_path: Path, run: Preprocess, flags: str, names: list[str]
) -> None:
    inputs = [tmp_path / "in" / "web", tmp_path / "in" / "code"]
    for path, of in (("web/part-01", "ba"), ("web/part-02", "a"), ("code/y", "bc")):
        records = [{"text": "a b", "domain": name} for name in of]
        write_jsonl(tmp_path / "in" / f"{path}.jsonl", records)
    told = "part-01.jsonl are shards, and their number names no domain. The domains, with their "
    told += "number of files: web (2), y (1). --domain-by file makes each file a domain"
    assert (told in run(inputs, tmp_path / "out", flags).err) is (not flags)
    assert list(domains(tmp_path / "out")) == names


@pytest.mark.usefixtures("many_chunks")
def test_workers_and_formats_do_not_change_the_output(tmp_path: Path, run: Preprocess) -> None:
    records = [
        {"text": text, "domain": "abc"[index % 3]}
        for index, text in enumerate([*make_texts(40, 2), *make_texts(20, 2)])
    ]
    lines = write_jsonl(tmp_path / "in.jsonl", records).read_bytes()
    (tmp_path / "in.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "in.jsonl.zst").write_bytes(zstd.compress(lines))
    (tmp_path / "in.json").write_bytes(lines)
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "in.parquet", row_group_size=7)
    out, outputs = tmp_path / "out", []
    for name, workers in (
        ("in.jsonl", 1), ("in.jsonl", 2), ("in.jsonl", 8), ("in.jsonl.gz", 1), ("in.jsonl.gz", 3),
        ("in.jsonl.zst", 2), ("in.json", 2), ("in.parquet", 1), ("in.parquet", 2),
    ):  # fmt: skip
        flags = "--overwrite --domain-key domain --append-eod --dedup exact"
        run(tmp_path / name, out, flags, workers=workers)
        outputs.append(files(out))
    assert all(output == outputs[0] for output in outputs)


TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1)


@settings(max_examples=40)
@given(
    documents=st.lists(st.tuples(TEXT, st.sampled_from("xyz")), min_size=1, max_size=20),
    eod=st.booleans(),
    dedup=st.booleans(),
    chunk_bytes=st.integers(1, 300),
)
def test_any_text_is_stored_as_core_would(
    tmp_path: Path,
    run: Preprocess,
    tokenize: Tokenize,
    documents: list[tuple[str, str]],
    eod: bool,
    dedup: bool,
    chunk_bytes: int,
) -> None:
    directory = fresh(tmp_path)
    records = [{"text": text, "d": domain} for text, domain in documents]
    path = write_jsonl(directory / "in.jsonl", records)
    flags = "--domain-key d" + " --append-eod" * eod + " --dedup exact" * dedup
    with pytest.MonkeyPatch.context() as context:
        context.setattr(chunks, "_SMALLEST", chunk_bytes)
        context.setattr(chunks, "_LARGEST", chunk_bytes)
        run(path, directory / "out", flags)
    if dedup:
        first: dict[str, tuple[str, str]] = {}
        for text, domain in documents:
            first.setdefault(text, (text, domain))
        documents = list(first.values())
    for domain in {domain for _, domain in documents}:
        ids = [tokenize(text) + [EOD] * eod for text, of in documents if of == domain]
        write_dataset(directory / "core" / f"{domain}_text_document", [[one] for one in ids])
    made = datasets(directory / "out")
    assert made.pop("domains.json")
    assert made == files(directory / "core")


GOOD = b'{"text": "a model", "domain": "d"}\n'
BAD_LINES = [
    (b'{"text": "a', "invalid JSON", "Unterminated string"),
    (b"[" * 100_000, "invalid JSON", "maximum recursion depth"),
    (b'["text"]', "not an object", "['text'], where a line must be like"),
    (b'{"txt": "a", "domain": "d"}', "missing key", "'text' (--json-key); it has: domain, txt"),
    (b'{"text": 5, "domain": "d"}', "not a string", "'text' (--json-key) is 5, not"),
    (b'{"text": "", "domain": "d"}', "empty text", "field 'text' (--json-key) is empty"),
    (b'{"text": "\xff"}', "not UTF-8", "invalid start byte at byte 10"),
    (b'{"text": "a\\ud800", "domain": "d"}', "half a surrogate pair", "at character 1"),
    (b'{"text": "a\\u0000b", "domain": "d"}', "NUL", "holds a NUL at character 1"),
    (b'{"text": "a"}', "missing key", "no field 'domain' (--domain-key)"),
    (b'{"text": "a", "domain": ""}', "empty text", "field 'domain' (--domain-key) is empty"),
    (b'{"text": "a", "domain": "../d"}', "unusable domain", "'../d' cannot be part of a file"),
    (b'{"text": "a", "domain": ".d"}', "unusable domain", "'.d' cannot be part of a file name"),
    (b'{"text": "a", "domain": "d\\n"}', "unusable domain", "'d\\n' cannot be part of a file"),
    (b'{"text": "' + b"a" * 300_000 + b'"}', "too long", "300,013 bytes, above --max-line-bytes"),
]


def test_bad_lines_are_listed_and_left_out(
    tmp_path: Path, run: Preprocess, tokenize: Tokenize, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "_SMALLEST", 20_000)
    paths = [tmp_path / "in.jsonl", tmp_path / "in.jsonl.gz"]
    content = b"".join(GOOD + b"\n" + line + b"\n" for line, _, _ in BAD_LINES)
    paths[0].write_bytes(content)
    paths[1].write_bytes(gzip.compress(content))
    count = 2 * len(BAD_LINES)
    for workers in (1, 2):
        out = tmp_path / f"out{workers}"
        flags = "--domain-key domain --max-bad-fraction 0.5 --max-line-bytes 200000"
        told = run(paths, out, flags, workers=workers).out
        assert f"rejected: {count} lines (invalid JSON 4, " in told
        rejects = [json.loads(line) for line in (out / "rejects.jsonl").open()]
        places = [(reject["file"], reject["line"]) for reject in rejects]
        numbers = range(3, 3 * len(BAD_LINES) + 1, 3)
        assert places == [(str(path), number) for path in paths for number in numbers]
        for reject, (line, kind, reason) in zip(rejects, BAD_LINES * 2, strict=True):
            assert reject["kind"] == kind
            assert reason in reject["reason"]
            assert reject["text"] == line[:200].decode(errors="replace")
        assert read_dataset(out / "d_text_document") == [[tokenize("a model")]] * count
    assert datasets(tmp_path / "out1") == datasets(tmp_path / "out2")


def test_too_many_bad_lines_end_it_with_the_worst(tmp_path: Path, run: Preprocess) -> None:
    path, out = tmp_path / "in.jsonl", tmp_path / "out"
    path.write_bytes(GOOD * 20 + b'{"text": ""}\n' + b"{\n" * 3 + GOOD)
    refused = run(path, out, workers=2, status=2)
    listed = out / ".preprocess_data" / "rejects.jsonl"
    error, worst, other = refused.err.splitlines()[-3:]
    assert error.startswith("error: 4 of 25 lines are bad, more than --max-bad-fraction 0.001 ")
    assert error.endswith(f"All of them are in {listed}")
    assert worst.startswith(f"  3 x invalid JSON; {path}, line 22: Expecting property name")
    assert other == f"  1 x empty text; {path}, line 21: field 'text' (--json-key) is empty"
    assert len(listed.read_text().splitlines()) == 4
    assert not list(out.glob("*.bin"))
    done = run(path, out, "--max-bad-fraction 0.16", workers=2)
    assert "going on from 21 documents that are done" in done.err
    assert len((out / "rejects.jsonl").read_text().splitlines()) == 4


@pytest.mark.usefixtures("many_chunks")
def test_too_many_bad_lines_end_it_early(tmp_path: Path, run: Preprocess) -> None:
    path, out = tmp_path / "in.jsonl", tmp_path / "out"
    path.write_bytes(b"{\n" * 400 + GOOD * 400)
    run(path, out, status=2)
    assert len(list(out.glob(".preprocess_data/*/*.npz"))) == 1


def test_datasets_are_replaced_only_when_asked_and_only_by_complete_ones(
    tmp_path: Path, corpus: list[Path], run: Preprocess
) -> None:
    out, bad = tmp_path / "out", tmp_path / "first.jsonl"
    run(corpus, out)
    before = files(out)
    refused = run(corpus[0], out, status=2).error
    assert "holds datasets already (domains.json); give another directory, or --overw" in refused
    bad.write_bytes(GOOD + b"{")
    run(bad, out, "--overwrite", status=2)
    assert {name: files(out)[name] for name in before} == before

    run(corpus[0], out, "--overwrite --append-eod")
    after = files(out)
    names = [f"first_text_document.{kind}" for kind in ("bin", "idx")]
    assert sorted(after) == ["blend.txt", "domains.json", *names]
    assert after[names[0]] != before[names[0]]


def test_standard_input_is_json_lines(
    tmp_path: Path, corpus: list[Path], run: Preprocess, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(corpus[0], tmp_path / "file", "--domain-key domain")
    for workers in (1, 2):
        monkeypatch.setattr("sys.stdin", TextIOWrapper(BytesIO(corpus[0].read_bytes())))
        out = tmp_path / f"stdin{workers}"
        run("-", out, "--domain-key domain", workers=workers)
        assert datasets(out) == datasets(tmp_path / "file")
