"""From the documents of a chunk to a part: parsed, tokenized, grouped by domain."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_rw.data.indexed.parts import Group, Part, Store, checksum
from megatron_rw.data.preprocess_config import PreprocessConfig
from megatron_rw.data.text.chunks import Chunk, Reading, Task, read
from megatron_rw.data.text.dedup import HASH_BYTES
from megatron_rw.data.text.domain_names import safe_domain
from megatron_rw.data.text.records import BadRecordError, Raw, parse, text_field
from megatron_rw.data.text.sources import Source
from megatron_rw.data.tokenizers.library_tokenizer import optimal_dtype
from megatron_rw.data.tokenizers.tokenizer import Tokenizer
from megatron_rw.errors import UserError

# Large enough for the overhead of a tokenizer's batch not to matter, and little memory.
_BATCH_CHARACTERS = 1 << 18


class TaskResult(NamedTuple):
    """Lines that were taken of a task, UTF-8 bytes of their text, and lines not taken."""

    records: int
    text_bytes: int
    rejects: int


class Encoder:
    """Turns the chunks of tasks into parts, which the store takes.

    `dtype` is that of a token id in the parts, and `ending` [0 or 1] the token ids that end every
    document. Raises a `UserError` if the tokenizer lacks an end-of-document token that is asked
    for.
    """

    def __init__(
        self, config: PreprocessConfig, tokenizer: Tokenizer, chunk_bytes: int, store: Store
    ) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.reading = Reading(
            chunk_bytes=chunk_bytes,
            max_line_bytes=config.max_line_bytes,
            columns=config.columns,
            whole_files=config.txt_documents == "file",
        )
        self.dtype = optimal_dtype(tokenizer.vocab_size)
        self.ending = np.empty(0, self.dtype)
        if config.append_eod:
            if tokenizer.eod is None or tokenizer.eod < 0:
                raise UserError(
                    f"--append-eod: the tokenizer {config.tokenizer.tokenizer_model} has no "
                    "end-of-document token; leave the flag out, or use a model that has one "
                    "(tools/train_tokenizer.py makes one)"
                )
            self.ending = np.array([tokenizer.eod], self.dtype)
        self.store = store

    def __call__(self, task: Task) -> TaskResult:
        """Does a task; every chunk's part is complete before the next chunk is begun.

        Raises a `UserError` if the source is damaged.
        """
        records = text_bytes = rejects = 0
        for chunk in read(task, self.reading):
            if chunk.number in task.finished:
                for _ in chunk.documents:
                    pass
                continue
            part = self._encode(task.source, chunk)
            records += part.records
            text_bytes += int(part.text_bytes.sum())
            rejects += part.rejects.total()
        return TaskResult(records, text_bytes, rejects)

    def _encode(self, source: Source, chunk: Chunk) -> Part:
        path = self.store.path(source, chunk.number)
        path.with_suffix(".rejects").unlink(missing_ok=True)  # left by a worker that was killed
        builder = _PartBuilder(self, source, path)
        for raw in chunk.documents:
            builder.add(raw)
        return builder.finish(chunk)


@dataclass
class _OpenGroup:
    """A group that documents are still added to: their tokens, and the columns of a `Part`."""

    ids: list[NDArray[Any]] = field(default_factory=list)
    origins: list[int] = field(default_factory=list)
    text_bytes: list[int] = field(default_factory=list)


class _PartBuilder:
    """Collects the documents of a chunk of a source, and writes the part of that path."""

    def __init__(self, encoder: Encoder, source: Source, path: Path) -> None:
        self._encoder = encoder
        self._config = encoder.config
        self._path = path
        self._key = self._config.inputs.domain_key or ""
        self._domain = "" if self._key else self._config.domain_of(source)
        self._rejected_file: BinaryIO | None = None
        self._text_key = self._config.json_key if source.format == "txt" else None
        self._waiting: list[tuple[Raw, str, str]] = []
        self._characters = 0
        self._groups: dict[str, _OpenGroup] = {}
        self._hashes: list[bytes] = []
        self._rejects: Counter[str] = Counter()
        self._records = 0

    def add(self, raw: Raw) -> None:
        """Takes a document, or rejects it."""
        try:
            record = parse(raw, self._config.max_line_bytes, self._text_key)
            text = text_field(record, "--json-key", self._config.json_key)
            domain = self._domain or safe_domain(text_field(record, "--domain-key", self._key))
        except BadRecordError as error:
            self._reject(raw, error)
            return
        self._waiting.append((raw, domain, text))
        self._characters += len(text)
        if self._characters >= _BATCH_CHARACTERS:
            self._tokenize()

    def finish(self, chunk: Chunk) -> Part:
        """Writes the part, once all documents of the chunk are added."""
        self._tokenize()
        groups = self._groups.values()
        with self._path.with_suffix(".bin").open("wb") as file:
            for group in groups:
                for ids in group.ids:
                    file.write(ids.tobytes())
        if self._rejected_file is not None:
            self._rejected_file.close()
        part = Part(
            lines=chunk.lines,
            records=self._records,
            rejects=self._rejects,
            groups=[
                Group(
                    domain=domain,
                    documents=len(group.ids),
                    max_token_id=max(int(ids.max()) for ids in group.ids),
                )
                for domain, group in self._groups.items()
            ],
            last=chunk.last,
            checksum=checksum(self._path),
            lengths=_joined((map(len, group.ids) for group in groups), np.int32),
            origins=_joined((group.origins for group in groups), np.int32),
            text_bytes=_joined((group.text_bytes for group in groups), np.int64),
            hashes=np.frombuffer(b"".join(self._hashes), np.uint8).reshape(-1, HASH_BYTES),
        )
        part.save(self._path)
        return part

    def _reject(self, raw: Raw, error: BadRecordError) -> None:
        self._rejects[error.kind] += 1
        if self._rejected_file is None:
            self._rejected_file = self._path.with_suffix(".rejects").open("wb")
        reject = {"line": raw.line, "kind": error.kind, "reason": str(error), "text": raw.excerpt()}
        self._rejected_file.write(json.dumps(reject).encode() + b"\n")

    def _tokenize(self) -> None:
        waiting, self._waiting, self._characters = self._waiting, [], 0
        try:
            encoded = self._encoder.tokenizer.encode_batch([text for _, _, text in waiting])
        except ValueError as error:
            if len(waiting) == 1:
                self._reject(waiting[0][0], BadRecordError("tokenizer failed", str(error)))
                return
            for document in waiting:  # one by one, to find out which of them it is
                self._waiting = [document]
                self._tokenize()
            return
        for (raw, domain, text), ids in zip(waiting, encoded, strict=True):
            if not len(ids):
                self._reject(
                    raw, BadRecordError("no tokens", "the tokenizer makes no token of this text")
                )
                continue
            content, ending = text.encode(), self._encoder.ending
            group = self._groups.setdefault(domain, _OpenGroup())
            group.ids.append(np.concatenate([ids, ending]) if len(ending) else ids)
            group.origins.append(self._records)
            group.text_bytes.append(len(content))
            if self._config.dedup == "exact":
                self._hashes.append(hashlib.blake2b(content, digest_size=HASH_BYTES).digest())
            self._records += 1


def _joined(lists: Iterable[Iterable[int]], dtype: type[Any]) -> NDArray[Any]:
    return np.fromiter(chain.from_iterable(lists), dtype)
