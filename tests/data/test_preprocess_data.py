import gzip
import hashlib
import json
from collections.abc import Callable
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from backports import zstd
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rw.command_line import parse
from megatron_rw.data.indexed import domains
from megatron_rw.data.preprocess_config import PreprocessConfig
from megatron_rw.data.text import chunks
from megatron_rw.data.tokenizers.core_tokenizer import build_core_tokenizer
from megatron_rw.errors import UserError
from tests.data.conftest import Preprocess, datasets, files, make_texts, preprocess, write_jsonl
from tests.data.tiny_tokenizers import save_huggingface, train_huggingface

EOD = 2
RECORDS = [
    {"text": text, "domain": "abc"[index % 3], "body": text.upper()}
    for index, text in enumerate(make_texts(60, 2))
]


def settings_of(flags: str) -> PreprocessConfig:
    usual = "--input in.jsonl --output-dir out --tokenizer-model m "
    return parse(PreprocessConfig, (usual + flags).split(), "")


def megatron_tokenize(model: str) -> Callable[[str], list[int]]:
    """The tokenizer as Megatron's training program builds it from its flags."""
    flags = settings_of(f"--tokenizer-model {model}").tokenizer
    tokenize: Callable[[str], list[int]] = build_core_tokenizer(flags).tokenize
    return tokenize


def read_back(prefix: Path | str) -> tuple[Any, list[list[int]]]:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(str(prefix))
    assert list(dataset.document_indices) == list(range(len(dataset) + 1))
    return dataset, [dataset[index].tolist() for index in range(len(dataset))]


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
    tmp_path: Path,
    corpus: list[Path],
    model: str,
    run: Preprocess,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "deep" / "out"
    assert run(corpus, out, "--domain-key domain --append-eod") == 0
    names = [f"{domain}_text_document.{kind}" for domain in "abc" for kind in ("bin", "idx")]
    assert sorted(files(out)) == sorted([*names, "blend.txt", "domains.json"])

    tokenize = megatron_tokenize(model)
    manifest = domains.DomainsFile.load(out / "domains.json")
    assert manifest.tokenizer == domains.TokenizerRecord(
        "SentencePieceTokenizer", model, hashlib.sha256(Path(model).read_bytes()).hexdigest(), 400
    )
    assert list(manifest.domains) == ["a", "b", "c"]
    for domain, record in manifest.domains.items():
        expected = [[*tokenize(r["text"]), EOD] for r in RECORDS if r["domain"] == domain]
        dataset, found = read_back(out / record.prefix)
        assert dataset.index.dtype == np.uint16
        assert found == expected
        assert record.documents == len(expected)
        assert record.tokens == sum(map(len, expected))
        assert record.max_token_id == max(map(max, expected))

    table = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in table[:-1]] == ["domain", "a", "b", "c", "all"]
    text_bytes = sum(len(r["text"].encode()) for r in RECORDS)
    tokens = sum(record.tokens for record in manifest.domains.values())
    assert table[4].split() == ["all", "60", f"{tokens:,}", f"{text_bytes / tokens:.2f}", "100.0%"]
    assert table[5].startswith("0.0 MB in ")


def test_megatron_reads_the_blend(tmp_path: Path, corpus: list[Path], run: Preprocess) -> None:
    from megatron.core.datasets.utils import get_blend_from_list

    out = tmp_path / "out"
    run(corpus, out)
    prefixes, weights = get_blend_from_list((out / "blend.txt").read_text().split())
    records = domains.DomainsFile.load(out / "domains.json").domains
    assert list(records) == ["first", "second"]
    assert prefixes == [str(out / record.prefix) for record in records.values()]
    tokens = [sum(map(len, read_back(prefix)[1])) for prefix in prefixes]
    assert [record.tokens for record in records.values()] == tokens
    assert weights == pytest.approx([count / sum(tokens) for count in tokens], rel=1e-5)


def test_every_key_gets_a_directory(
    tmp_path: Path, corpus: list[Path], model: str, run: Preprocess
) -> None:
    out = tmp_path / "out"
    assert run(corpus, out, "--json-keys body text") == 0
    tokenize = megatron_tokenize(model)
    for key in ("body", "text"):
        for records, domain in ((RECORDS[:35], "first"), (RECORDS[35:], "second")):
            _, found = read_back(out / key / f"{domain}_text_document")
            assert found == [tokenize(record[key]) for record in records]
        assert domains.DomainsFile.load(out / key / "domains.json").domains
    assert sorted(path.name for path in out.iterdir()) == ["body", "text"]
    assert run(corpus, out, "--json-keys body text") == 2


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
    tmp_path: Path,
    run: Preprocess,
    flags: str,
    names: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    for path, domain in (
        ("in/web/part-01.jsonl", "ba"), ("in/web/part-02.jsonl", "a"), ("in/code/y.jsonl", "bc"),
    ):  # fmt: skip
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(tmp_path / path, [{"text": "a b", "domain": name} for name in domain])
    inputs = [tmp_path / "in" / "web", tmp_path / "in" / "code"]
    assert run(inputs, tmp_path / "out", flags) == 0
    assert list(domains.DomainsFile.load(tmp_path / "out" / "domains.json").domains) == names
    told = "part-01.jsonl are shards, and their number names no domain. The domains, with their "
    told += "number of files: web (2), y (1). --domain-by file makes each file a domain"
    assert (told in capsys.readouterr().err) is (not flags)


@pytest.mark.usefixtures("many_chunks")
def test_workers_and_formats_do_not_change_the_output(tmp_path: Path, run: Preprocess) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    records = [
        {"text": text, "domain": "abc"[index % 3]}
        for index, text in enumerate([*make_texts(40, 2), *make_texts(20, 2)])
    ]
    lines = write_jsonl(tmp_path / "in.jsonl", records).read_bytes()
    (tmp_path / "in.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "in.jsonl.zst").write_bytes(zstd.compress(lines))
    (tmp_path / "in.json").write_text(json.dumps(records))
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "in.parquet", row_group_size=7)
    outputs = []
    for name, workers in (
        ("in.jsonl", 1), ("in.jsonl", 2), ("in.jsonl", 8), ("in.jsonl.gz", 1), ("in.jsonl.gz", 3),
        ("in.jsonl.zst", 2), ("in.json", 2), ("in.parquet", 1), ("in.parquet", 2),
    ):  # fmt: skip
        out = tmp_path / "out"
        flags = "--overwrite --domain-key domain --append-eod --dedup exact"
        assert run(tmp_path / name, out, flags, workers=workers) == 0
        outputs.append(files(out))
    assert all(output == outputs[0] for output in outputs)


@settings(max_examples=40)
@given(
    documents=st.lists(
        st.tuples(
            st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1),
            st.sampled_from("xyz"),
        ),
        min_size=1,
        max_size=20,
    ),
    eod=st.booleans(),
    dedup=st.booleans(),
    chunk_bytes=st.integers(1, 300),
)
def test_any_text_is_stored_as_core_would(
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    model: str,
    run: Preprocess,
    documents: list[tuple[str, str]],
    eod: bool,
    dedup: bool,
    chunk_bytes: int,
) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    directory = tmp_path_factory.mktemp("any")
    records = [{"text": text, "d": domain} for text, domain in documents]
    path = write_jsonl(directory / "in.jsonl", records)
    monkeypatch.setattr(chunks, "_SMALLEST", chunk_bytes)
    monkeypatch.setattr(chunks, "_LARGEST", chunk_bytes)
    flags = "--domain-key d" + " --append-eod" * eod + " --dedup exact" * dedup
    assert run(path, directory / "out", flags) == 0
    tokenize = megatron_tokenize(model)
    if dedup:
        first: dict[str, tuple[str, str]] = {}
        for text, domain in documents:
            first.setdefault(text, (text, domain))
        documents = list(first.values())
    for domain in {domain for _, domain in documents}:
        prefix = directory / f"core_{domain}"
        builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
        for text, of in documents:
            if of == domain:
                ids = tokenize(text) + [EOD] * eod
                builder.add_document(ids, [len(ids)])
        builder.finalize(f"{prefix}.idx")
        for suffix in ("bin", "idx"):
            ours = directory / "out" / f"{domain}_text_document.{suffix}"
            assert ours.read_bytes() == Path(f"{prefix}.{suffix}").read_bytes()


GOOD = b'{"text": "a model", "domain": "d"}\n'
BAD_LINES = [
    (b'{"text": "a', "invalid JSON", "Unterminated string"),
    (b"[" * 100_000, "invalid JSON", "maximum recursion depth"),
    (b'["text"]', "not an object", "an array, where a line must be like"),
    (b'{"txt": "a", "domain": "d"}', "missing key", "'text' (--json-keys); it has: domain, txt"),
    (b'{"text": 5, "domain": "d"}', "not a string", "'text' (--json-keys) is a number"),
    (b'{"text": "", "domain": "d"}', "empty text", "field 'text' (--json-keys) is empty"),
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
    tmp_path: Path,
    model: str,
    run: Preprocess,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(chunks, "_SMALLEST", 20_000)
    paths = [tmp_path / "in.jsonl", tmp_path / "in.jsonl.gz"]
    content = b"".join(GOOD + b"\n" + line + b"\n" for line, _, _ in BAD_LINES)
    paths[0].write_bytes(content)
    paths[1].write_bytes(gzip.compress(content))
    for workers in (1, 2):
        out = tmp_path / f"out{workers}"
        flags = "--domain-key domain --max-bad-fraction 0.5 --max-line-bytes 200000"
        assert run(paths, out, flags, workers=workers) == 0
        rejects = [json.loads(line) for line in (out / "rejects.jsonl").open()]
        places = [(reject["file"], reject["line"]) for reject in rejects]
        numbers = range(3, 3 * len(BAD_LINES) + 1, 3)
        assert places == [(str(path), number) for path in paths for number in numbers]
        for reject, (line, kind, reason) in zip(rejects, BAD_LINES * 2, strict=True):
            assert reject["kind"] == kind
            assert reason in reject["reason"]
            assert reject["text"] == line[:200].decode(errors="replace")
        _, found = read_back(out / "d_text_document")
        assert found == [megatron_tokenize(model)("a model")] * 2 * len(BAD_LINES)
        assert f"rejected: {2 * len(BAD_LINES)} lines (invalid JSON 4, " in capsys.readouterr().out
    assert datasets(tmp_path / "out1") == datasets(tmp_path / "out2")


def test_too_many_bad_lines_end_it_with_the_worst(
    tmp_path: Path, run: Preprocess, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(GOOD * 20 + b'{"text": ""}\n' + b"{\n" * 3 + GOOD)
    out = tmp_path / "out"
    assert run(path, out, workers=2) == 2
    listed = out / ".preprocess_data" / "rejects.jsonl"
    error, worst, other = capsys.readouterr().err.splitlines()[-3:]
    assert error.startswith("error: 4 of 25 lines are bad, more than --max-bad-fraction 0.001 ")
    assert error.endswith(f"All of them are in {listed}")
    assert worst.startswith(f"  3 x invalid JSON; {path}, line 22: Expecting property name")
    assert other == f"  1 x empty text; {path}, line 21: field 'text' (--json-keys) is empty"
    assert len(listed.read_text().splitlines()) == 4
    assert not list(out.glob("*.bin"))
    assert run(path, out, "--max-bad-fraction 0.16", workers=2) == 0
    assert "going on from 21 documents that are done" in capsys.readouterr().err
    assert len((out / "rejects.jsonl").read_text().splitlines()) == 4


@pytest.mark.usefixtures("many_chunks")
def test_too_many_bad_lines_end_it_early(tmp_path: Path, run: Preprocess) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"{\n" * 400 + GOOD * 400)
    out = tmp_path / "out"
    assert run(path, out) == 2
    assert len(list(out.glob(".preprocess_data/*/*.npz"))) == 1


FILES = {
    "in.jsonl": GOOD,
    "cut.jsonl.gz": gzip.compress(GOOD * 2000, mtime=0)[:-12],
    "-d.jsonl": GOOD,
    "text.csv": GOOD,
    "empty.jsonl": b"\n \n",
    "nothing/a.c": b"",
}


# Mistakes that only reading shows.
BEGUN = ("--input ./cut.jsonl.gz", "--input empty.jsonl")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--input ./cut.jsonl.gz", "./cut.jsonl.gz: damaged gzip data ("),
        ("--input ./-d.jsonl", "./-d.jsonl: give --domain-by or --domain, or rename it: "),
        ("--input text.csv", "--input text.csv: only .jsonl, .json, .txt (each also with .gz or "),
        ("--input empty.jsonl", "--input empty.jsonl: no documents"),
        ("--input gone.jsonl", "--input gone.jsonl: no such file"),
        ("--input *.gone", "--input *.gone: no file matches"),
        ("--input in.jsonl in.jsonl", "--input in.jsonl: given 2 times"),
        ("--input nothing", "--input nothing: no file to read in it; it has the suffixes: .c"),
        ("--tokenizer-model gone.model", "--tokenizer-model gone.model: no such file"),
        ("--tokenizer-model text.csv", "--tokenizer-model text.csv: cannot be loaded as Sentence"),
        ("--shard 0/2", "--shard 0/2: there are 1 files, and a file is the least"),
        ("--blend-weights wiki=1", "--blend-weights are of wiki, and the domains are in;"),
    ],
)
def test_bad_inputs_stop_with_their_name(
    tmp_path: Path,
    run: Preprocess,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    flags: str,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, content in FILES.items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_bytes(content)
    assert run("in.jsonl", Path("out"), flags, workers=2) == 2
    assert capfd.readouterr().err.splitlines()[-1].startswith(f"error: {message}")
    assert Path("out").exists() is (flags in BEGUN)
    assert not list(Path("out").glob("*_document.*"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--workers 0", "--workers 0: give a number of at least 1"),
        ("--max-bad-fraction 2", "--max-bad-fraction 2.0: give a number from 0 to 1"),
        ("--max-document-tokens 1", "--max-document-tokens 1: give a number above 1"),
        ("--blend-temperature 0", "--blend-temperature 0.0: give a number above 0"),
        ("--shard 2/2", "--shard 2/2: shards count from 0, so the last is 1/2"),
        ("--shard 2", "--shard 2: give it like 0/8"),
        ("--blend-weights wiki", "--blend-weights: wiki: give DOMAIN=WEIGHT"),
        ("--blend-weights a=0 b=1", "--blend-weights a=0: give a weight above 0"),
        ("--json-keys a a", "--json-keys a a: give each once"),
        ("--domain a --domain-key b", "--domain and --domain-key are not allowed together"),
        ("--domain a/b", "--domain: the domain 'a/b' cannot be part of a file name"),
    ],
)
def test_settings_that_cannot_be_are_refused(flags: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        settings_of(flags)


def test_datasets_are_replaced_only_when_asked_and_only_by_complete_ones(
    tmp_path: Path, corpus: list[Path], run: Preprocess, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    run(corpus, out)
    before = files(out)
    assert run(corpus[0], out) == 2
    assert "holds datasets already (domains.json); give another directory, or --overwrite" in (
        capsys.readouterr().err
    )
    bad = tmp_path / "first.jsonl"
    bad.write_bytes(GOOD + b"{")
    assert run(bad, out, "--overwrite") == 2
    assert {name: files(out)[name] for name in before} == before

    assert run(corpus[0], out, "--overwrite --append-eod") == 0
    assert sorted(files(out)) == [
        "blend.txt", "domains.json", "first_text_document.bin", "first_text_document.idx",
    ]  # fmt: skip
    assert files(out)["first_text_document.bin"] != before["first_text_document.bin"]


def test_standard_input_is_json_lines(
    tmp_path: Path, corpus: list[Path], run: Preprocess, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(corpus[0], tmp_path / "file", "--domain-key domain")
    for workers in (1, 2):
        monkeypatch.setattr("sys.stdin", TextIOWrapper(BytesIO(corpus[0].read_bytes())))
        out = tmp_path / f"stdin{workers}"
        assert run("-", out, "--domain-key domain", workers=workers) == 0
        assert datasets(out) == datasets(tmp_path / "file")


def test_an_end_of_document_that_the_tokenizer_lacks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    directory = save_huggingface(train_huggingface(), tmp_path / "hf")
    flags = ("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", directory)
    out = tmp_path / "out"
    assert preprocess("--input", source, "--output-dir", out, *flags, "--append-eod") == 2
    assert f"the tokenizer {directory} has no end-of-document" in capsys.readouterr().err
    assert not out.exists()
