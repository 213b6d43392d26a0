"""Reads a distributed checkpoint without torch.distributed, and without running what it holds.

The index names every tensor and object, with the file and the bytes that hold it. Arguments, LR
schedule and the reweighting's state are in one object, `common_state`.
"""

from __future__ import annotations

import io
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

from megatron_rw.resilience.safe_pickle import UnsafeCheckpointError, read_index

_COMMON = "common_state"


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

    def common(self) -> dict[str, Any]:
        """Returns iteration, arguments, LR schedule and what else is the same on every rank.

        Raises:
            UnsafeCheckpointError: If it would run code.
        """
        # Registers the classes of Megatron's arguments as harmless.
        import megatron.core  # noqa: F401

        for name in self.index.state_dict_metadata:
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
