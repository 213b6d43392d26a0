"""Parts: what workers make of chunks, kept on disk until all of them are there to be joined.

A part is up to three files in the directory of its source, named by the chunk's number: `.bin`,
token ids, one domain after the other; `.rejects`, a line of JSON for each rejected line; and
`.npz`, the index and the counts, which is written last and makes the part complete.

Nothing is forced onto the disk here, since that would cost more than a power failure does: what an
interrupted call left behind is compared with its checksums before it is used.
"""

from __future__ import annotations

import json
import shutil
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from megatron_rw.data.text.sources import STANDARD_INPUT, Source

_BLOCK_BYTES = 1 << 20


@dataclass
class Counts:
    """Sizes of a domain, or of a part of it.

    Attributes:
        tokens: Number of tokens, end-of-document tokens included.
        text_bytes: UTF-8 bytes of text.
        max_token_id: The largest token id, -1 if there is none.
    """

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    max_token_id: int = -1

    def add(self, other: Counts) -> None:
        """Adds the sizes of something else."""
        self.documents += other.documents
        self.tokens += other.tokens
        self.text_bytes += other.text_bytes
        self.max_token_id = max(self.max_token_id, other.max_token_id)


@dataclass(frozen=True)
class Group:
    """The documents of a part that go to one dataset, one after the other.

    Attributes:
        key: Number of the text's field among `--json-keys`.
        sequences: Number of sequences; the documents unless those are split into sentences.
    """

    key: int
    domain: str
    counts: Counts
    sequences: int


@dataclass(frozen=True)
class Part:
    """What was made of a chunk.

    Attributes:
        lines: Number of lines of the chunk, blank ones included.
        records: Number of lines that were taken.
        rejects: Kind of reject to number of lines.
        last: Whether the chunk is its source's last one.
        checksum: See the function `checksum`.
        lengths: int32 [sequences], tokens of each, group by group.
        splits: int32 [documents], sequences of each.
        origins: int32 [documents], which of the taken lines each is from.
        text_bytes: int64 [documents], UTF-8 bytes of each document's text.
        hashes: uint8 [records, 16] of the text of each taken line; [0, 16] unless duplicates are
            left out.
    """

    lines: int
    records: int
    rejects: Counter[str]
    groups: list[Group]
    last: bool
    checksum: int
    lengths: NDArray[np.int32]
    splits: NDArray[np.int32]
    origins: NDArray[np.int32]
    text_bytes: NDArray[np.int64]
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
        head["groups"] = [
            Group(**{**group, "counts": Counts(**group["counts"])}) for group in head["groups"]
        ]
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
