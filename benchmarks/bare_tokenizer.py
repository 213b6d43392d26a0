"""How fast a tokenizer is in so many processes with nothing around it."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any


def encoder_of(tokenizer: str, model: Path) -> Callable[[], Callable[[str], Any]]:
    """What loads the tokenizer, in each process, and gives what encodes a text."""
    if tokenizer == "sentencepiece":
        import sentencepiece

        return lambda: sentencepiece.SentencePieceProcessor(model_file=str(model)).encode
    import tokenizers

    def load() -> Callable[[str], Any]:
        loaded = tokenizers.Tokenizer.from_file(str(model / "tokenizer.json"))
        return lambda text: loaded.encode(text).ids

    return load


def encode_only(
    documents: list[str], encoder: Callable[[], Callable[[str], Any]], workers: int
) -> float:
    """Seconds that as many processes take to encode the documents and forget the result."""
    context = multiprocessing.get_context("fork")
    barrier, times = context.Barrier(workers), context.SimpleQueue()
    processes = [
        context.Process(
            target=_encode_share, args=(documents, encoder, number, workers, barrier, times)
        )
        for number in range(workers)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        if process.exitcode != 0:
            raise SystemExit(f"error: a bare tokenizer ended with {process.exitcode}")
    spans = [times.get() for _ in processes]
    return float(max(end for _, end in spans) - min(start for start, _ in spans))


def _encode_share(
    documents: list[str],
    encoder: Callable[[], Callable[[str], Any]],
    number: int,
    workers: int,
    barrier: Barrier,
    times: Any,
) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    encode = encoder()
    encode(documents[0])
    barrier.wait(60)
    start = time.monotonic()
    for index in range(number, len(documents), workers):
        encode(documents[index])
    times.put((start, time.monotonic()))
