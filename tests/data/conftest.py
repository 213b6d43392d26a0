"""Real files for the data tools: JSON-lines text and a tokenizer trained on it."""

import gzip
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megatron_rw.data import preprocess_data, train_tokenizer
from tests.data.datasets import Ended, call

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


def write_jsonl(path: Path, records: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()
    path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)
    return path


def write_texts(path: Path, texts: list[str]) -> Path:
    return write_jsonl(path, [{"text": text} for text in texts])


def train_model(directory: Path) -> str:
    """Returns the path of a SentencePiece model of 400 pieces."""
    corpus, prefix = write_texts(directory / "c.jsonl", make_texts(300, 0)), directory / "bpe"
    flags = ("--input", corpus, "--output-prefix", prefix, "--vocab-size", 400)
    call(train_tokenizer.main, *flags)
    return f"{prefix}.model"


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return train_model(tmp_path_factory.mktemp("tokenizer"))


@dataclass(frozen=True)
class Preprocess:
    """Runs preprocess_data on one or several inputs, with a tokenizer model."""

    model: str

    def __call__(
        self, inputs: object, output: Path, flags: str = "", workers: int = 1, status: int = 0
    ) -> Ended:
        paths = inputs if isinstance(inputs, list) else [inputs]
        usual = ("--output-dir", output, "--tokenizer-model", self.model, "--workers", workers)
        given = ("--input", *paths, *usual, *flags.split())
        return call(preprocess_data.main, *given, status=status)


@pytest.fixture(scope="session")
def run(model: str) -> Preprocess:
    return Preprocess(model)
