"""Indexes of the data that are written whole or not at all, and used for the data they are of.

Megatron keeps them in `--data-cache-path` and takes an index for whole when its files are there.
One that a killed run was writing would make every later start fail. It finds them by the path of
the data: those of a dataset that was made again under its path would be used, and be wrong.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy
from megatron.core.datasets import blended_dataset, gpt_dataset
from megatron.core.datasets.indexed_dataset import get_idx_path

from megatron_rw.data.indexed.integrity import fingerprint
from megatron_rw.errors import UserError
from megatron_rw.patching import Around, Patch

# The first of the three that a GPTDataset writes; its description is written before it.
_DOCUMENTS = "-document_index.npy"


def patches() -> list[Patch]:
    """What makes Megatron's datasets write each index completely or not at all, and check it."""
    modules = (gpt_dataset, blended_dataset)
    saves = (
        "`numpy.save` leaves half a file when the run is killed. Megatron takes that for an index, "
        "and every later start fails."
    )
    loads = "An index that is damaged, or of other data under the same path, is used as it is."
    return [
        *(Patch(module, "numpy", _Numpy(numpy), saves) for module in modules),
        *(Patch(module, "safe_numpy_load", Around(_load), loads) for module in modules),
    ]


class _Numpy(ModuleType):
    """numpy, but for how `save` reaches its file."""

    def __init__(self, original: ModuleType) -> None:
        super().__init__(original.__name__)
        self._original = original

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)

    def save(self, file: Any, *args: Any, **kwargs: Any) -> None:
        """As `numpy.save`, to a path that gets its name when all is written."""
        if str(file).endswith(_DOCUMENTS):
            base = str(file).removesuffix(_DOCUMENTS)
            dataset = _dataset_of(base)
            # Not of mock data, nor of data in object storage.
            if dataset is not None and os.path.exists(get_idx_path(dataset)):
                _source(base).write_text(fingerprint(dataset))
        unfinished = f"{file}.{os.getpid()}"
        with open(unfinished, "wb") as stream:
            self._original.save(stream, *args, **kwargs)
        os.replace(unfinished, file)


def _load(proceed: Callable[..., Any], call: dict[str, Any]) -> Any:
    path = str(call["path"])
    # One rank asks for all.
    if path.endswith(_DOCUMENTS) and os.environ.get("RANK", "0") == "0":
        _check_source(path.removesuffix(_DOCUMENTS))
    try:
        return proceed()
    except (ValueError, EOFError) as error:
        raise UserError(
            f"{path}, an index of the data that an earlier run made, is damaged: {error}. "
            f"Delete the folder {os.path.dirname(path)} (--data-cache-path); it is made again."
        ) from error


def _check_source(base: str) -> None:
    """Compare the data with what the index was made for. One of Megatron's own does not tell."""
    if not _source(base).exists():
        return
    dataset = _dataset_of(base)
    if dataset is not None and fingerprint(dataset) != _source(base).read_text():
        raise UserError(
            f"data path {dataset} has been made again since its index in {os.path.dirname(base)} "
            "was: delete that folder (--data-cache-path); it is made again."
        )


def _source(base: str) -> Path:
    return Path(f"{base}-source.txt")


def _dataset_of(base: str) -> str | None:
    description = json.loads(Path(f"{base}-description.txt").read_text())
    path: str | None = description["dataset_path"]
    return path
