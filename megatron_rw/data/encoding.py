"""From lines of text to token ids, in one process or several, in input order."""

import multiprocessing
import os
import re
import signal
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_rw.data.command import InputError
from megatron_rw.data.jsonl import parse_record, string_field
from megatron_rw.data.tokenizer import Tokenizer, optimal_dtype

_SAFE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")


@dataclass(frozen=True)
class Batch:
    """Some consecutive lines of one file, with their numbers from 1."""

    path: Path
    lines: list[tuple[int, bytes]]


@dataclass(frozen=True)
class EncodedBatch:
    """The documents of a batch, in order.

    Attributes:
        domains: The domain of each document.
        lengths: The number of tokens of each document.
        text_bytes: The UTF-8 bytes of each document's text.
        ids: The tokens of all documents, one after the other.
    """

    domains: list[str]
    lengths: list[int]
    text_bytes: list[int]
    ids: NDArray[Any]


class Encoder:
    """Parses and tokenizes batches.

    Args:
        tokenizer: Gives the token ids.
        text_key: Field of the text.
        domain_key: Field of the domain; None takes it from the file's name.
        eod: Token id to end every document with, or None.

    Attributes:
        dtype: The smallest type of Megatron's format that holds every token id.
    """

    def __init__(
        self, tokenizer: Tokenizer, text_key: str, domain_key: str | None, eod: int | None
    ) -> None:
        self._tokenizer = tokenizer
        self._text_key = text_key
        self._domain_key = domain_key
        self._ending = [] if eod is None else [eod]
        self.dtype = optimal_dtype(tokenizer.vocab_size)

    def __call__(self, batch: Batch) -> EncodedBatch:
        """Encodes a batch.

        Raises:
            InputError: At its first bad line.
        """
        domains: list[str] = []
        text_bytes: list[int] = []
        documents: list[NDArray[Any]] = []
        for number, line in batch.lines:
            record = parse_record(line, batch.path, number)
            text = string_field(record, "--json-key", self._text_key, batch.path, number)
            domains.append(self._domain(record, batch.path, number))
            text_bytes.append(len(text.encode()))
            documents.append(self._tokens(text, batch.path, number))
        return EncodedBatch(
            domains, [len(ids) for ids in documents], text_bytes, np.concatenate(documents)
        )

    def _tokens(self, text: str, path: Path, number: int) -> NDArray[Any]:
        ids = self._tokenizer.encode_batch([text])[0]
        if not ids.size:
            raise InputError(
                f"{path}, line {number}: the tokenizer makes no token of this text; remove the line"
            )
        return np.append(ids, np.array(self._ending, dtype=self.dtype))

    def _domain(self, record: dict[str, Any], path: Path, number: int) -> str:
        if self._domain_key is None:
            name = path.name.split(".")[0]
            if not _SAFE_NAME.fullmatch(name):
                raise InputError(f"{path}: the domain '{name}' {_UNSAFE}; rename the file")
            return name
        name = string_field(record, "--domain-key", self._domain_key, path, number)
        if not _SAFE_NAME.fullmatch(name):
            raise InputError(f"{path}, line {number}: the domain {name[:120]!r} {_UNSAFE}")
        return name


_UNSAFE = (
    "cannot be part of a file name here; use at most 100 letters, digits, '_', '-' and '.', "
    "and neither '-' nor '.' first"
)


def encode_in_order(
    batches: Iterator[Batch], encoder: Encoder, workers: int
) -> Iterator[EncodedBatch]:
    """Encodes batches in `workers` processes and yields them in the order they came.

    Only a few batches per worker are in memory at a time.

    Raises:
        InputError: At the first bad line, or if a worker process is killed.
    """
    if workers == 1:
        yield from map(encoder, batches)
        return
    # fork, because the tokenizer and the seconds of importing torch are then shared; the pool
    # starts all of its processes at the first submit, before it starts a thread.
    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context("fork"), _start_worker, (encoder,)
    )
    try:
        pending: deque[Future[EncodedBatch]] = deque()
        for batch in batches:
            pending.append(pool.submit(_encode_in_worker, batch))
            if len(pending) > 3 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise InputError(
            "a tokenizing process was killed, most likely for lack of memory; use fewer --workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


_worker_encoder: Encoder


def _start_worker(encoder: Encoder) -> None:
    global _worker_encoder
    _worker_encoder = encoder
    # Ctrl-C reaches the whole process group; the parent alone answers it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """Ends this process when the parent is gone, even by SIGKILL; the pool itself would hang."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def _encode_in_worker(batch: Batch) -> EncodedBatch:
    return _worker_encoder(batch)
