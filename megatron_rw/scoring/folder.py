"""The folder that scores are written to: what is scored survives anything, names mean complete.

While a run is on, or after it was killed, `progress.json` says what is scored, with what, and how
many documents of each dataset are on the disk; the arrays end in `.partial`. When all are there the
arrays get their names, `scores.json` is written, and `progress.json` goes.
"""

import itertools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_rw.data.indexed.documents import DocumentBlock
from megatron_rw.data.indexed.scores import PROGRESS, SCORES, read_record, score_path
from megatron_rw.errors import UserError
from megatron_rw.platform.files import write_json

# By name in the file name: the type, and whether it has an entry per token or per document.
ARRAYS = {
    "token_losses": (np.dtype("<f4"), "tokens"),
    "document_losses": (np.dtype("<f4"), "documents"),
    "document_tokens": (np.dtype("<i4"), "documents"),
}


class ScoreFolder:
    """The folder of `--score-dir`, which need not exist, for scores with this record of `plan`."""

    def __init__(self, path: Path, record: Mapping[str, Any]) -> None:
        self.path, self.record = path, record

    def array(self, dataset: str, kind: str) -> Path:
        """Returns where an array of `ARRAYS` is now: under its name, or partial."""
        partial = self._partial(dataset, kind)
        return partial if partial.exists() else partial.with_suffix("")

    def _partial(self, dataset: str, kind: str) -> Path:
        final = score_path(self.path, dataset, kind)
        return final.with_suffix(final.suffix + ".partial")

    def begin(self) -> dict[str, int] | None:
        """Prepares the folder, or finds how far an earlier run came. On one rank.

        Returns how many documents of each dataset are scored; None when all are, and the arrays
        have their names. Raises a `UserError` if the folder is of another run, or lacks what
        it should have.
        """
        datasets = self.record["datasets"]
        finished = read_record(self.path / SCORES)
        if finished is not None:
            self._compare(finished, SCORES)
            # The run may have been killed after it wrote the one and before it deleted the other.
            (self.path / PROGRESS).unlink(missing_ok=True)
            return None
        begun = read_record(self.path / PROGRESS)
        if begun is not None:
            if "scored" not in begun:
                raise UserError(
                    f"{self.path / PROGRESS} is of another version; delete the folder to begin anew"
                )
            self._compare(begun["job"], PROGRESS)
            for path in itertools.starmap(self.array, itertools.product(datasets, ARRAYS)):
                if not path.exists():
                    raise UserError(
                        f"{path} is missing, which {PROGRESS} tells of; delete the folder to "
                        "begin anew"
                    )
            return dict(begun["scored"])
        self.path.mkdir(parents=True, exist_ok=True)
        for dataset, counts in datasets.items():
            for kind, (dtype, unit) in ARRAYS.items():
                path = self._partial(dataset, kind)
                np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=(counts[unit],))
        scored = dict.fromkeys(datasets, 0)
        self._note(scored)
        return scored

    def write(
        self,
        dataset: str,
        block: DocumentBlock,
        losses: NDArray[np.float32],
        scored: Mapping[str, int],
    ) -> None:
        """Writes a block's losses and the means of its documents, onto the disk.

        `losses` are those of the block's tokens, [tokens]; the first of each document means nothing
        and is overwritten. `scored` has how many documents of each dataset are scored, those of the
        block included. A full disk, or one that cannot be written to, is a `UserError`.
        """
        means, tokens = document_means(block.tokens, losses)
        starts = np.cumsum(block.tokens) - block.tokens
        losses[starts[block.tokens > 0]] = np.nan
        at = {"tokens": block.start, "documents": block.first}
        try:
            for (kind, (dtype, unit)), values in zip(
                ARRAYS.items(), (losses, means, tokens), strict=True
            ):
                path = self._partial(dataset, kind)
                header = int(np.load(path, mmap_mode="r").offset)
                # No memory map is written to: a full disk would be a signal and not an error.
                with path.open("r+b") as file:
                    file.seek(header + at[unit] * dtype.itemsize)
                    file.write(np.ascontiguousarray(values, dtype).tobytes())
                    file.flush()
                    os.fsync(file.fileno())
            self._note(scored)
        except OSError as error:
            raise UserError(
                f"--score-dir {self.path}: cannot be written to ({error.strerror}); mend that and "
                "start again with the same flags, what is there is kept",
                known_to_all=False,
            ) from error

    def _note(self, scored: Mapping[str, int]) -> None:
        write_json(self.path / PROGRESS, {"job": self.record, "scored": scored})

    def finish(self, found: Mapping[str, Any]) -> None:
        """Gives the arrays their names, and writes `scores.json` with what else was found."""
        for dataset, kind in itertools.product(self.record["datasets"], ARRAYS):
            self.array(dataset, kind).replace(self._partial(dataset, kind).with_suffix(""))
        write_json(self.path / SCORES, {**self.record, **found})
        # With what runs have left that died while writing it.
        for path in self.path.glob(f"{PROGRESS}*"):
            path.unlink()

    def scores(self) -> dict[str, Any]:
        """Returns the `scores.json` that `finish` has written."""
        return dict(read_record(self.path / SCORES) or {})

    def _compare(self, other: Mapping[str, Any], name: str) -> None:
        # Earlier folders do not tell their tokenizer.
        other = {"tokenizer": self.record.get("tokenizer"), **other}
        mine, theirs = _flat(self.record), _flat({key: other.get(key) for key in self.record})
        differing = sorted(k for k in mine.keys() | theirs.keys() if mine.get(k) != theirs.get(k))
        if differing:
            listed = "; ".join(
                f"{key} {theirs.get(key)} there, {mine.get(key)} here" for key in differing[:4]
            )
            raise UserError(
                f"--score-dir {self.path}: its {name} is of another job: {listed}. Give another "
                "folder, or delete this one"
            )


def document_means(
    lengths: NDArray[np.int64], losses: NDArray[np.float32]
) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """Returns the mean loss of each document, summed in fp64, and over how many tokens it is.

    The first token of a document does not count. Where there are no others the mean is NaN.
    """
    tokens, there = np.maximum(lengths - 1, 0), lengths > 0
    starts = (np.cumsum(lengths) - lengths)[there]
    values = losses.astype(np.float64)
    values[starts] = 0.0
    sums = np.zeros(len(tokens))
    if there.any():
        # Over the documents that have tokens: of an empty stretch reduceat gives the next value.
        sums[there] = np.add.reduceat(values, starts)
    means = np.full(len(tokens), np.nan)
    np.divide(sums, tokens, out=means, where=tokens > 0)
    return means.astype(np.float32), tokens.astype(np.int32)


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """The leaves of nested objects, by their names joined with dots."""
    if not isinstance(value, Mapping):
        return {name: value}
    leaves: dict[str, Any] = {}
    for key, item in value.items():
        leaves |= _flat(item, f"{name}.{key}" if name else str(key))
    return leaves
