"""Damages to data and checkpoints, by the title of the row in docs/refusals.md."""

from __future__ import annotations

import json
import math
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_rw.data.indexed.integrity import fingerprint
from tests.planted import Planted

EASY = "easy_text_document"


@dataclass(frozen=True)
class Place:
    """Where a case finds what it spoils, copies of its own."""

    data: Path  # A corpus, see `tests.corpus`.
    checkpoints: Path  # Iterations 2 and 4 of a run that goes on to iteration 4.
    empty: Path

    @property
    def newest(self) -> Path:
        return self.checkpoints / "iter_0000004"


Spoiler = Callable[[Place], object]


def cut(name: str, keep: float) -> Spoiler:
    """Keeps a part of a file of the data."""
    return lambda place: os.truncate(
        place.data / name, int((place.data / name).stat().st_size * keep)
    )


def write(name: str, content: bytes) -> Spoiler:
    """Puts other bytes into a file of the data."""
    return lambda place: (place.data / name).write_bytes(content)


def domains(documents: int = 200) -> Spoiler:
    """Writes a `domains.json` for the easy dataset, and a tokenizer's model that is another."""
    tokenizer = {"type": "NullTokenizer", "model": "other", "sha256": "0" * 64, "vocab_size": 61}
    easy = {"prefix": EASY, "documents": documents, "tokens": 1, "max_token_id": 60}
    content = {"version": 1, "tokenizer": tokenizer, "domains": {"plain": easy}}

    def spoil(place: Place) -> None:
        (place.data / "domains.json").write_text(json.dumps(content))
        (place.empty / "mine.model").write_bytes(b"mine")

    return spoil


def reverse_data(place: Place) -> None:
    """Makes the data other data of the same size."""
    path = place.data / f"{EASY}.bin"
    path.write_bytes(bytes(reversed(path.read_bytes())))


def without_metadata(*iterations: int) -> Spoiler:
    """Leaves checkpoints as they are before their writing is finished."""

    def spoil(place: Place) -> None:
        for iteration in iterations:
            (place.checkpoints / f"iter_{iteration:07d}" / "metadata.json").unlink()

    return spoil


def track(text: str) -> Spoiler:
    return lambda place: (place.checkpoints / "latest_checkpointed_iteration.txt").write_text(text)


def file_for_folder(place: Place) -> None:
    (place.empty / "file").touch()


def weights(*values: float) -> Spoiler:
    """Writes static weights of the easy dataset, 1 but for the first, for both ways to name it."""

    def spoil(place: Place) -> None:
        array = np.ones(200 if values else 199, np.float32)
        array[: len(values)] = values
        for name in ("weights", EASY):
            np.save(place.empty / f"{name}.npy", array)

    return spoil


def two_of_one_name(place: Place) -> None:
    weights(1)(place)
    for suffix in (".bin", ".idx"):
        shutil.copy(place.data / f"{EASY}{suffix}", place.empty)


def scores(tokens: int = 14303, **changes: object) -> Spoiler:
    """Writes a folder of stored losses of the easy dataset, the array of which is too short."""

    def spoil(place: Place) -> None:
        facts = {"fingerprint": fingerprint(str(place.data / EASY)), "tokens": tokens}
        record = {"datasets": {EASY: facts}} | changes
        (place.empty / "scores.json").write_text(json.dumps(record))
        np.save(place.empty / f"{EASY}.token_losses.npy", np.zeros(99, np.float32))

    return spoil


SPOILERS: dict[str, Spoiler] = {
    "tokens cut off": cut(f"{EASY}.bin", 0.5),
    "tokens of another index": lambda place: shutil.copy(
        place.data / f"{EASY}.bin", place.data / "noise_text_document.bin"
    ),
    "index cut off": cut(f"{EASY}.idx", 0.5),
    "index that is none": write(f"{EASY}.idx", b"PK" * 99),
    "empty index": cut(f"{EASY}.idx", 0),
    "other tokenizer": domains(),
    "damaged domains.json": write("domains.json", b"{"),
    "incomplete domains.json": write("domains.json", b'{"version": 1}'),
    "negative count in domains.json": domains(documents=-1),
    "data altered since": reverse_data,
    "weights in text": lambda place: (place.empty / "weights.npy").write_text("1\n1\n"),
    "weights of fewer documents": weights(),
    "weights below 0": weights(-1),
    "weights that are not finite": weights(math.nan),
    "weights of two datasets in one file": two_of_one_name,
    "scores that are not complete": lambda place: (place.empty / "progress.json").write_text("{}"),
    "scores of other data": scores(datasets={EASY: {"fingerprint": "0" * 16}}),
    "scores of another tokenizer": scores(tokenizer={"type": "other", "sha256": "0" * 64}),
    "scores of other datasets": scores(datasets={}),
    "scores cut off": scores(),
    "incomplete, named": without_metadata(4),
    "incomplete, of another run": without_metadata(4),
    "reference that is incomplete": without_metadata(4),
    "none complete": without_metadata(2, 4),
    "lost shard": lambda place: next(place.newest.glob("*.distcp")).unlink(),
    "tracker of what is gone": track("7"),
    "tracker without a number": track("four"),
    "index that would run code": lambda place: (place.newest / ".metadata").write_bytes(
        pickle.dumps(Planted(place.empty / "planted"))
    ),
    "damaged index": lambda place: (place.newest / ".metadata").write_bytes(b"\x80\x04garbage"),
    "saving into a file": file_for_folder,
    "saving below a file": file_for_folder,
    "log in a file": file_for_folder,
    "TensorBoard in a file": file_for_folder,
    "data indexes in a file": file_for_folder,
}
