"""Parts: what workers make of chunks, kept on disk until all of them are there to be joined.

A part is up to three files in the folder of its source, named by the chunk's number: `.bin`, token
ids, one domain after the other; `.rejects`, a line of JSON for each rejected line; and `.npz`, the
index and the counts, which is written last and makes the part complete.

Nothing is forced onto the disk here, as that would cost more than what is lost when the power is:
what an interrupted call left behind is compared with its checksums before it is used.
"""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from megatron_rw.data.text.records import Reject
from megatron_rw.data.text.sources import Source

_EXAMPLES = 3
_BLOCK = 1 << 20


@dataclass
class Counts:
    """What was written of a domain, or of a part of it.

    Attributes:
        documents: number of documents.
        tokens: number of tokens, end-of-document tokens included.
        text_bytes: UTF-8 bytes of text.
        max_token_id: the largest token id, -1 if there is none.
    """

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    max_token_id: int = -1

    def add(self, other: Counts) -> None:
        """Adds what was written elsewhere."""
        self.documents += other.documents
        self.tokens += other.tokens
        self.text_bytes += other.text_bytes
        self.max_token_id = max(self.max_token_id, other.max_token_id)


@dataclass
class Rejects:
    """How many lines were rejected, by kind, with a few of each.

    Attributes:
        counts: kind to number of lines.
        examples: kind to the first few, as `(file, line, reason)`.
    """

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[tuple[str, int, str]]] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Number of rejected lines."""
        return sum(self.counts.values())

    def add(self, path: str, reject: Reject) -> None:
        """Counts a rejected line."""
        self.counts[reject.kind] = self.counts.get(reject.kind, 0) + 1
        examples = self.examples.setdefault(reject.kind, [])
        if len(examples) < _EXAMPLES:
            examples.append((path, reject.line, reject.reason))

    def merge(self, other: Rejects) -> None:
        """Adds what was rejected elsewhere."""
        for kind, count in other.counts.items():
            self.counts[kind] = self.counts.get(kind, 0) + count
            examples = self.examples.setdefault(kind, [])
            examples += other.examples[kind][: _EXAMPLES - len(examples)]


@dataclass(frozen=True)
class Group:
    """The documents of a part that go to one dataset, one after the other.

    Attributes:
        key: number of the text's field among `--json-keys`.
        domain: their domain.
        counts: what they are.
        sequences: number of sequences; the documents unless those are split into sentences.
    """

    key: int
    domain: str
    counts: Counts
    sequences: int


@dataclass(frozen=True)
class Part:
    """What was made of a chunk.

    Attributes:
        lines: number of lines of the chunk, blank ones included.
        records: number of lines that were taken.
        rejects: those that were not; their lines count from the start of the chunk.
        groups: its documents.
        last: whether the chunk is its source's last one.
        checksum: of the other files, see `checksum`.
        lengths: int32 [sequences], tokens of each, group by group.
        splits: int32 [documents], sequences of each; None if each has one.
        origins: int32 [documents], which of the taken lines each is from; None unless hashed.
        text_bytes: int64 [documents], UTF-8 bytes of each document's text; None unless hashed.
        hashes: uint8 [records, 16] of the text of each taken line; None unless asked for.
    """

    lines: int
    records: int
    rejects: Rejects
    groups: list[Group]
    last: bool
    checksum: int
    lengths: NDArray[np.int32]
    splits: NDArray[np.int32] | None
    origins: NDArray[np.int32] | None
    text_bytes: NDArray[np.int64] | None
    hashes: NDArray[np.uint8] | None

    def save(self, path: Path) -> None:
        """Writes the index; it is complete whenever it exists under its name."""
        head = {
            "lines": self.lines,
            "records": self.records,
            "rejects": asdict(self.rejects),
            "groups": [asdict(group) for group in self.groups],
            "last": self.last,
            "checksum": self.checksum,
        }
        arrays: dict[str, Any] = {
            "head": np.frombuffer(json.dumps(head).encode(), np.uint8),
            "lengths": self.lengths,
        }
        for name in ("splits", "origins", "text_bytes", "hashes"):
            if (array := getattr(self, name)) is not None:
                arrays[name] = array
        partial = path.with_suffix(".partial")
        with partial.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
        partial.replace(path)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Reads an index."""
        with np.load(path, allow_pickle=False) as arrays:
            head = json.loads(arrays["head"].tobytes())
            return cls(
                lines=head["lines"],
                records=head["records"],
                rejects=Rejects(
                    head["rejects"]["counts"],
                    {
                        kind: [(path, line, reason) for path, line, reason in examples]
                        for kind, examples in head["rejects"]["examples"].items()
                    },
                ),
                groups=[
                    Group(
                        group["key"], group["domain"], Counts(**group["counts"]), group["sequences"]
                    )
                    for group in head["groups"]
                ],
                last=head["last"],
                checksum=head["checksum"],
                lengths=arrays["lengths"],
                splits=arrays.get("splits"),
                origins=arrays.get("origins"),
                text_bytes=arrays.get("text_bytes"),
                hashes=arrays.get("hashes"),
            )


def checksum(path: Path) -> int:
    """CRC-32 of the files beside a part's index: the token ids, and the rejected lines if any.

    Raises:
        OSError: the token ids cannot be read.
    """
    crc = 0
    for suffix in (".bin", ".rejects"):
        file = path.with_suffix(suffix)
        if suffix == ".bin" or file.exists():
            with file.open("rb") as stream:
                while block := stream.read(_BLOCK):
                    crc = zlib.crc32(block, crc)
    return crc


class Store:
    """The parts of all sources in one directory.

    Args:
        directory: where they are.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def folder(self, source: Source) -> Path:
        """Where the parts of a source are."""
        return self.directory / source.key

    def path(self, source: Source, number: int) -> Path:
        """The index of a part; its other files differ in the suffix."""
        return self.folder(source) / f"{number:06d}.npz"

    def drop_damaged(self, source: Source) -> None:
        """Removes parts that the power failed upon; their chunks are then done again."""
        for path in self.folder(source).glob("*.npz"):
            try:
                whole = Part.load(path).checksum == checksum(path)
            except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
                whole = False
            if not whole:
                path.unlink()

    def finished(self, source: Source) -> tuple[frozenset[int], bool]:
        """The numbers of a source's parts, and whether these are all."""
        numbers = frozenset(int(path.stem) for path in self.folder(source).glob("*.npz"))
        if not numbers:
            return numbers, False
        highest = max(numbers)
        whole = len(numbers) == highest + 1 and Part.load(self.path(source, highest)).last
        return numbers, whole

    def parts(self, source: Source) -> Iterator[tuple[Path, Part]]:
        """Yields the parts of a source that are there, in order."""
        numbers, _ = self.finished(source)
        for number in sorted(numbers):
            path = self.path(source, number)
            yield path, Part.load(path)
