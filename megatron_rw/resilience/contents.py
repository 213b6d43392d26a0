"""What is in a distributed checkpoint, read without processes of torch, and nothing of it run.

The index names every tensor and object, with the file and the bytes that hold it; arguments, LR
schedule and our state are in one object, `common_state`.
"""

from __future__ import annotations

import hashlib
import io
import json
from argparse import Namespace
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from megatron_rw.resilience.safe_pickle import UnsafeCheckpointError, read_index

# Megatron's --verify-integrity writes it: SHA-256 of every file.
MANIFEST = "integrity.json"
_COMMON = "common_state"
_BLOCK = 1 << 22


@dataclass(frozen=True)
class StoredTensor:
    """One tensor, whole.

    Attributes:
        name: the same in every parallel layout.
        shape: of the whole.
        dtype: as torch prints it, without its prefix.
        chunks: in how many parts it was written.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    chunks: int

    @property
    def elements(self) -> int:
        """Of the whole."""
        return torch.Size(self.shape).numel()


class Contents:
    """A checkpoint's index and its common part.

    Args:
        path: `iter_…`.

    Raises:
        UnsafeCheckpointError: the index is damaged, or would run code.
        OSError: it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.index: Metadata = read_index(path)

    def tensors(self) -> list[StoredTensor]:
        """By name."""
        return [
            StoredTensor(
                name,
                tuple(entry.size),
                str(entry.properties.dtype).removeprefix("torch."),
                len(entry.chunks),
            )
            for name, entry in sorted(self.index.state_dict_metadata.items())
            if isinstance(entry, TensorStorageMetadata)
        ]

    def objects(self) -> list[str]:
        """Names of what is no tensor."""
        return sorted(
            name
            for name, entry in self.index.state_dict_metadata.items()
            if isinstance(entry, BytesStorageMetadata)
        )

    def files(self) -> dict[str, int]:
        """Shards, and the bytes of each."""
        names = {info.relative_path for info in self.index.storage_data.values()}
        return {name: (self.path / name).stat().st_size for name in sorted(names)}

    def common(self) -> dict[str, Any]:
        """Iteration, arguments, LR schedule and what else every rank has alike.

        Raises:
            UnsafeCheckpointError: it would run code.
        """
        # Registers the classes of Megatron's arguments as harmless.
        import megatron.core  # noqa: F401

        for name in self.objects():
            if name.split("/")[0] == _COMMON:
                found: dict[str, Any] = self._object(name)[0]
                return found
        raise UnsafeCheckpointError(f"{self.path} has no {_COMMON}: it is of another format.")

    def _object(self, name: str) -> Any:
        info = self.index.storage_data[MetadataIndex(name)]
        with (self.path / info.relative_path).open("rb") as stream:
            stream.seek(info.offset)
            stored = io.BytesIO(stream.read(info.length))
        try:
            return torch.load(stored, map_location="cpu", weights_only=True)
        except Exception as error:
            # torch has no common class for what it refuses and what it cannot read.
            raise UnsafeCheckpointError(f"{self.path}: {name} cannot be read: {error}") from error


def arguments(common: dict[str, Any]) -> dict[str, Any]:
    """Of the run that saved it, by name."""
    saved = common.get("args")
    return dict(sorted(vars(saved).items())) if isinstance(saved, Namespace) else {}


def verify(path: Path, workers: int = 8) -> Iterator[tuple[str, str | None]]:
    """Compare every file with the checksum that was written with it.

    Args:
        path: of the checkpoint.
        workers: files read at a time.

    Yields:
        A file, and what is wrong with it, or None.

    Raises:
        FileNotFoundError: it was saved without --verify-integrity.
    """
    manifest = json.loads((path / MANIFEST).read_text())["files"]

    def check(name: str) -> str | None:
        file = path / name
        if not file.is_file():
            return "is missing"
        digest = hashlib.sha256()
        with file.open("rb") as stream:
            while block := stream.read(_BLOCK):
                digest.update(block)
        return None if digest.hexdigest() == manifest[name] else "is not what was written"

    with ThreadPoolExecutor(workers) as pool:
        yield from zip(manifest, pool.map(check, manifest), strict=True)
