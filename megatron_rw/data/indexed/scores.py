"""The files of a folder that `tools/score_dataset.py` has written, once it is complete."""

import json
from pathlib import Path
from typing import Any

from megatron_rw.errors import UserError

# The one is there while losses are missing, the other once all are there.
PROGRESS, SCORES = "progress.json", "scores.json"


def score_path(folder: Path, dataset: str, kind: str) -> Path:
    """Returns the file of an array of a dataset, which is named as its `.idx` is."""
    return folder / f"{dataset}.{kind}.npy"


def read_record(path: Path) -> dict[str, Any] | None:
    """Returns the object of a JSON file, None if there is none; a `UserError` if it is another."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a JSON object; delete the folder to begin anew")
    return content
