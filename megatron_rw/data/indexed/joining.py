"""Joins parts into datasets: token bytes are copied inside the kernel, the index is rewritten."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from megatron_rw.data.indexed.pair import PairWriter
from megatron_rw.data.indexed.parts import Counts, Group, Part, Rejects, Store
from megatron_rw.data.text.dedup import Bitmap, DuplicateFinder
from megatron_rw.data.text.sources import Source

REJECTS_FILE = "rejects.jsonl"


@dataclass
class Joined:
    """What was written.

    Attributes:
        counts: of each dataset, by key and domain; domains in order of appearance.
        rejects: the lines that were left out, counted from the start of their file.
        duplicates: documents that were left out.
    """

    counts: dict[tuple[int, str], Counts] = field(default_factory=dict)
    rejects: Rejects = field(default_factory=Rejects)
    duplicates: int = 0


def join(
    sources: Sequence[Source],
    store: Store,
    directories: Sequence[Path],
    dtype: type[Any],
    deduplicate: bool,
    rejects: Path,
) -> Joined:
    """Writes `<domain>_text_document.bin/.idx` from the parts of all sources.

    The parts stay where they are. Memory does not grow with the sources, but for a bit for each
    document where duplicates are left out.

    Args:
        sources: in the order of their documents.
        store: their parts, all of them.
        directories: where the datasets of each key go.
        dtype: type of a token id.
        deduplicate: whether to keep only the first of several lines with the same text.
        rejects: where to list the lines that were left out, if there are any.
    """
    _allow_many_files()
    joined = Joined()
    with ExitStack() as stack:
        copies = _duplicates(sources, store, directories[0]) if deduplicate else None
        writers: dict[tuple[int, str], PairWriter] = {}
        start = 0
        for path, part in _parts(sources, store):
            keep = None if copies is None else ~copies.slice(start, start + part.records)
            start += part.records
            with path.with_suffix(".bin").open("rb") as tokens:
                for group, documents in _groups(part, dtype):
                    name = (group.key, group.domain)
                    kept = _kept(documents, keep)
                    joined.duplicates += len(kept) - int(kept.sum())
                    if not kept.any():
                        continue  # of a domain with nothing of its own there is no dataset
                    if name not in writers:
                        writers[name] = stack.enter_context(
                            PairWriter(directories[group.key] / dataset_name(group.domain), dtype)
                        )
                        joined.counts[name] = Counts()
                    written = _append(writers[name], tokens, documents, kept)
                    # The largest token id stays that of all documents, copies included.
                    written.max_token_id = group.counts.max_token_id
                    if keep is None:
                        written.text_bytes = group.counts.text_bytes
                    joined.counts[name].add(written)
        for writer in writers.values():
            writer.finalize()
    joined.rejects = write_rejects(sources, store, rejects)
    return joined


def dataset_name(domain: str) -> str:
    """File name of a domain's dataset, without suffix."""
    return f"{domain}_text_document"


def write_rejects(sources: Sequence[Source], store: Store, path: Path) -> Rejects:
    """Writes a line of JSON for each rejected line of the parts that are there, if there is any.

    Returns:
        Their count, by kind, with lines counted from the start of their file.
    """
    rejects = Rejects()
    with path.open("w", encoding="utf-8") as file:
        for source, before, index, part in _with_lines(sources, store):
            if not part.rejects.total:
                continue
            with index.with_suffix(".rejects").open("rb") as lines:
                for content in lines:
                    line, kind, reason, excerpt = json.loads(content)
                    reject = {
                        "file": source.path,
                        "line": before + line,
                        "kind": kind,
                        "reason": reason,
                        "text": excerpt,
                    }
                    file.write(json.dumps(reject, ensure_ascii=False) + "\n")
            rejects.merge(_shifted(part.rejects, before))
    if not rejects.total:
        path.unlink()
    return rejects


def _shifted(rejects: Rejects, lines: int) -> Rejects:
    examples = {
        kind: [(path, lines + line, reason) for path, line, reason in found]
        for kind, found in rejects.examples.items()
    }
    return Rejects(rejects.counts, examples)


def _with_lines(
    sources: Sequence[Source], store: Store
) -> Iterator[tuple[Source, int, Path, Part]]:
    for source in sources:
        before = 0
        for path, part in store.parts(source):
            yield source, before, path, part
            before += part.lines


def _parts(sources: Sequence[Source], store: Store) -> Iterator[tuple[Path, Part]]:
    for source in sources:
        yield from store.parts(source)


def _duplicates(sources: Sequence[Source], store: Store, directory: Path) -> Bitmap:
    with DuplicateFinder(directory) as finder:
        for _, part in _parts(sources, store):
            if part.hashes is not None:
                finder.add(part.hashes)
        return finder.duplicates()


@dataclass(frozen=True)
class _Documents:
    """Documents of a group: where their tokens are in the part, and from which lines they are."""

    offset: int
    itemsize: int
    lengths: NDArray[np.int32]
    splits: NDArray[np.int32]
    origins: NDArray[np.int32] | None
    text_bytes: NDArray[np.int64] | None


def _groups(part: Part, dtype: type[Any]) -> Iterator[tuple[Group, _Documents]]:
    itemsize = np.dtype(dtype).itemsize
    offset = sequence = document = 0
    for group in part.groups:
        sequences = slice(sequence, sequence + group.sequences)
        documents = slice(document, document + group.counts.documents)
        yield (
            group,
            _Documents(
                offset,
                itemsize,
                part.lengths[sequences],
                np.ones(group.counts.documents, np.int32)
                if part.splits is None
                else part.splits[documents],
                None if part.origins is None else part.origins[documents],
                None if part.text_bytes is None else part.text_bytes[documents],
            ),
        )
        sequence, document = sequences.stop, documents.stop
        offset += group.counts.tokens * itemsize


def _kept(documents: _Documents, keep: NDArray[np.bool_] | None) -> NDArray[np.bool_]:
    """Which of the documents are of lines to be kept."""
    if keep is None or documents.origins is None:
        return np.ones(len(documents.splits), np.bool_)
    return keep[documents.origins]


def _append(
    writer: PairWriter, tokens: BinaryIO, documents: _Documents, kept: NDArray[np.bool_]
) -> Counts:
    """Appends some of the documents; returns what they are."""
    lengths, splits = documents.lengths, documents.splits
    sequence_kept = np.repeat(kept, splits)
    ends = documents.offset + np.cumsum(lengths, dtype=np.int64) * documents.itemsize
    # Runs of sequences that are kept, as positions where it changes.
    changes = np.flatnonzero(np.diff(np.concatenate([[0], sequence_kept.view(np.int8), [0]])))
    for first, behind in changes.reshape(-1, 2):
        start = documents.offset if first == 0 else int(ends[first - 1])
        writer.copy_tokens(tokens, start, int(ends[behind - 1]) - start)
    writer.add_documents(lengths[sequence_kept], splits[kept])
    return Counts(
        documents=int(kept.sum()),
        tokens=int(lengths[sequence_kept].sum(dtype=np.int64)),
        text_bytes=0 if documents.text_bytes is None else int(documents.text_bytes[kept].sum()),
    )


def _allow_many_files() -> None:
    """Each domain has three files open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
