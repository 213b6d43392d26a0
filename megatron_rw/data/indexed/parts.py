"""Parts: what workers make of chunks, kept on disk until all of them are there to be joined.

A part is up to three files in the directory of its source, named by the chunk's number: `.bin`,
token ids, one domain after the other; `.rejects`, a line of JSON for each rejected line; and
`.npz`, the index and the counts, which is written last and makes the part complete.

Nothing is forced onto the disk here, since that would cost more than a power failure does: what an
interrupted call left behind is compared with its checksums before it is used.
"""

import itertools
import json
import operator
import resource
import shutil
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from megatron_rw.data.indexed.domains import DomainRecord
from megatron_rw.data.indexed.pair import PairWriter
from megatron_rw.data.text.dedup import DuplicateFinder
from megatron_rw.data.text.sources import Source
from megatron_rw.data.text.streams import STANDARD_INPUT

REJECTS_FILE = "rejects.jsonl"
_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class Group:
    """The documents of a part that go to one dataset, one after the other."""

    domain: str
    documents: int
    max_token_id: int


@dataclass(frozen=True)
class Part:
    """What was made of a chunk."""

    # Lines of the chunk, blank ones included; those that were taken; the others by kind of reject.
    lines: int
    records: int
    rejects: Counter[str]
    groups: list[Group]
    # Whether the chunk is its source's last one.
    last: bool
    checksum: int
    # [documents], group by group: tokens, which of the taken lines it is from, UTF-8 bytes of text.
    lengths: NDArray[np.int32]
    origins: NDArray[np.int32]
    text_bytes: NDArray[np.int64]
    # [records, 16] of the text of each taken line; [0, 16] unless duplicates are left out.
    hashes: NDArray[np.uint8]

    def save(self, path: Path) -> None:
        """Writes the index; it is complete whenever it exists under its name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values["groups"] = [asdict(group) for group in self.groups]
        arrays = {name: value for name, value in values.items() if isinstance(value, np.ndarray)}
        head = json.dumps({name: value for name, value in values.items() if name not in arrays})
        arrays["head"] = np.frombuffer(head.encode(), np.uint8)
        partial = path.with_suffix(".partial")
        with partial.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
        partial.replace(path)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Reads an index."""
        with np.load(path, allow_pickle=False) as file:
            arrays: dict[str, Any] = dict(file)
        head = json.loads(arrays.pop("head").tobytes())
        head["rejects"] = Counter(head["rejects"])
        head["groups"] = [Group(**group) for group in head["groups"]]
        return cls(**head, **arrays)


def checksum(path: Path) -> int:
    """Returns the CRC-32 of the files beside a part's index: its token ids and rejected lines."""
    crc = 0
    for suffix in (".bin", ".rejects"):
        file = path.with_suffix(suffix)
        if suffix == ".bin" or file.exists():
            with file.open("rb") as stream:
                while block := stream.read(_BLOCK_BYTES):
                    crc = zlib.crc32(block, crc)
    return crc


class Store:
    """The parts of all sources, which are in the order of their documents."""

    def __init__(self, directory: Path, sources: Sequence[Source]) -> None:
        self.directory = directory
        self.sources = sources

    def path(self, source: Source, number: int) -> Path:
        """Returns the path of a part's index; its other files differ in the suffix."""
        return self.directory / source.key / f"{number:06d}.npz"

    def prepare(self) -> None:
        """Makes the directories of parts and removes the parts that cannot be used.

        Those are the parts that a power failure damaged, and all of standard input, which cannot
        be read again.
        """
        for source in self.sources:
            folder = self.directory / source.key
            if source.path == STANDARD_INPUT:
                shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(exist_ok=True, parents=True)
            for path in folder.glob("*.npz"):
                try:
                    whole = Part.load(path).checksum == checksum(path)
                except (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile):
                    whole = False
                if not whole:
                    path.unlink()

    def finished(self, source: Source) -> frozenset[int] | None:
        """Returns the numbers of a source's parts; None if all of its parts are there."""
        numbers = frozenset(int(path.stem) for path in (self.directory / source.key).glob("*.npz"))
        highest = max(numbers, default=-1)
        if numbers and len(numbers) == highest + 1 and Part.load(self.path(source, highest)).last:
            return None
        return numbers

    def parts(self) -> Iterator[tuple[Source, Path, Part]]:
        """Yields the parts that are there, in the order of their documents."""
        for source in self.sources:
            paths = (self.directory / source.key).glob("*.npz")
            for path in sorted(paths, key=lambda path: int(path.stem)):
                yield source, path, Part.load(path)


@dataclass
class Rejects:
    """Lines that were left out."""

    counts: Counter[str] = field(default_factory=Counter)  # Kind to number of lines.
    # Kind to the first of its lines: file, line from the start of the file, and reason.
    first: dict[str, tuple[str, int, str]] = field(default_factory=dict)


@dataclass
class Joined:
    """What was written; domains are in order of appearance."""

    # Domain to what is in its dataset, and to UTF-8 bytes of its text.
    records: dict[str, DomainRecord] = field(default_factory=dict)
    text_bytes: Counter[str] = field(default_factory=Counter)
    duplicates: int = 0  # Documents that were left out as copies.


def join(store: Store, directory: Path, dtype: type[Any], deduplicate: bool) -> Joined:
    """Writes `<domain>_text_document.bin/.idx` from the parts of all sources to a directory.

    `dtype` is the type of a token id. With `deduplicate`, only the first of several lines with the
    same text is kept, which takes a byte of memory for each document; else memory does not grow
    with the sources. The parts stay.
    """
    # Each domain has three open files.
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    joined = Joined()
    with ExitStack() as stack:
        copies = _duplicates(store, directory) if deduplicate else None
        writers: dict[str, PairWriter] = {}
        start = 0
        for _, path, part in store.parts():
            keep = np.ones(part.records, np.bool_)
            if copies is not None:
                keep = ~copies[start : start + part.records]
            start += part.records
            # Where each document begins in the file, and the last one's end, in bytes.
            edges = np.concatenate([[0], np.cumsum(part.lengths, dtype=np.int64)])
            edges *= np.dtype(dtype).itemsize
            end = 0
            with path.with_suffix(".bin").open("rb") as tokens:
                for group in part.groups:
                    name, first, end = group.domain, end, end + group.documents
                    kept = keep[part.origins[first:end]]
                    joined.duplicates += len(kept) - int(kept.sum())
                    if not kept.any():
                        continue  # a domain that holds nothing but copies gets no dataset
                    if name not in writers:
                        prefix = directory / f"{name}_text_document"
                        writers[name] = stack.enter_context(PairWriter(prefix, dtype))
                    writer = writers[name]
                    for begin, stop in edges[first + _bounds_of_runs(kept)].tolist():
                        writer.copy_tokens(tokens, begin, stop - begin)
                    writer.add_documents(part.lengths[first:end][kept])
                    # That of all documents, copies included.
                    writer.largest_id = max(writer.largest_id, group.max_token_id)
                    joined.text_bytes[name] += int(part.text_bytes[first:end][kept].sum())
        for domain, writer in writers.items():
            joined.records[domain] = writer.finalize()
    return joined


def write_rejects(store: Store, path: Path) -> Rejects:
    """Writes a line of JSON for each rejected line of the parts that are there, if there is any."""
    rejects = Rejects()
    with path.open("w", encoding="utf-8") as file:
        for source, parts in itertools.groupby(store.parts(), key=operator.itemgetter(0)):
            before = 0
            for _, index, part in parts:
                content = index.with_suffix(".rejects").read_bytes() if part.rejects else b""
                for rejected in content.splitlines():
                    reject = json.loads(rejected)
                    kind, line = reject["kind"], before + reject["line"]
                    reject = {"file": source.path, **reject, "line": line}
                    file.write(json.dumps(reject, ensure_ascii=False) + "\n")
                    rejects.counts[kind] += 1
                    rejects.first.setdefault(kind, (source.path, line, reject["reason"]))
                before += part.lines
    if not rejects.counts:
        path.unlink()
    return rejects


def _duplicates(store: Store, directory: Path) -> NDArray[np.bool_]:
    with DuplicateFinder(directory) as finder:
        for _, _, part in store.parts():
            finder.add(part.hashes)
        return finder.duplicates()


def _bounds_of_runs(kept: NDArray[np.bool_]) -> NDArray[np.intp]:
    """Returns where each run of true values begins and ends, [runs, 2]."""
    padded = np.concatenate([[0], kept.view(np.int8), [0]])
    return np.flatnonzero(np.diff(padded)).reshape(-1, 2)
