import ast
import importlib.util
import json
import sys
import sysconfig
from collections import defaultdict
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "quickstart" / "build_corpus.py"
STDLIB = Path(sysconfig.get_paths()["stdlib"])
MAX_BYTES = 40_000
Corpus = dict[str, dict[str, list[Any]]]


@pytest.fixture(scope="module")
def build_corpus() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_corpus", SCRIPT)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["build_corpus"] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


def run(build_corpus: ModuleType, out: Path, *flags: str) -> Corpus:
    """Runs the script; returns split to domain to records."""
    usual = ["--output-dir", str(out), "--max-bytes-per-domain", str(MAX_BYTES)]
    assert build_corpus.main([*usual, *flags]) == 0
    corpus: Corpus = {"train": {}, "valid": {}}
    for path in sorted(out.glob("*/*")):
        records = [json.loads(line) for line in path.read_text().splitlines()]
        corpus[path.parent.name][path.name.removesuffix(".jsonl")] = records
    return corpus


@pytest.fixture(scope="module")
def corpus(build_corpus: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return run(build_corpus, tmp_path_factory.mktemp("corpus"))


def size(records: list[Any]) -> int:
    return sum(len(record["text"].encode()) for record in records)


def test_documents_are_split_by_source_and_of_the_size_asked_for(corpus: Corpus) -> None:
    assert set(corpus["train"]) == set(corpus["valid"])
    assert set(corpus["train"]) in (
        {"code", "prose", kind, "noise"} for kind in ("tests", "tables")
    )
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
        by_kind: dict[str, int] = defaultdict(int)
        for record in split["noise"]:
            kind, _, rest = record["source"].partition(" ")
            by_kind[kind] += len(record["text"])
            if kind == "synthetic:random-words":
                assert rest.partition(" of ")[2] in prose
        assert set(by_kind) == {
            "synthetic:random-base64", "synthetic:random-words", "synthetic:boilerplate",
        }  # fmt: skip
        assert len(set(by_kind.values())) == 1


def test_same_seed_same_bytes_and_another_seed_other_files(
    build_corpus: ModuleType, tmp_path: Path, corpus: Corpus
) -> None:
    assert run(build_corpus, tmp_path / "a") == corpus
    other = run(build_corpus, tmp_path / "b", "--seed", "7")
    for domain in corpus["train"]:
        assert other["train"][domain] != corpus["train"][domain]


def test_without_library_tests_tables_stand_in(
    build_corpus: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run(build_corpus, tmp_path)
    monkeypatch.setattr(build_corpus, "_FEWEST_TEST_FILES", 10**9)
    fallen_back = run(build_corpus, tmp_path)
    for split in fallen_back.values():
        assert set(split) == {"code", "prose", "tables", "noise"}
    assert "'tables' stands in" in capsys.readouterr().out
    sources = {record["source"].partition("-")[0] for record in fallen_back["train"]["tables"]}
    assert sources >= {"unicodedata", "cpython"}


def without_docstrings(tree: ast.Module) -> str:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if ast.get_docstring(node, clean=False) is not None:
                del node.body[0]
                if not node.body and not isinstance(node, ast.Module):
                    node.body = [ast.Pass()]
            if isinstance(node, ast.Module):
                node.body = [item for item in node.body if not isinstance(item, ast.Pass)]
    return ast.dump(tree)


def test_stripping_leaves_the_program(build_corpus: ModuleType) -> None:
    source = (STDLIB / "dataclasses.py").read_text("utf-8")
    stripped = build_corpus.strip_code(source)
    assert without_docstrings(ast.parse(source)) == ast.dump(ast.parse(stripped))
    assert len(stripped) < len(source)
    source = (
        '"""Module."""\n'
        "# comment\n"
        "\f\n"
        "class É:\n"
        '    """Only a\n'
        '    docstring."""\n'
        "\n"
        'def f(x): "one line"; return "# kept"  # dropped\n'
        'TEXT = """\n'
        "# kept\n"
        '"""\n'
    )
    assert build_corpus.strip_code(source) == (
        '\f\nclass É:\n    pass\n\ndef f(x): ; return "# kept"\nTEXT = """\n# kept\n"""\n'
    )


def test_extract_prose_takes_docstrings_and_comment_blocks_once(build_corpus: ModuleType) -> None:
    sentence = "This is the {} sentence of the text that we want to keep here."
    source = (
        f'"""{sentence.format("first")}\n\n    x = 1\n"""\n'
        "def f():\n"
        f"    # {sentence.format('second')[:20]}\n"
        f"    # {sentence.format('second')[20:]}\n"
        f"    return 1  # {sentence.format('trailing')}\n"
    )
    seen: set[str] = set()
    first = build_corpus.extract_prose(source, seen)
    assert first.split("\n\n") == [sentence.format("first"), " ".join(
        (sentence.format("second")[:20] + " " + sentence.format("second")[20:]).split()
    )]  # fmt: skip
    assert build_corpus.extract_prose(source, seen) == ""


def test_too_small_a_size_is_refused(
    build_corpus: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        build_corpus.main(["--output-dir", str(tmp_path), "--max-bytes-per-domain", "100"])
    assert "--max-bytes-per-domain must be at least 20000" in capsys.readouterr().err
