"""The documents of a `.bin/.idx` pair, read a bounded block at a time."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from megatron_rw.data.indexed.integrity import check_pair
from megatron_rw.data.indexed.pair import Index, PairWriter, bin_path, idx_path
from megatron_rw.errors import UserError

# The most that a block holds. Work done once per block costs little beside reading this much.
_BYTES = 16 << 20
_DOCUMENTS = 1 << 16
_REMEDY = "make the dataset again with tools/preprocess_data.py"


@dataclass(frozen=True)
class DocumentBlock:
    """Consecutive documents."""

    first: int  # Number of the first document in its dataset, from 0.
    tokens: NDArray[np.int64]  # int64 [documents], tokens of each document.
    start: int  # Index of the first token in the `.bin`.
    size: int  # Bytes of all documents in the `.bin`.


class DatasetReader:
    """Reads a whole dataset in the order of its documents; a context manager.

    Raises a `UserError` if it is missing or damaged, or its documents have several sequences each.
    """

    def __init__(self, prefix: Path) -> None:
        self.prefix = prefix
        self.index = Index.open(prefix)
        if not bin_path(prefix).is_file():
            raise UserError(f"{bin_path(prefix)}: no such file, but its .idx is there; copy both")
        check_pair(str(prefix))
        if self.index.multimodal:
            raise UserError(f"{idx_path(prefix)} is of a multimodal dataset; give one of text")
        self.dtype = self.index.dtype
        self.documents = len(self.index.lengths)
        if len(self.index.bounds) != self.documents + 1:
            raise UserError(
                f"{idx_path(prefix)}: has documents of several sequences, as Megatron's "
                "--split-sentences makes them; make it again without that flag"
            )
        self.tokens = os.path.getsize(bin_path(prefix)) // self.dtype.itemsize
        self._file = bin_path(prefix).open("rb")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """Closes the file of the tokens."""
        self._file.close()

    def blocks(self, tokens: int | None = None) -> Iterator[DocumentBlock]:
        """Yields all documents, some 16 MB of tokens at a time.

        With `tokens` a block has at most so many, unless it is a single document. Raises a
        `UserError` if documents do not follow one another in the index or the `.bin`; the message
        names the first such document.
        """
        end = 0
        limit = tokens or _BYTES // self.dtype.itemsize
        step = max(_DOCUMENTS, limit // 128)
        for first in range(0, self.documents, step):
            lengths = np.asarray(self.index.lengths[first : first + step])
            edges = end + np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
            offsets = self.index.offsets[first : first + step]
            bounds = self.index.bounds[first : first + step + 1]
            moved = bounds != np.arange(first, first + len(bounds))
            wrong = (offsets != edges[:-1] * self.dtype.itemsize) | (lengths < 0)
            wrong |= moved[:-1] | moved[1:]
            if wrong.any():
                raise UserError(
                    f"{idx_path(self.prefix)}: document {first + wrong.argmax()} does not begin or "
                    f"end where those before it say; {_REMEDY}"
                )
            end = int(edges[-1])
            yield from self._cut(first, edges, limit)

    def read(self, block: DocumentBlock) -> NDArray[Any]:
        """Reads the tokens of a block."""
        itemsize = self.dtype.itemsize
        return self._read(block.start * itemsize, block.size // itemsize)

    def _read(self, offset: int, count: int) -> NDArray[Any]:
        self._file.seek(offset)
        ids: NDArray[Any] = np.fromfile(self._file, self.dtype, count)
        if len(ids) < count:
            raise UserError(f"{bin_path(self.prefix)}: was cut off while it was read; try again")
        return ids

    def document(self, number: int) -> NDArray[Any]:
        """Reads the tokens of one document, which is numbered from 0."""
        return self._read(int(self.index.offsets[number]), int(self.index.lengths[number]))

    def copy(self, block: DocumentBlock, writer: PairWriter) -> None:
        """Appends a block to a dataset of the same dtype, without passing it through Python."""
        writer.copy_tokens(self._file, block.start * self.dtype.itemsize, block.size)
        writer.add_documents(block.tokens)

    def _cut(self, first: int, edges: NDArray[np.int64], limit: int) -> Iterator[DocumentBlock]:
        start = 0
        while start < len(edges) - 1:
            end = edges[start] + limit
            stop = max(start + 1, int(np.searchsorted(edges, end, side="right")) - 1)
            yield DocumentBlock(
                first=first + start,
                tokens=np.diff(edges[start : stop + 1]),
                start=int(edges[start]),
                size=int(edges[stop] - edges[start]) * self.dtype.itemsize,
            )
            start = stop


def write_selected(
    ids: NDArray[Any], block: DocumentBlock, keep: NDArray[np.bool_], writer: PairWriter
) -> None:
    """Appends those of a block's documents for which `keep`, bool [documents], is true."""
    writer.write_tokens(ids if keep.all() else ids[np.repeat(keep, block.tokens)])
    writer.add_documents(block.tokens[keep])
