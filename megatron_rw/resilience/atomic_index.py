"""Indexes of the data that are written whole or not at all.

Megatron keeps them in `--data-cache-path` and takes an index for whole when its files are there.
One that a killed run was writing would make every later start fail.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy
from megatron.core.datasets import blended_dataset, gpt_dataset


class DataIndexError(ValueError):
    """An index of the data is damaged; the message says which."""


def install() -> None:
    """Have Megatron's datasets write and read so."""
    for module in (gpt_dataset, blended_dataset):
        module.numpy = _Numpy(numpy)
        module.safe_numpy_load = _explained(module.safe_numpy_load)


class _Numpy(ModuleType):
    """numpy, but for how `save` reaches its file."""

    def __init__(self, original: ModuleType) -> None:
        super().__init__(original.__name__)
        self._original = original

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)

    def save(self, file: Any, *args: Any, **kwargs: Any) -> None:
        """As `numpy.save`, to a path that gets its name when all is written."""
        unfinished = f"{file}.{os.getpid()}"
        with open(unfinished, "wb") as stream:
            self._original.save(stream, *args, **kwargs)
        os.replace(unfinished, file)


def _explained(load: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(load)
    def loading(path: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return load(path, *args, **kwargs)
        except (ValueError, EOFError) as error:
            raise DataIndexError(
                f"{path}, an index of the data that an earlier run made, is damaged: {error}. "
                f"Delete the folder {os.path.dirname(path)} (--data-cache-path); it is made again."
            ) from error

    return loading
