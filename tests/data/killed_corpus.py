"""Inputs for `preprocess_campaign`: domains, formats, bad lines of all kinds, and copies."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

from backports import zstd

from megatron_rw.data import train_tokenizer
from tests.data.conftest import make_texts, write_jsonl

BAD = [b"no json\n", b'{"txt": "no text"}\n', b'{"text": 1}\n', b"\xff\n", b'{"text": ""}\n']


def write_inputs(folder: Path, megabytes: float) -> None:
    """Writes a plain file and two compressed ones, of a third of the text each.

    Args:
        folder: is made.
        megabytes: of text, about.
    """
    folder.mkdir()
    for seed, name in enumerate(("code.jsonl", "math.jsonl.gz", "wiki.jsonl.zst")):
        content = _lines(random.Random(seed), megabytes * 1e6 / 3)
        if name.endswith(".gz"):
            content = gzip.compress(content, 1, mtime=0)
        elif name.endswith(".zst"):
            content = zstd.compress(content)
        (folder / name).write_bytes(content)


def _lines(rng: random.Random, size: float) -> bytes:
    """Documents of which a tenth are in every file, with a bad line in a thousand."""
    everywhere = make_texts(100, 0)
    lines: list[bytes] = []
    written = 0
    while written < size:
        text = "\n".join(make_texts(8, rng.randrange(1 << 30)))
        if rng.random() < 0.1:
            text = rng.choice(everywhere)
        lines.append(json.dumps({"text": text, "title": text[:40]}).encode() + b"\n")
        if rng.random() < 0.001:
            lines.append(rng.choice(BAD))
        written += len(text)
    return b"".join(lines)


def train_model(folder: Path) -> str:
    """Trains a small tokenizer and returns its path."""
    corpus = write_jsonl(folder / "t.jsonl", [{"text": text} for text in make_texts(300, 0)])
    flags = ["--input", str(corpus), "--output-prefix", f"{folder}/bpe", "--vocab-size", "400"]
    if train_tokenizer.main(flags) != 0:
        raise SystemExit("error: no tokenizer")
    return f"{folder}/bpe.model"
