"""Joins parts into datasets: token bytes are copied inside the kernel, the index is rewritten."""

from __future__ import annotations

import itertools
import json
import operator
import resource
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from megatron_rw.data.indexed.pair import PairWriter
from megatron_rw.data.indexed.parts import Counts, Group, Part, Store
from megatron_rw.data.text.dedup import Bitmap, DuplicateFinder

REJECTS_FILE = "rejects.jsonl"


@dataclass
class Rejects:
    """Lines that were left out.

    Attributes:
        counts: Kind to number of lines.
        first: Kind to the first of its lines: file, line from the start of the file, and reason.
    """

    counts: Counter[str] = field(default_factory=Counter)
    first: dict[str, tuple[str, int, str]] = field(default_factory=dict)


@dataclass
class Joined:
    """What was written.

    Attributes:
        counts: Key and domain of each dataset to its sizes; domains in order of appearance.
        duplicates: Number of documents that were left out as copies.
    """

    counts: dict[tuple[int, str], Counts] = field(default_factory=dict)
    duplicates: int = 0


def join(store: Store, directories: Sequence[Path], dtype: type[Any], deduplicate: bool) -> Joined:
    """Writes `<domain>_text_document.bin/.idx` from the parts of all sources.

    The datasets of each key go to a directory of their own. `dtype` is the type of a token id. With
    `deduplicate`, only the first of several lines with the same text is kept, which takes a bit of
    memory for each document; else memory does not grow with the sources. The parts stay.
    """
    _allow_many_files()
    joined = Joined()
    with ExitStack() as stack:
        copies = _duplicates(store, directories[0]) if deduplicate else None
        writers: dict[tuple[int, str], PairWriter] = {}
        start = 0
        for _, path, part in store.parts():
            keep = np.ones(part.records, np.bool_)
            if copies is not None:
                keep = ~copies.slice(start, start + part.records)
            start += part.records
            with path.with_suffix(".bin").open("rb") as tokens:
                for group, before, sequences, documents in _groups(part):
                    name = (group.key, group.domain)
                    kept = keep[part.origins[documents]]
                    joined.duplicates += len(kept) - int(kept.sum())
                    if not kept.any():
                        continue  # a domain that holds nothing but copies gets no dataset
                    if name not in writers:
                        prefix = directories[group.key] / dataset_name(group.domain)
                        writers[name] = stack.enter_context(PairWriter(prefix, dtype))
                        joined.counts[name] = Counts()
                    lengths, splits = part.lengths[sequences], part.splits[documents]
                    bounds = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
                    bounds = (before + bounds) * np.dtype(dtype).itemsize
                    written = Counts(
                        documents=int(kept.sum()),
                        tokens=_append(writers[name], tokens, lengths, bounds, splits, kept),
                        text_bytes=int(part.text_bytes[documents][kept].sum()),
                        # That of all documents, copies included.
                        max_token_id=group.counts.max_token_id,
                    )
                    joined.counts[name].add(written)
        for writer in writers.values():
            writer.finalize()
    return joined


def dataset_name(domain: str) -> str:
    """Returns the file name of a domain's dataset, without suffix."""
    return f"{domain}_text_document"


def write_rejects(store: Store, path: Path) -> Rejects:
    """Writes a line of JSON for each rejected line of the parts that are there, if there is any."""
    rejects = Rejects()
    with path.open("w", encoding="utf-8") as file:
        for source, parts in itertools.groupby(store.parts(), key=operator.itemgetter(0)):
            before = 0
            for _, index, part in parts:
                for content in _lines(index.with_suffix(".rejects")) if part.rejects else ():
                    reject = json.loads(content)
                    kind, line = reject["kind"], before + reject["line"]
                    reject = {"file": source.path, **reject, "line": line}
                    file.write(json.dumps(reject, ensure_ascii=False) + "\n")
                    rejects.counts[kind] += 1
                    rejects.first.setdefault(kind, (source.path, line, reject["reason"]))
                before += part.lines
    if not rejects.counts:
        path.unlink()
    return rejects


def _lines(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        yield from file


def _duplicates(store: Store, directory: Path) -> Bitmap:
    with DuplicateFinder(directory) as finder:
        for _, _, part in store.parts():
            finder.add(part.hashes)
        return finder.duplicates()


def _groups(part: Part) -> Iterator[tuple[Group, int, slice, slice]]:
    """Yields each group, the tokens before it, and the slices of its sequences and documents."""
    tokens = sequence = document = 0
    for group in part.groups:
        sequences = slice(sequence, sequence + group.sequences)
        documents = slice(document, document + group.counts.documents)
        yield group, tokens, sequences, documents
        sequence, document = sequences.stop, documents.stop
        tokens += group.counts.tokens


def _append(
    writer: PairWriter,
    file: BinaryIO,
    lengths: NDArray[np.int32],
    bounds: NDArray[np.int64],
    splits: NDArray[np.int32],
    kept: NDArray[np.bool_],
) -> int:
    """Appends some of a group's documents and returns their number of tokens.

    `lengths` [sequences] are numbers of tokens, `bounds` [sequences + 1] the offsets in the file at
    which sequences begin, and the last one's end, in bytes; `splits` [documents] are numbers of
    sequences, and `kept` [documents] tells which documents are appended.
    """
    sequence_kept = np.repeat(kept, splits)
    # Runs of sequences that are kept, as the positions at which that changes.
    changes = np.flatnonzero(np.diff(np.concatenate([[0], sequence_kept.view(np.int8), [0]])))
    for first, last in bounds[changes].reshape(-1, 2).tolist():
        writer.copy_tokens(file, first, last - first)
    writer.add_documents(lengths[sequence_kept], splits[kept])
    return int(lengths[sequence_kept].sum(dtype=np.int64))


def _allow_many_files() -> None:
    """Raises the limit of open files, of which each domain has three."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
