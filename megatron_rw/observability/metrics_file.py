"""Writes `metrics.jsonl`, the metrics of a run for programs to read."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch


def numbers(record: Mapping[str, object]) -> dict[str, Any]:
    """Returns a record with its tensors as numbers; waits for the device they are on."""
    return {name: _each(_number, value) for name, value in record.items()}


def _number(value: Any) -> Any:
    return value.item() if isinstance(value, torch.Tensor) else value


def _each(change: Callable[[Any], Any], value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _each(change, item) for key, item in value.items()}
    if isinstance(value, list):
        return [_each(change, item) for item in value]
    return change(value)


def _json(value: Any) -> Any:
    # JSON has no number that is not finite.
    return None if isinstance(value, float) and not math.isfinite(value) else value


class MetricsFile:
    """`metrics.jsonl`: one object per line, appended, flushed at once.

    After a resume an iteration can appear twice; then the later line counts.
    """

    def __init__(self, log_dir: str) -> None:
        os.makedirs(log_dir, exist_ok=True)
        self._file = open(os.path.join(log_dir, "metrics.jsonl"), "a")  # noqa: SIM115

    def write(self, record: Mapping[str, object]) -> None:
        """Appends a record of plain numbers; what is not finite becomes null."""
        self._file.write(json.dumps(_each(_json, record), allow_nan=False) + "\n")
        self._file.flush()
