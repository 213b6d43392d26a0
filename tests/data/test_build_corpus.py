import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from examples.quickstart import build_corpus
from tests.data.datasets import call

MAX_BYTES = 40_000
type Corpus = dict[str, dict[str, list[Any]]]


def run(out: Path, *flags: object) -> Corpus:
    """Runs the script; returns split to domain to records."""
    call(build_corpus.main, "--output-dir", out, "--max-bytes-per-domain", MAX_BYTES, *flags)
    return {
        split: {
            path.stem: [json.loads(line) for line in path.read_text().splitlines()]
            for path in (out / split).iterdir()
        }
        for split in ("train", "valid")
    }


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return run(tmp_path_factory.mktemp("corpus"))


def size(records: list[Any]) -> int:
    return sum(len(record["text"].encode()) for record in records)


def test_documents_are_split_by_source_and_of_the_size_asked_for(corpus: Corpus) -> None:
    assert set(corpus["train"]) == set(corpus["valid"])
    assert set(corpus["train"]) - {"tests", "tables"} == {"code", "prose", "noise"}
    for domain, train in corpus["train"].items():
        valid = corpus["valid"][domain]
        for record in [*train, *valid]:
            assert set(record) == {"text", "domain", "source"}
            assert record["domain"] == domain
            assert record["text"].strip()
        assert 0.85 * MAX_BYTES < size(train) + size(valid) <= MAX_BYTES
        assert 0.045 < size(valid) / (size(train) + size(valid)) <= 0.08
        if domain != "noise":
            assert not {r["source"] for r in train} & {r["source"] for r in valid}


def test_noise_says_what_it_is_and_keeps_to_its_split(corpus: Corpus) -> None:
    for split in corpus.values():
        prose = {record["source"] for record in split["prose"]}
        by_kind: Counter[str] = Counter()
        for record in split["noise"]:
            kind, _, rest = record["source"].partition(" ")
            by_kind[kind.removeprefix("synthetic:")] += len(record["text"])
            if kind == "synthetic:random-words":
                assert rest.partition(" of ")[2] in prose
        assert set(by_kind) == {"random-base64", "random-words", "boilerplate"}
        assert len(set(by_kind.values())) == 1


def test_the_seed_chooses_the_files_and_tables_stand_in_for_library_tests(
    tmp_path: Path, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(tmp_path) == corpus
    other = run(tmp_path, "--seed", 7)
    for domain in corpus["train"]:
        assert other["train"][domain] != corpus["train"][domain]
    monkeypatch.setattr(build_corpus, "_FEWEST_TEST_FILES", 10**9)
    fallen_back = run(tmp_path)
    for split in fallen_back.values():
        assert set(split) == {"code", "prose", "tables", "noise"}
    sources = {record["source"].partition("-")[0] for record in fallen_back["train"]["tables"]}
    assert sources >= {"unicodedata", "cpython"}


CODE = '''"""Module."""
# comment
\f
class É:
    """Only a
    docstring."""

def f(x): "one line"; return "# kept"  # dropped
TEXT = """
# kept
"""
'''
STRIPPED = '\f\nclass É:\n    pass\n\ndef f(x): ; return "# kept"\nTEXT = """\n# kept\n"""\n'


def test_stripping_leaves_the_program() -> None:
    assert build_corpus.strip_code(CODE) == STRIPPED


PROSE = '''"""This is the first sentence of the text that we want to keep here.

    x = 1
"""
def f():
    # This is the second
    # sentence of the text that we want to keep here.
    return 1  # This is the trailing sentence of the text that we want to keep here.
'''


def test_extract_prose_takes_docstrings_and_comment_blocks_once() -> None:
    sentence = "This is the {} sentence of the text that we want to keep here."
    seen: set[str] = set()
    paragraphs = build_corpus.extract_prose(PROSE, seen).split("\n\n")
    assert paragraphs == [sentence.format("first"), sentence.format("second")]
    assert build_corpus.extract_prose(PROSE, seen) == ""


def test_too_small_a_size_is_refused(tmp_path: Path) -> None:
    flags = ("--output-dir", tmp_path, "--max-bytes-per-domain", 100)
    refused = call(build_corpus.main, *flags, status=2).err
    assert "--max-bytes-per-domain must be at least 20000" in refused
