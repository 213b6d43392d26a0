"""From the documents of a chunk to a part: parsed, tokenized, grouped by domain."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from megatron_rw.data.indexed.parts import Counts, Group, Part, Rejects, Store, checksum
from megatron_rw.data.text.chunks import Reading, Task
from megatron_rw.data.text.dedup import HASH_BYTES
from megatron_rw.data.text.readers import Chunk, read
from megatron_rw.data.text.records import BadRecordError, Raw, Reject, parse, text_field
from megatron_rw.data.text.sources import Source
from megatron_rw.data.tokenizers.tokenizer import Tokenizer, optimal_dtype
from megatron_rw.errors import UserError

# Enough for a tokenizer's batch to cost nothing beside the tokenizing, and little memory.
_BATCH_CHARACTERS = 1 << 18

Splitter = Callable[[str], list[str]]


@dataclass(frozen=True)
class Encoding:
    """What becomes of a document.

    Attributes:
        keys: fields that are tokenized, each into datasets of its own.
        domain_key: field that holds the domain, or None.
        domain_of: the domain of a source's documents, where no field holds it.
        eod: token id to end every document with, or None.
        max_document_tokens: longer documents are cut into several; None cuts none.
        splitter: cuts a text into sentences, which become sequences; None cuts none.
        hashed: whether the text of each line is hashed, to find duplicates by.
    """

    keys: tuple[str, ...]
    domain_key: str | None
    domain_of: Callable[[Source], str]
    eod: int | None
    max_document_tokens: int | None
    splitter: Splitter | None
    hashed: bool


@dataclass
class _Open:
    """A group that documents are still added to."""

    counts: Counts = field(default_factory=Counts)
    ids: list[NDArray[Any]] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    splits: list[int] = field(default_factory=list)
    origins: list[int] = field(default_factory=list)
    text_bytes: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Done:
    """What came of a task.

    Attributes:
        records: number of lines that were taken.
        text_bytes: UTF-8 bytes of their text.
        rejects: lines that were not; they count from the start of their chunk.
    """

    records: int
    text_bytes: int
    rejects: Rejects


class Encoder:
    """Turns the chunks of tasks into parts.

    Args:
        tokenizer: gives the token ids.
        reading: how documents are read.
        encoding: what becomes of them.
        store: where the parts go.

    Attributes:
        reading: as given.
        dtype: type of a token id in the parts.
    """

    def __init__(
        self, tokenizer: Tokenizer, reading: Reading, encoding: Encoding, store: Store
    ) -> None:
        self._tokenizer = tokenizer
        self.reading = reading
        self._encoding = encoding
        self._store = store
        self.dtype = optimal_dtype(tokenizer.vocab_size)

    def __call__(self, task: Task) -> Done:
        """Does a task; every chunk's part is complete before the next chunk is begun.

        Raises:
            UserError: the source is damaged.
        """
        records = text_bytes = 0
        rejects = Rejects()
        for chunk in read(task, self.reading):
            if chunk.number in task.finished:
                for _ in chunk.documents:
                    pass
                continue
            part = self._encode(task.source, chunk)
            records += part.records
            text_bytes += sum(group.counts.text_bytes for group in part.groups)
            rejects.merge(part.rejects)
        return Done(records, text_bytes, rejects)

    def _encode(self, source: Source, chunk: Chunk) -> Part:
        path = self._store.path(source, chunk.number)
        rejected = path.with_suffix(".rejects")
        rejected.unlink(missing_ok=True)  # of a worker that was killed
        builder = _PartBuilder(source, self._tokenizer, self.reading, self._encoding, rejected)
        for raw in chunk.documents:
            builder.add(raw)
        return builder.finish(path, chunk)


class _PartBuilder:
    def __init__(
        self,
        source: Source,
        tokenizer: Tokenizer,
        reading: Reading,
        encoding: Encoding,
        rejected: Path,
    ) -> None:
        self._source = source
        self._tokenizer = tokenizer
        self._reading = reading
        self._encoding = encoding
        self._rejected = rejected
        self._rejected_file: BinaryIO | None = None
        self._text_key = encoding.keys[0] if source.format == "txt" else None
        self._waiting: list[tuple[Raw, str, list[str]]] = []
        self._characters = 0
        self._groups: dict[tuple[int, str], _Open] = {}
        self._hashes: list[bytes] = []
        self._rejects = Rejects()
        self._records = 0

    def add(self, raw: Raw) -> None:
        try:
            record = parse(raw, self._reading.max_line_bytes, self._text_key)
            texts = [text_field(record, "--json-keys", key) for key in self._encoding.keys]
            domain = self._domain(record)
        except BadRecordError as error:
            self._reject(raw, error)
            return
        self._waiting.append((raw, domain, texts))
        self._characters += sum(map(len, texts))
        if self._characters >= _BATCH_CHARACTERS:
            self._tokenize()

    def finish(self, path: Path, chunk: Chunk) -> Part:
        self._tokenize()
        with path.with_suffix(".bin").open("wb") as file:
            for group in self._groups.values():
                for ids in group.ids:
                    file.write(ids.tobytes())
        if self._rejected_file is not None:
            self._rejected_file.close()
        encoding, groups = self._encoding, self._groups.values()
        part = Part(
            lines=chunk.lines,
            records=self._records,
            rejects=self._rejects,
            groups=[
                Group(key, domain, group.counts, len(group.lengths))
                for (key, domain), group in self._groups.items()
            ],
            last=chunk.last,
            checksum=checksum(path),
            lengths=_joined(group.lengths for group in groups),
            splits=_joined(group.splits for group in groups) if encoding.splitter else None,
            origins=_joined(group.origins for group in groups) if encoding.hashed else None,
            text_bytes=(
                _joined((group.text_bytes for group in groups), np.int64)
                if encoding.hashed
                else None
            ),
            hashes=(
                np.frombuffer(b"".join(self._hashes), np.uint8).reshape(-1, HASH_BYTES)
                if encoding.hashed
                else None
            ),
        )
        part.save(path)
        return part

    def _domain(self, record: dict[str, Any]) -> str:
        if self._encoding.domain_key is None:
            return self._encoding.domain_of(self._source)
        return safe_domain(text_field(record, "--domain-key", self._encoding.domain_key))

    def _reject(self, raw: Raw, error: BadRecordError) -> None:
        reject = Reject(raw.line, error.kind, str(error), raw.excerpt())
        self._rejects.add(self._source.path, reject)
        if self._rejected_file is None:
            self._rejected_file = self._rejected.open("wb")
        line = [reject.line, reject.kind, reject.reason, reject.excerpt]
        self._rejected_file.write(json.dumps(line).encode() + b"\n")

    def _tokenize(self) -> None:
        waiting, self._waiting, self._characters = self._waiting, [], 0
        split = self._encoding.splitter or (lambda text: [text])
        sequences = [[split(text) for text in texts] for _, _, texts in waiting]
        flat = [sequence for texts in sequences for text in texts for sequence in text]
        try:
            encoded = iter(self._tokenizer.encode_batch(flat))
        except ValueError as error:
            if len(waiting) == 1:
                self._reject(waiting[0][0], BadRecordError("tokenizer failed", str(error)))
                return
            for document in waiting:  # which of them it is, only each by itself can tell
                self._waiting = [document]
                self._tokenize()
            return
        for (raw, domain, texts), pieces in zip(waiting, sequences, strict=True):
            by_key = [[next(encoded) for _ in text] for text in pieces]
            by_key = [[ids for ids in text if len(ids)] for text in by_key]
            if not all(by_key):
                self._reject(
                    raw, BadRecordError("no tokens", "the tokenizer makes no token of this text")
                )
                continue
            for key, (text, ids) in enumerate(zip(texts, by_key, strict=True)):
                self._append(key, domain, text, ids)
            if self._encoding.hashed:
                self._hashes.append(_hash(texts))
            self._records += 1

    def _append(self, key: int, domain: str, text: str, sequences: list[NDArray[Any]]) -> None:
        group = self._groups.setdefault((key, domain), _Open())
        documents = [sequences]
        if (limit := self._encoding.max_document_tokens) is not None:
            documents = list(_cut(sequences, limit - (self._encoding.eod is not None)))
        for document in documents:
            if self._encoding.eod is not None:
                ending = np.array([self._encoding.eod], document[-1].dtype)
                document[-1] = np.concatenate([document[-1], ending])
            group.ids += document
            lengths = [len(ids) for ids in document]
            group.lengths += lengths
            group.splits.append(len(document))
            group.origins.append(self._records)
            group.counts.documents += 1
            group.counts.tokens += sum(lengths)
            largest = max(int(ids.max()) for ids in document)
            group.counts.max_token_id = max(group.counts.max_token_id, largest)
        size = len(text) if text.isascii() else len(text.encode())
        group.counts.text_bytes += size
        group.text_bytes += [size] + [0] * (len(documents) - 1)


def _cut(sequences: list[NDArray[Any]], limit: int) -> Iterator[list[NDArray[Any]]]:
    """Cuts a document after every `limit` tokens."""
    room = limit
    document: list[NDArray[Any]] = []
    for sequence in sequences:
        ids = sequence
        while len(ids):
            if room == 0:
                yield document
                document, room = [], limit
            document.append(ids[:room])
            ids = ids[room:]
            room -= len(document[-1])
    yield document


def _hash(texts: list[str]) -> bytes:
    digest = hashlib.blake2b(digest_size=HASH_BYTES)
    for text in texts:
        content = text.encode()
        digest.update(len(content).to_bytes(8, "little") + content)
    return digest.digest()


def _joined(lists: Iterator[list[int]], dtype: type[Any] = np.int32) -> NDArray[Any]:
    return np.array([item for items in lists for item in items], dtype)


def safe_domain(name: str) -> str:
    """Returns a domain's name if it can be part of a file name.

    Raises:
        BadRecordError: it cannot.
    """
    characters = name.replace("_", "a").replace("-", "a").replace(".", "a")
    if name[:1] in "-." or len(name) > 100 or not (characters.isascii() and characters.isalnum()):
        raise BadRecordError(
            "unusable domain",
            f"the domain {name[:120]!r} cannot be part of a file name here; use at most 100 "
            "letters, digits, '_', '-' and '.', and neither '-' nor '.' first",
        )
    return name


def check_domain(name: str, what: str) -> str:
    """As `safe_domain`, for a domain that is not a line's.

    Args:
        name: the domain.
        what: where it is from, for the message.

    Raises:
        UserError: it cannot be part of a file name.
    """
    try:
        return safe_domain(name)
    except BadRecordError as error:
        raise UserError(f"{what}: {error}") from error
