"""Writes Megatron's indexes of the data atomically, and uses them only for the same data.

Megatron keeps indexes in `--data-cache-path`, finds one by the path of the data, and takes it for
complete when its files exist. An index that a killed run was writing would make every later start
fail, and one of a dataset that was made again under the same path would be used although it is
wrong.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
from megatron.core.datasets import blended_dataset, gpt_dataset
from megatron.core.datasets.indexed_dataset import get_idx_path

from megatron_rw.data.indexed.integrity import fingerprint
from megatron_rw.errors import UserError
from megatron_rw.patching import Around, Patch, StandIn

# The first of the three files that a GPTDataset writes; it writes its description before.
_DOCUMENTS = "-document_index.npy"


def patches() -> list[Patch]:
    """Returns what makes Megatron's datasets write indexes atomically, and check them."""
    modules = (gpt_dataset, blended_dataset)
    saves = (
        "`numpy.save` leaves half a file when the run is killed. Megatron takes that for an index, "
        "and every later start fails."
    )
    loads = "An index that is damaged, or of other data under the same path, is used as it is."
    return [
        *(Patch(module, "numpy", StandIn(numpy, save=_save), saves) for module in modules),
        *(Patch(module, "safe_numpy_load", Around(_load), loads) for module in modules),
    ]


def _save(file: Any, *args: Any, **kwargs: Any) -> None:
    """Saves as `numpy.save` does, under a temporary name until all is written."""
    if str(file).endswith(_DOCUMENTS):
        base = str(file).removesuffix(_DOCUMENTS)
        dataset = _dataset_of(base)
        # Mock data and data in object storage have no files here.
        if dataset is not None and os.path.exists(get_idx_path(dataset)):
            _source(base).write_text(fingerprint(dataset))
    unfinished = f"{file}.{os.getpid()}"
    with open(unfinished, "wb") as stream:
        numpy.save(stream, *args, **kwargs)
    os.replace(unfinished, file)


def _load(proceed: Callable[..., Any], call: dict[str, Any]) -> Any:
    path = str(call["path"])
    # One rank checks for all.
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
    """Refuses an index of other data. An index that plain Megatron made cannot be checked."""
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
    return json.loads(Path(f"{base}-description.txt").read_text())["dataset_path"]
