"""A folder of Megatron's checkpoints as files: which are complete, and which a run goes on from.

`iter_0001000/` holds a distributed checkpoint. Megatron writes its shards, then their index
(`.metadata`, renamed into place), then `metadata.json`, and last names the iteration in the
folder's tracker. A run that is killed in between leaves a checkpoint without the last of these, or
an empty tracker, since Megatron does not rename that into place.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_rw.platform.files import write_complete
from megatron_rw.resilience.safe_pickle import UnsafeCheckpointError, read_index

TRACKER = "latest_checkpointed_iteration.txt"
DECLARATION = "metadata.json"
RELEASE = "release"
# A checkpoint that is to be deleted gets this prefix first, so that none is there in part.
_DOOMED = "deleted-"


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint.

    Attributes:
        path: Its folder.
        iteration: Iterations that the run had completed.
    """

    path: Path
    iteration: int

    @property
    def is_distributed(self) -> bool:
        """False for Megatron's older format, which has a file for each rank and no index."""
        return not any(self.path.glob("mp_rank_*"))

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
            found = shard.stat().st_size if shard.is_file() else None
            if found is None:
                return f"{name} is missing"
            if found < size:
                return f"{name} has {found} bytes of {size}"
        return None


class CheckpointFolder:
    """A folder that `--save` or `--load` names, on a local or shared file system.

    Args:
        path: The folder, which need not exist.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def checkpoints(self) -> list[Checkpoint]:
        """Returns all checkpoints, complete or not, by iteration."""
        return sorted(self._found(), key=lambda checkpoint: checkpoint.iteration)

    def of(self, iteration: int) -> Checkpoint | None:
        """Returns the checkpoint of an iteration, complete or not."""
        found = (c for c in self.checkpoints() if c.iteration == iteration)
        return next(found, None)

    def _found(self) -> Iterator[Checkpoint]:
        if not self.path.is_dir():
            return
        for entry in self.path.iterdir():
            match = re.fullmatch(r"iter_(\d{7,})", entry.name)
            if match and entry.is_dir():
                yield Checkpoint(entry, int(match[1]))

    def newest_complete(self) -> Checkpoint | None:
        """Returns the complete checkpoint with the most iterations."""
        for checkpoint in reversed(self.checkpoints()):
            if checkpoint.defect() is None:
                return checkpoint
        return None

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
        return tracker.is_file() and tracker.read_text().strip() == RELEASE

    def write_tracker(self, iteration: int) -> None:
        """Names an iteration in the tracker, in one step that happens completely or not at all."""
        write_complete(self.path / TRACKER, str(iteration))

    def undeclare(self, iteration: int) -> bool:
        """Marks a checkpoint that is about to be written over as incomplete.

        Returns:
            Whether it was marked as complete before.
        """
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
        if self.path.is_dir():
            for entry in self.path.glob(f"{_DOOMED}iter_*"):
                shutil.rmtree(entry, ignore_errors=True)


def superfluous(iterations: list[int], keep_last: int | None, keep_every: int | None) -> list[int]:
    """Returns the checkpoints that need not be kept.

    Args:
        iterations: Those of the complete checkpoints, ascending.
        keep_last: How many of the newest to keep; None to keep all.
        keep_every: Keep those whose iteration is a multiple of this as well.
    """
    if keep_last is None:
        return []
    old = iterations[:-keep_last]
    return [i for i in old if keep_every is None or i % keep_every]


def nearest_existing(path: str) -> Path:
    """Returns the path itself if it exists, otherwise the nearest folder above it that does."""
    absolute = Path(path).absolute()
    return next(p for p in (absolute, *absolute.parents) if p.exists())
