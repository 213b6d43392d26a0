"""Megatron's `.bin/.idx` pairs, read by memory map and written a piece at a time.

A dataset's `prefix` is everywhere its path without `.bin` and `.idx`.

The layout of an index, as megatron.core writes it: 9 bytes `MMIDIDX`, version (8), dtype (1),
numbers of sequences and of document bounds (8 each), then per sequence its length (4) and its
offset in the `.bin` (8), then the document bounds (8 each): bound k is the first sequence of
document k, and the last one the number of sequences.

Core's `IndexedDatasetBuilder` keeps Python lists with an entry per sequence until the end. The
writer here writes the same bytes, and its memory does not grow with the number of documents.
"""

import os
import struct
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

from megatron_rw.data.indexed.domains import DomainRecord
from megatron_rw.errors import UserError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
# Core's `DType`, repeated here so that reading an index does not import torch.
CODES: dict[int, type[Any]] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    6: np.float64,
    7: np.float32,
    8: np.uint16,
}
REMEDY = "copy both files again, or make them again with tools/preprocess_data.py"
_BLOCK = 1 << 16


def bin_path(prefix: str | os.PathLike[str]) -> Path:
    """Returns the path of the tokens."""
    return Path(f"{os.fspath(prefix)}.bin")


def idx_path(prefix: str | os.PathLike[str]) -> Path:
    """Returns the path of the index."""
    return Path(f"{os.fspath(prefix)}.idx")


def is_dataset(path: Path) -> bool:
    """Whether a path is a dataset's. Megatron may keep its cache in a directory of that name."""
    return idx_path(path).is_file() or not path.is_dir()


@dataclass(frozen=True)
class Index:
    """The index of a dataset, memory-mapped."""

    dtype: np.dtype[Any]  # Type of a token id.
    lengths: NDArray[np.int32]  # int32 [sequences], tokens of each sequence.
    offsets: NDArray[np.int64]  # int64 [sequences], where each begins in the `.bin`, in bytes.
    # int64 [documents + 1], the first sequence of each document, and their number.
    bounds: NDArray[np.int64]
    multimodal: bool  # Whether a byte per sequence follows, which says the kind of the sequence.

    @classmethod
    def open(cls, prefix: str | os.PathLike[str]) -> Self:
        """Maps the index of a dataset; a `UserError` if it is missing, no index, or not whole."""
        path = idx_path(prefix)
        if not path.is_file():
            raise UserError(f"{path}: no such file; give a dataset's path without .bin and .idx")
        with path.open("rb") as file:
            header = file.read(HEADER.size)
            size = os.fstat(file.fileno()).st_size
        where = f"data path {prefix}: {path}"
        if len(header) < HEADER.size or not header.startswith(MAGIC):
            raise UserError(f"{where} is no index of a dataset; {REMEDY}")
        _, version, code, sequences, bounds = HEADER.unpack(header)
        if version != VERSION or code not in CODES:
            raise UserError(
                f"{where} has version {version} and type {code}, which are unknown; {REMEDY}"
            )
        offsets_at = HEADER.size + 4 * sequences
        bounds_at = offsets_at + 8 * sequences
        end = bounds_at + 8 * bounds
        if size not in (end, end + sequences):
            raise UserError(
                f"{where} has {size:,} bytes, and its header tells of {end:,}; {REMEDY}"
            )
        return cls(
            np.dtype(CODES[code]),
            _mapped(path, np.int32, HEADER.size, sequences),
            _mapped(path, np.int64, offsets_at, sequences),
            _mapped(path, np.int64, bounds_at, bounds),
            multimodal=size > end,
        )


def _mapped(path: Path, dtype: type[Any], offset: int, count: int) -> NDArray[Any]:
    if count == 0:
        return np.empty(0, dtype)
    return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=(count,))


class PairWriter:
    """Writes a `.bin/.idx` pair a piece at a time; a context manager.

    The files have their final names from the start but are complete only after `finalize`, so they
    should be written into a scratch directory and moved. Leaving the context without `finalize`
    removes them. `largest_id` is the largest token id of `write_tokens`; who copies tokens sets it.
    """

    def __init__(self, prefix: str | os.PathLike[str], dtype: np.dtype[Any] | type[Any]) -> None:
        self._prefix = prefix
        self._dtype = np.dtype(dtype)
        self._open = stack = ExitStack()
        self._bin = stack.enter_context(bin_path(prefix).open("wb"))
        # A table of the index, whose place is known only in the end.
        folder = bin_path(prefix).parent
        self._lengths = stack.enter_context(TemporaryFile(dir=folder))  # noqa: SIM115
        self._finalized = False
        self.documents = self.tokens = self.largest_id = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """Closes the files, and removes them unless they are complete."""
        self._open.close()
        if not self._finalized:
            for path in (bin_path(self._prefix), idx_path(self._prefix)):
                path.unlink(missing_ok=True)

    def write_tokens(self, ids: NDArray[Any]) -> None:
        """Appends token ids, of the dataset's own type, to the `.bin`."""
        if ids.dtype != self._dtype:  # a cast would wrap around silently
            raise TypeError(f"token ids are {ids.dtype}, and the dataset's {self._dtype}")
        self._bin.write(ids.tobytes())
        self.largest_id = max(self.largest_id, int(ids.max(initial=0)))

    def copy_tokens(self, source: BinaryIO, offset: int, size: int) -> None:
        """Appends `size` bytes of a file of the same dtype, from `offset`, to the `.bin`.

        Raises a `UserError` if the file ends before.
        """
        self._bin.flush()
        copy_bytes(source, offset, size, self._bin)

    def add_documents(self, lengths: NDArray[Any]) -> None:
        """Appends documents, whose tokens are or will be in the `.bin`, to the index.

        `lengths` [documents] are the tokens of each, which is one sequence.
        """
        lengths = np.asarray(lengths, np.int32)
        self._lengths.write(lengths.tobytes())
        self.documents += len(lengths)
        self.tokens += int(lengths.sum(dtype=np.int64))

    def finalize(self) -> DomainRecord:
        """Writes the index, puts both files onto the disk, and returns the dataset's record.

        Raises a `RuntimeError` if the tokens written are not those of the documents added.
        """
        self._bin.flush()
        written = os.fstat(self._bin.fileno()).st_size
        if written != self.tokens * self._dtype.itemsize:
            raise RuntimeError(
                f"{bin_path(self._prefix)} has {written} bytes, and its documents "
                f"{self.tokens} tokens"
            )
        os.fsync(self._bin.fileno())
        code = next(code for code, dtype in CODES.items() if dtype is self._dtype.type)
        with idx_path(self._prefix).open("wb") as index:
            index.write(HEADER.pack(MAGIC, VERSION, code, self.documents, self.documents + 1))
            index.flush()
            self._lengths.flush()
            copy_bytes(self._lengths, 0, 4 * self.documents, index)
            self._write_offsets(index)
            for first in range(0, self.documents + 1, _BLOCK):
                bounds = np.arange(first, min(first + _BLOCK, self.documents + 1), dtype=np.int64)
                index.write(bounds.tobytes())
            index.flush()
            os.fsync(index.fileno())
        self._finalized = True
        name = os.path.basename(self._prefix)
        return DomainRecord(name, self.documents, self.tokens, self.largest_id)

    def _write_offsets(self, index: BinaryIO) -> None:
        self._lengths.seek(0)
        end = 0
        while block := self._lengths.read(4 * _BLOCK):
            sizes = np.frombuffer(block, np.int32).astype(np.int64) * self._dtype.itemsize
            ends = end + np.cumsum(sizes)
            index.write((ends - sizes).tobytes())
            end = int(ends[-1])


def copy_bytes(source: BinaryIO, offset: int, size: int, target: BinaryIO) -> None:
    """Appends a piece of one file to another inside the kernel; the target must be flushed.

    Raises a `UserError` if the source ends before.
    """
    while size:
        copied = os.sendfile(target.fileno(), source.fileno(), offset, size)
        if copied == 0:
            raise UserError(f"{source.name}: ends {size:,} bytes too early; copy the file again")
        offset += copied
        size -= copied
    target.seek(0, os.SEEK_END)
