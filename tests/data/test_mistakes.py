"""A user's mistake ends a tool with one line that names the flag or the file, and the remedy."""

import gzip
import os
import shlex
from pathlib import Path
from typing import Any

import pytest

from megatron_rw.data import (
    inspect_dataset,
    merge_datasets,
    preprocess_data,
    split_dataset,
    train_tokenizer,
)
from tests.data.datasets import Document, call, write_dataset, write_directory
from tests.data.tiny_tokenizers import save_huggingface, train_huggingface

USUAL = {
    preprocess_data: "--input in.jsonl --output-dir out --tokenizer-model bpe.model --workers 2",
    train_tokenizer: "--input big.jsonl small.jsonl --output-prefix out/t",
    merge_datasets: "",
    split_dataset: "--input train --output-dir out",
    inspect_dataset: "",
}
AT_ONCE = {
    preprocess_data: {
        "--workers 0": "--workers 0: give a number of at least 1",
        "--max-bad-fraction 2": "--max-bad-fraction 2.0: give a number from 0 to 1",
        "--shard 2/2": "--shard 2/2: shards count from 0, so the last is 1/2",
        "--shard 2": "--shard 2: give it like 0/8",
        "--shard 0/2": "--shard 0/2: there are 1 files, and a file is the least",
        "--domain a --domain-key b": "--domain and --domain-key are not allowed together",
        "--domain a/b": "--domain: the domain 'a/b' cannot be part of a file name",
        "--input ./-d.jsonl": "./-d.jsonl: give --domain-by or --domain, or rename it: ",
        "--input text.csv": "--input text.csv: only .jsonl, .json, .txt (each also with .gz or ",
        "--input plain.txt --domain-key d": "plain.txt: a .txt file has no fields; leave out --d",
        "--input gone.jsonl": "--input gone.jsonl: no such file",
        "--input *.gone": "--input *.gone: no file matches",
        "--input in.jsonl in.jsonl": "--input in.jsonl: given 2 times; name it once",
        "--input nothing": "--input nothing: no file to read in it; the suffixes there: .c; give",
        "--input nonsense://a/b.jsonl": "nonsense://a/b.jsonl: Protocol not known: nonsense",
        "--input memory://gone/*.jsonl": "--input memory://gone/*.jsonl: no file matches",
        "--input memory://gone/a.jsonl": "--input memory://gone/a.jsonl: no such file",
        "--output-dir train": "train: holds datasets already (domains.json); give another dir",
        "--output-dir blended": "blended: holds datasets already (blend.txt); give another dir",
        "--output-dir torn --overwrite": "torn/domains.json: not JSON",
        "--output-dir 'a b'": "Megatron splits blend.txt at white space; give a path without any",
        "--tokenizer-model gone.model": "--tokenizer-model gone.model: no such file",
        "--tokenizer-model text.csv": "--tokenizer-model text.csv: cannot be loaded as Sentence",
    },
    train_tokenizer: {
        "--output-prefix bpe": "bpe.model is there already, and datasets made with it need it;",
        "--max-bytes 9": "--max-bytes 9: give a number of at least 10000",
        "--max-bad-fraction 2": "--max-bad-fraction 2.0: give a number from 0 to 1",
        "--special-tokens ''": "--special-tokens '': it is empty; leave it out or rename it",
        "--special-tokens '<|a b|>'": "--special-tokens '<|a b|>': white space and control",
        "--special-tokens '<|a\u2581|>'": "white space and control characters cannot be part",
        "--special-tokens '</s>'": "--special-tokens '</s>': every model has it already",
        "--special-tokens '<0x0A>'": "--special-tokens '<0x0A>': every model has it already",
        "--special-tokens '<x>' '<x>'": "--special-tokens '<x>': it is given twice",
    },
    merge_datasets: {
        "--input-dir train --output-dir train": "train: holds datasets already (domains.json)",
        "--input-dir train --output-dir train --overwrite": "train: is one of --input-dir; give",
        "--input-dir nothing --output-dir out": "nothing: has no domains.json; give a complete",
    },
    split_dataset: {
        "": "hold something out",
        "--valid-fraction 1": "--valid-fraction 1.0: give a number between 0 and 1",
        "--test-fraction nan": "--test-fraction nan: give a number between 0 and 1",
        "--valid-fraction 0.5 --test-fraction 0.5": "leave nothing to train on",
        "--test-fraction 0.1 --seed -1": "--seed -1: give a number from 0",
        "--test-fraction 0.1 --input train --output-dir .": "holds datasets already (domains.json)",
        "--test-fraction 0.1 --input train --output-dir . --overwrite": "--input would be replaced",
        "--test-fraction 0.1 --input nothing": "nothing: has no domains.json; give a complete dir",
    },
    inspect_dataset: {
        "train --document 0": "--document: there are 2 datasets; give one of train/a_text",
        "train/a_text_document --document 50": "has documents 0 to 49",
        "train/a_text_document --document -1": "has documents 0 to 49",
        "train --find a": "t/bpe.model, the tokenizer that domains.json names, is not there; give",
        "bare/bare --document 0": "no domains.json tells which tokenizer made this dataset; give",
        "bare/bare --find a": "no domains.json tells which tokenizer made this dataset; give",
        "bare/bare --document 0 --tokenizer-model bpe.model": "id is 400, and the tokenizer has",
        "gone": "gone: neither a directory nor a dataset's path",
        "nothing": "nothing: has no datasets; give a directory",
        "train --document 1 --check": "--check goes with the report only",
        "train --document 1 --find x": "--find",
        "train --ids": "--ids goes with --document",
    },
}
# Mistakes that only reading shows.
WHILE_READING = {
    preprocess_data: {
        "--input ./cut.jsonl.gz": "./cut.jsonl.gz: damaged gzip data (",
        "--input empty.jsonl": "--input empty.jsonl: no documents",
    },
    train_tokenizer: {
        "--vocab-size 100": "--vocab-size 100 is too small: ",
        "--vocab-size 9999": "--vocab-size 9999 is too large",
        "--vocab-size 100 --model-type unigram": "--vocab-size 100 is too small: ",
        "--vocab-size 9999 --model-type unigram": "--vocab-size 9999 is too large",
        "--input blank.jsonl": "--input: no text to train on",
        "--input none.jsonl": "none.jsonl: field 'text' (--json-key) is empty",
        "--input in.jsonl --json-key txt": "in.jsonl: no field 'txt' (--json-key); it has",
    },
    split_dataset: {
        "--valid-fraction 1e-9": "no document would be in valid; hold out more",
        "--valid-fraction 0.999999999": "no document would be in train; hold out less",
    },
}
GOOD = b'{"text": "a model", "domain": "d"}\n'
FILES = {
    "in.jsonl": GOOD,
    "cut.jsonl.gz": gzip.compress(GOOD * 2000, mtime=0)[:-12],
    "-d.jsonl": GOOD,
    "text.csv": GOOD,
    "plain.txt": GOOD,
    "empty.jsonl": b"\n \n",
    "nothing/a.c": b"",
    "blended/blend.txt": b"",
    "torn/domains.json": b"{",
    "big.jsonl": b'{"text": "a b", "domain": "b"}',
    "small.jsonl": b'{"text": "a b", "domain": "s"}',
    "blank.jsonl": b'{"text": "\\n\\t\\n"}',
    "none.jsonl": b'{"text": ""}',
}


def distinct(count: int, first: int) -> list[Document]:
    return [[[number]] for number in range(first, first + count)]


@pytest.fixture(autouse=True)
def ground(tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working directory with inputs for all tools."""
    monkeypatch.chdir(tmp_path)
    for name, content in FILES.items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_bytes(content)
    os.symlink(model, "bpe.model")
    write_directory(Path("train"), {"a": distinct(50, 0), "b": distinct(5, 50)})
    write_dataset(Path("bare/bare"), [[[1, 400]]])


def cases(table: dict[Any, dict[str, str]]) -> list[tuple[Any, str, str]]:
    return [(tool, *row) for tool, rows in table.items() for row in rows.items()]


def refusal(tool: Any, flags: str) -> str:
    return call(tool.main, *shlex.split(f"{USUAL[tool]} {flags}"), status=2).error


@pytest.mark.parametrize(("tool", "flags", "message"), cases(AT_ONCE))
def test_what_the_start_shows_is_refused_at_once(tool: Any, flags: str, message: str) -> None:
    assert message in refusal(tool, flags)
    assert not Path("out").exists()


@pytest.mark.parametrize(("tool", "flags", "message"), cases(WHILE_READING))
def test_what_reading_shows_leaves_no_output(tool: Any, flags: str, message: str) -> None:
    assert message in refusal(tool, flags)
    assert not [
        p for p in Path("out").rglob("*") if p.is_file() and ".preprocess_data" not in str(p)
    ]


def test_an_end_of_document_that_the_tokenizer_lacks() -> None:
    save_huggingface(train_huggingface(), Path("hf"))
    flags = "--append-eod --tokenizer-type HuggingFaceTokenizer --tokenizer-model hf"
    assert "the tokenizer hf has no end-of-document" in refusal(preprocess_data, flags)
    assert not Path("out").exists()
