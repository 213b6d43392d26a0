"""Reads checkpoints without running code that they may contain.

Megatron's distributed checkpoints are files of torch.distributed.checkpoint: an index, `.metadata`,
that torch unpickles without restrictions, and objects among the tensors that it loads with
`weights_only=False`. Both would run code that somebody put into a checkpoint.
"""

import os
import pickle
from pathlib import Path
from typing import IO, Any

import torch
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.metadata import Metadata

from megatron_rw.errors import UserError
from megatron_rw.patching import Patch, StandIn

# torch.load obeys this variable even where it is called with weights_only=False.
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
    """A file of a checkpoint is damaged, or would run code."""


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
    """Reads a checkpoint's index, `.metadata`; UnsafeCheckpointError if it is anything else."""
    name = getattr(stream, "name", "the index of the checkpoint")
    try:
        index = _Unpickler(stream).load()
    except UnsafeCheckpointError as error:
        raise UnsafeCheckpointError(f"{name}: {error}.") from None
    except Exception as error:
        # The errors of an unpickler on a truncated or foreign file have no class in common.
        raise UnsafeCheckpointError(f"{name} is damaged: {error}.") from error
    if not isinstance(index, Metadata):
        raise UnsafeCheckpointError(f"{name} holds a {type(index).__name__}, no index.")
    return index


def read_index(checkpoint: Path) -> Metadata:
    """Reads the index of the checkpoint in a folder."""
    with (checkpoint / ".metadata").open("rb") as stream:
        return load_index(stream)


def patches() -> list[Patch]:
    """Returns what makes torch read a checkpoint's index without running code in it."""
    why = "torch unpickles `.metadata` without restrictions, so that it runs what is in it."
    return [Patch(filesystem, "pickle", StandIn(pickle, load=load_index), why, "torch 2.11")]


def load_weights_only() -> None:
    """Makes `torch.load` refuse code, in this process and those that it starts."""
    os.environ.setdefault(WEIGHTS_ONLY_VARIABLE, "1")
