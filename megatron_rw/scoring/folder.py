"""The folder that scores are written to: finished blocks survive anything, names mean complete.

While a run is on, or after it was killed, `progress.json` says what is scored, with what, and how
many blocks of each dataset are on the disk; the arrays end in `.partial`. When all blocks are
there the arrays get their names, `scores.json` is written, and `progress.json` goes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

from megatron_rw.errors import UserError
from megatron_rw.platform.files import write_complete
from megatron_rw.scoring.plan import Block

PROGRESS, SCORES = "progress.json", "scores.json"
# By name in the file name: the type, and whether it has an entry per token or per document.
ARRAYS = {
    "token_losses": (np.dtype("<f4"), "tokens"),
    "document_losses": (np.dtype("<f4"), "documents"),
    "document_tokens": (np.dtype("<i4"), "documents"),
}

Job = Mapping[str, Any]


class ScoreFolder:
    """The folder of `--score-dir`.

    Args:
        path: need not exist.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def array(self, dataset: str, kind: str) -> Path:
        """Where a complete array is, of a key of `ARRAYS`."""
        return self.path / f"{dataset}.{kind}.npy"

    def partial(self, dataset: str, kind: str) -> Path:
        """Where it is until then."""
        return self.path / f"{dataset}.{kind}.npy.partial"

    def begin(self, job: Job) -> dict[str, int] | None:
        """Prepare the folder for a job, or find how far the same job came. On one rank.

        Args:
            job: what decides the scores, as JSON has it; `datasets` gives `tokens` and
                `documents` of each.

        Returns:
            How many blocks of each dataset are there; None when the job is complete.

        Raises:
            UserError: the folder belongs to another job, or lacks what it should have.
            OSError: it cannot be written to.
        """
        finished = self._read(SCORES)
        if finished is not None:
            self._compare(job, finished, SCORES)
            # Killed between the two.
            (self.path / PROGRESS).unlink(missing_ok=True)
            return None
        begun = self._read(PROGRESS)
        if begun is not None:
            self._compare(job, begun["job"], PROGRESS)
            for dataset in job["datasets"]:
                for kind in ARRAYS:
                    if not (
                        self.partial(dataset, kind).exists() or self.array(dataset, kind).exists()
                    ):
                        raise UserError(
                            f"{self.partial(dataset, kind)} is missing, which {PROGRESS} tells "
                            "of; delete the folder to begin anew"
                        )
            return dict(begun["blocks"])
        self.path.mkdir(parents=True, exist_ok=True)
        for dataset, counts in job["datasets"].items():
            for kind, (dtype, unit) in ARRAYS.items():
                np.lib.format.open_memmap(
                    self.partial(dataset, kind), mode="w+", dtype=dtype, shape=(counts[unit],)
                )
        blocks = dict.fromkeys(job["datasets"], 0)
        self.record(job, blocks)
        return blocks

    def record(self, job: Job, blocks: Mapping[str, int]) -> None:
        """Note how many blocks of each dataset are on the disk."""
        write_complete(self.path / PROGRESS, _text({"job": job, "blocks": blocks}))

    def finish(self, job: Job, found: Mapping[str, Any]) -> None:
        """Give the arrays their names, and write `scores.json`.

        Args:
            job: as of `begin`.
            found: what else belongs into it.
        """
        for dataset in job["datasets"]:
            for kind in ARRAYS:
                if self.partial(dataset, kind).exists():
                    self.partial(dataset, kind).replace(self.array(dataset, kind))
        write_complete(self.path / SCORES, _text({**job, **found}))
        # With what runs have left that died while writing it.
        for path in self.path.glob(f"{PROGRESS}*"):
            path.unlink()

    def summary(self) -> dict[str, Any]:
        """What `finish` has written."""
        return dict(self._read(SCORES) or {})

    def _read(self, name: str) -> dict[str, Any] | None:
        path = self.path / name
        try:
            content = json.loads(path.read_text("utf-8"))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise UserError(
                f"{path}: not JSON ({error}); delete the folder to begin anew"
            ) from error
        if not isinstance(content, dict):
            raise UserError(f"{path}: not an object; delete the folder to begin anew")
        return content

    def _compare(self, job: Job, other: Mapping[str, Any], name: str) -> None:
        mine, theirs = _flat(job), _flat({key: other.get(key) for key in job})
        differing = sorted(k for k in mine.keys() | theirs.keys() if mine.get(k) != theirs.get(k))
        if differing:
            listed = "; ".join(
                f"{key} {theirs.get(key)} there, {mine.get(key)} here" for key in differing[:4]
            )
            raise UserError(
                f"--score-dir {self.path}: its {name} is of another job: {listed}. Give another "
                "folder, or delete this one"
            )


class BlockWriter:
    """Writes the blocks of one dataset into its partial arrays; a context manager.

    Plain writes and not a memory map: a full disk is then an error, not a signal.

    Args:
        folder: prepared by `ScoreFolder.begin`.
        dataset: its name there.
    """

    def __init__(self, folder: ScoreFolder, dataset: str) -> None:
        self._files: dict[str, tuple[BinaryIO, int]] = {}
        for kind in ARRAYS:
            path = folder.partial(dataset, kind)
            header = np.load(path, mmap_mode="r")
            self._files[kind] = (path.open("r+b"), int(header.offset))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Closes the files."""
        for file, _ in self._files.values():
            file.close()

    def write(self, block: Block, losses: NDArray[np.float32]) -> None:
        """Write a block's losses and the means of its documents, onto the disk.

        Args:
            block: of the dataset.
            losses: [tokens] of the block, the first of each document of no meaning; changed.
        """
        means, tokens = document_means(block, losses)
        losses[block.starts[block.lengths > 0]] = np.nan
        self._write("token_losses", block.start, losses)
        self._write("document_losses", block.first, means)
        self._write("document_tokens", block.first, tokens)
        for file, _ in self._files.values():
            file.flush()
            os.fsync(file.fileno())

    def _write(self, kind: str, at: int, values: NDArray[Any]) -> None:
        file, header = self._files[kind]
        dtype, _ = ARRAYS[kind]
        file.seek(header + at * dtype.itemsize)
        file.write(np.ascontiguousarray(values, dtype).tobytes())


def document_means(
    block: Block, losses: NDArray[np.float32]
) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """The mean loss of each document, summed in fp64, and the number of tokens that it is over.

    Args:
        block: its documents.
        losses: [tokens] of the block; the first of each document does not count.

    Returns:
        [documents] each; the mean is NaN where there are no tokens.
    """
    tokens = np.maximum(block.lengths - 1, 0)
    values = losses.astype(np.float64)
    there = block.lengths > 0
    values[block.starts[there]] = 0.0
    sums = np.zeros(len(tokens))
    if there.any():
        # Over the documents that have tokens: of an empty stretch reduceat gives the next value.
        sums[there] = np.add.reduceat(values, block.starts[there])
    means = np.full(len(tokens), np.nan)
    np.divide(sums, tokens, out=means, where=tokens > 0)
    return means.astype(np.float32), tokens.astype(np.int32)


def _text(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """The leaves of nested objects, by their names joined with dots."""
    if not isinstance(value, Mapping):
        return {name: value}
    leaves: dict[str, Any] = {}
    for key, item in value.items():
        leaves |= _flat(item, f"{name}.{key}" if name else str(key))
    return leaves
