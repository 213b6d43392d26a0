"""A folder of Megatron's checkpoints as files: which are complete, and which a run goes on from.

`iter_0001000/` holds a distributed checkpoint. Megatron writes its shards, then their index
(`.metadata`, renamed into place), then `metadata.json`, and last names the iteration in the
folder's tracker. A run that is killed in between leaves a checkpoint without the last of these, or
an empty tracker, since Megatron does not rename that into place.
"""

import io
import json
import os
import re
import shutil
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import MetadataIndex

from megatron_rw.platform.files import write_complete
from megatron_rw.resilience.safe_pickle import UnsafeCheckpointError, read_index

_COMMON = "common_state"
TRACKER = "latest_checkpointed_iteration.txt"
DECLARATION = "metadata.json"
# Before the names of the parameters in a snapshot, which a run with the signal `progress` keeps.
SNAPSHOT_PREFIX = "reweight_snapshot."
# A checkpoint that is to be deleted gets this prefix first, so that none is there in part.
_DOOMED = "deleted-"


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint: its folder, and how many iterations the run had completed."""

    path: Path
    iteration: int

    @property
    def is_distributed(self) -> bool:
        """False for Megatron's older format, which has a file for each rank and no index."""
        return not any(self.path.glob("mp_rank_*"))

    def common(self) -> dict[str, Any]:
        """Returns iteration, arguments, LR schedule and what else is the same on every rank.

        Nothing that it holds is run, and torch.distributed is not needed. A checkpoint that is
        damaged, or would run code, is an `UnsafeCheckpointError`.
        """
        index = read_index(self.path)
        # Registers the classes of Megatron's arguments as harmless.
        import megatron.core  # noqa: F401

        names = (n for n in index.state_dict_metadata if n.split("/")[0] == _COMMON)
        name = next(names, None)
        if name is None:
            raise UnsafeCheckpointError(f"{self.path} has no {_COMMON}: it is of another format.")
        info = index.storage_data[MetadataIndex(name)]
        with (self.path / info.relative_path).open("rb") as stream:
            stream.seek(info.offset)
            stored = io.BytesIO(stream.read(info.length))
        try:
            found: dict[str, Any] = torch.load(stored, map_location="cpu", weights_only=True)[0]
        except Exception as error:
            # torch has no common class for what it refuses and what it cannot read.
            raise UnsafeCheckpointError(f"{self.path}: {name} cannot be read: {error}") from error
        return found

    def defect(self) -> str | None:
        """Returns what the checkpoint lacks, or None if it is complete. Reads no shards."""
        if not self.is_distributed:
            return None
        try:
            declared = json.loads((self.path / DECLARATION).read_text())
        except FileNotFoundError:
            return f"it has no {DECLARATION}: its writing was not finished"
        except ValueError:
            return f"its {DECLARATION} is damaged: its writing was not finished"
        if not isinstance(declared, dict) or "sharded_backend" not in declared:
            return f"its {DECLARATION} is not one of a checkpoint"
        try:
            index = read_index(self.path)
        except (OSError, UnsafeCheckpointError) as error:
            return f"its index cannot be read: {str(error).rstrip('.')}"
        needed: dict[str, int] = {}
        for info in index.storage_data.values():
            end = info.offset + info.length
            needed[info.relative_path] = max(needed.get(info.relative_path, 0), end)
        for name, size in needed.items():
            shard = self.path / name
            if not shard.is_file():
                return f"{name} is missing"
            if (found := shard.stat().st_size) < size:
                return f"{name} has {found} bytes of {size}"
        return None


def saved_arguments(common: dict[str, Any]) -> dict[str, Any]:
    """Returns the arguments of the run that saved a checkpoint, by name."""
    saved = common.get("args")
    return dict(sorted(vars(saved).items())) if isinstance(saved, Namespace) else {}


class CheckpointFolder:
    """A folder that `--save` or `--load` names, which need not exist."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    @classmethod
    def meant(cls, path: str) -> Checkpoint | None:
        """Returns a checkpoint by its own path, or the one that its folder's tracker names."""
        folder = cls(path)
        if match := re.fullmatch(r"iter_(\d{7,})", folder.path.name):
            return cls(folder.path.parent).of(int(match[1]))
        tracked = folder.tracked()
        return None if tracked is None else folder.of(tracked)

    def checkpoints(self) -> list[Checkpoint]:
        """Returns all checkpoints, complete or not, by iteration."""
        found = [
            Checkpoint(path, int(match[1]))
            for path in self.path.glob("iter_*")
            if (match := re.fullmatch(r"iter_(\d{7,})", path.name)) and path.is_dir()
        ]
        return sorted(found, key=lambda checkpoint: checkpoint.iteration)

    def of(self, iteration: int) -> Checkpoint | None:
        """Returns the checkpoint of an iteration, complete or not."""
        return next((c for c in self.checkpoints() if c.iteration == iteration), None)

    def newest_complete(self) -> Checkpoint | None:
        """Returns the complete checkpoint with the most iterations."""
        return next((c for c in reversed(self.checkpoints()) if c.defect() is None), None)

    def tracked(self) -> int | None:
        """Returns the iteration that the tracker names; None if it names none, or is missing."""
        try:
            text = (self.path / TRACKER).read_text().strip()
        except FileNotFoundError:
            return None
        return int(text) if text.isdigit() else None

    def is_release(self) -> bool:
        """Returns whether the tracker names a release, a checkpoint without an iteration."""
        tracker = self.path / TRACKER
        return tracker.is_file() and tracker.read_text().strip() == "release"

    def write_tracker(self, iteration: int) -> None:
        """Names an iteration in the tracker, in one step that happens completely or not at all."""
        write_complete(self.path / TRACKER, str(iteration))

    def undeclare(self, iteration: int) -> bool:
        """Marks a checkpoint as incomplete before it is written over; returns if it was not."""
        declaration = self.path / f"iter_{iteration:07d}" / DECLARATION
        existed = declaration.exists()
        declaration.unlink(missing_ok=True)
        return existed

    def delete(self, checkpoint: Checkpoint) -> None:
        """Deletes a checkpoint, which is renamed first so that it is never there in part."""
        doomed = checkpoint.path.with_name(_DOOMED + checkpoint.path.name)
        shutil.rmtree(doomed, ignore_errors=True)
        checkpoint.path.rename(doomed)
        shutil.rmtree(doomed)

    def sweep(self) -> None:
        """Deletes what a process that was killed during `delete` has left."""
        for entry in self.path.glob(f"{_DOOMED}iter_*"):
            shutil.rmtree(entry, ignore_errors=True)


def superfluous(iterations: list[int], keep_last: int | None, keep_every: int | None) -> list[int]:
    """Returns which of the complete checkpoints' iterations, ascending, need not be kept."""
    if keep_last is None:
        return []
    old = iterations[:-keep_last]
    return [i for i in old if keep_every is None or i % keep_every]


def nearest_existing(path: str) -> Path:
    """Returns the path itself if it exists, otherwise the nearest folder above it that does."""
    absolute = Path(path).absolute()
    return next(p for p in (absolute, *absolute.parents) if p.exists())
