"""Real files for the data tools: JSON-lines text and a tokenizer trained on it."""

import gzip
import json
import random
from pathlib import Path
from typing import Any, Protocol

import pytest

from megatron_rw.data import preprocess_data, train_tokenizer

_SENTENCE = (
    "the model reads a batch of text and gives every sample its weight from its own loss so that "
    "what is hard and what is easy can be told apart while training goes on without a pause"
)
_CODE = 'def weigh(losses, r):\n\tfor l in losses:\n\t\tyield l / r  # "soft"\n\n    return None\n'


def make_texts(count: int, seed: int) -> list[str]:
    """Documents of words, with code, digits, accents and runs of white space between them."""
    rng = random.Random(seed)
    vocabulary = _SENTENCE.split()
    texts = []
    for _ in range(count):
        words = " ".join(rng.choices(vocabulary, k=rng.randint(3, 60)))
        texts.append(f"{words}.\n{rng.choice([_CODE, 'naïve café, 日本\n\n\n', '  12 345   \t'])}")
    return texts


def preprocess(*flags: object) -> int:
    """Runs preprocess_data and returns the exit status of its process."""
    try:
        preprocess_data.main([str(flag) for flag in flags])
    except SystemExit as ended:
        return int(str(ended.code))
    return 0


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


def datasets(directory: Path) -> dict[str, bytes]:
    """The files of a directory that do not hold its own path."""
    return {name: content for name, content in files(directory).items() if name != "blend.txt"}


def write_jsonl(path: Path, records: list[dict[str, Any]]) -> Path:
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()
    path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)
    return path


class Preprocess(Protocol):
    def __call__(self, inputs: object, output: Path, flags: str = "", workers: int = 1) -> int: ...


@pytest.fixture(scope="session")
def run(model: str) -> Preprocess:
    """Runs preprocess_data on one or several inputs, with the tokenizer of `model`."""

    def call(inputs: object, output: Path, flags: str = "", workers: int = 1) -> int:
        paths = inputs if isinstance(inputs, list) else [inputs]
        usual = ("--output-dir", output, "--tokenizer-model", model, "--workers", workers)
        return preprocess("--input", *paths, *usual, *flags.split())

    return call


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Path of a SentencePiece model of 400 pieces."""
    directory = tmp_path_factory.mktemp("tokenizer")
    corpus = write_jsonl(directory / "c.jsonl", [{"text": text} for text in make_texts(300, 0)])
    prefix = directory / "bpe"
    train_tokenizer.main(
        ["--input", str(corpus), "--output-prefix", str(prefix), "--vocab-size", "400"]
    )
    return f"{prefix}.model"
