"""Checkpoints and indexes of data are read without running what they say.

Megatron's distributed checkpoints are files of torch.distributed.checkpoint: an index, `.metadata`,
that torch unpickles without restrictions, and objects among the tensors that it loads with
`weights_only=False`. Both would run code that somebody put into a checkpoint.
"""

from __future__ import annotations

import os
import pickle
import types
from pathlib import Path
from typing import IO, Any

import torch
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.metadata import Metadata

from megatron_rw.errors import UserError

# torch.load obeys it, even where it is called with weights_only=False.
WEIGHTS_ONLY_VARIABLE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"

_ALLOWED = {
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        *("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties"),
        *("TensorStorageMetadata", "ChunkStorageMetadata", "BytesStorageMetadata"),
        *("_MEM_FORMAT_ENCODING", "ShardedTensorMetadata"),
    },
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath", "PurePosixPath"},
    "pathlib._local": {"PosixPath", "PurePosixPath"},
}


class UnsafeCheckpointError(UserError):
    """A file wants more than data to be made of it."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _ALLOWED.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise UnsafeCheckpointError(
            f"it names {module}.{name}, which no index of a checkpoint needs: it may have been "
            "tampered with. Nothing of it was run"
        )


def load_index(stream: IO[bytes]) -> Metadata:
    """The index of a checkpoint, out of `.metadata`.

    Raises:
        UnsafeCheckpointError: it is no plain index.
    """
    name = getattr(stream, "name", "the index of the checkpoint")
    try:
        index = _Unpickler(stream).load()
    except UnsafeCheckpointError as error:
        raise UnsafeCheckpointError(f"{name}: {error}.") from None
    except Exception as error:
        # What a truncated or foreign file does to an unpickler has no common class.
        raise UnsafeCheckpointError(f"{name} is damaged: {error}.") from error
    if not isinstance(index, Metadata):
        raise UnsafeCheckpointError(f"{name} holds a {type(index).__name__}, no index.")
    return index


def read_index(checkpoint: Path) -> Metadata:
    """The index of the checkpoint in a folder.

    Raises:
        UnsafeCheckpointError: it is no plain index.
        OSError: it cannot be read.
    """
    with (checkpoint / ".metadata").open("rb") as stream:
        return load_index(stream)


def install() -> None:
    """Have torch read checkpoints so, in this process and those that it starts."""
    os.environ.setdefault(WEIGHTS_ONLY_VARIABLE, "1")
    # The module's own name for pickle, of which it uses these two.
    restricted = types.SimpleNamespace(load=load_index, dump=pickle.dump)
    filesystem.pickle = restricted  # type: ignore[attr-defined, assignment]
