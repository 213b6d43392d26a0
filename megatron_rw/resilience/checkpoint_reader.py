"""Reads a distributed checkpoint without torch.distributed, and without running what it holds.

The index names every tensor and object, with the file and the bytes that hold it. Arguments, LR
schedule and the reweighting's state are in one object, `common_state`.
"""

from __future__ import annotations

import io
from argparse import Namespace
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

_COMMON = "common_state"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a checkpoint.

    Attributes:
        name: The same in every parallel layout.
        shape: Shape of the whole tensor.
        dtype: As torch prints it, without its prefix.
        chunks: The number of parts in which it was written.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    chunks: int

    @property
    def elements(self) -> int:
        """Number of elements of the whole tensor."""
        return torch.Size(self.shape).numel()


class CheckpointReader:
    """Reads a checkpoint's index and its common part.

    Args:
        path: The folder of the checkpoint, `iter_…`.

    Raises:
        UnsafeCheckpointError: If the index is damaged, or would run code.
        OSError: If it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.index: Metadata = read_index(path)

    def tensors(self) -> list[StoredTensor]:
        """Returns the tensors, sorted by name."""
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
        """Returns the sorted names of the entries that are not tensors."""
        return sorted(
            name
            for name, entry in self.index.state_dict_metadata.items()
            if isinstance(entry, BytesStorageMetadata)
        )

    def files(self) -> dict[str, int]:
        """Returns the shards, and the size of each in bytes."""
        names = {info.relative_path for info in self.index.storage_data.values()}
        return {name: (self.path / name).stat().st_size for name in sorted(names)}

    def common(self) -> dict[str, Any]:
        """Returns iteration, arguments, LR schedule and what else is the same on every rank.

        Raises:
            UnsafeCheckpointError: If it would run code.
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


def saved_arguments(common: dict[str, Any]) -> dict[str, Any]:
    """Returns the arguments of the run that saved a checkpoint, by name."""
    saved = common.get("args")
    return dict(sorted(vars(saved).items())) if isinstance(saved, Namespace) else {}
