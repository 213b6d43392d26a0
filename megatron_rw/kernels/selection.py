"""Which implementation of the kernels runs."""

from __future__ import annotations

import importlib.util
import os
from typing import Literal, cast, get_args

import torch

BackendName = Literal["torch", "triton", "cuda"]
BACKEND_VARIABLE = "MEGATRON_RW_KERNELS"

_chosen: BackendName | None = None


class BackendError(ValueError):
    """The kernels that were asked for cannot run here; the message names the remedy."""


def use_backend(name: BackendName | None) -> None:
    """Choose for this process, before the environment variable and the device do.

    Args:
        name: None to leave it to them again.
    """
    global _chosen
    _chosen = name


def default_backend(device: torch.device) -> BackendName:
    """The first that says: `use_backend`, `MEGATRON_RW_KERNELS`, the device.

    A GPU has Triton, anything else torch.

    Raises:
        BackendError: the variable names no backend.
    """
    named = _chosen or os.environ.get(BACKEND_VARIABLE)
    if not named:
        return "triton" if device.type == "cuda" else "torch"
    if named not in get_args(BackendName):
        choices = ", ".join(get_args(BackendName))
        raise BackendError(f"{BACKEND_VARIABLE}={named}: choose one of {choices}, or unset it")
    return cast(BackendName, named)


def check_backend(device: torch.device, name: BackendName | None = None) -> BackendName:
    """See that a backend can run; the CUDA kernels are built where they are not yet.

    Args:
        device: where it shall run.
        name: the default when None.

    Returns:
        Its name.

    Raises:
        BackendError: it cannot.
    """
    name = name or default_backend(device)
    if name == "triton":
        if importlib.util.find_spec("triton") is None:
            raise BackendError("the Triton kernels need the package triton: install it")
        if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            raise BackendError(
                "the Triton kernels need a GPU, or for tests TRITON_INTERPRET=1 in the "
                "environment; the backend torch runs anywhere"
            )
    elif name == "cuda":
        from megatron_rw.kernels import cuda_library

        cuda_library.load(device.type)
    return name
