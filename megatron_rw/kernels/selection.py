"""Which implementation of the kernels runs."""

from __future__ import annotations

import os
from typing import Literal, cast, get_args

import torch

BackendName = Literal["torch", "triton"]
BACKEND_VARIABLE = "MEGATRON_RW_KERNELS"


def default_backend(device: torch.device) -> BackendName:
    """`MEGATRON_RW_KERNELS` where it is set; otherwise Triton on a GPU and torch elsewhere.

    Raises:
        ValueError: the variable names no backend.
    """
    named = os.environ.get(BACKEND_VARIABLE)
    if named is None:
        return "triton" if device.type == "cuda" else "torch"
    if named not in get_args(BackendName):
        choices = ", ".join(get_args(BackendName))
        raise ValueError(f"{BACKEND_VARIABLE}={named}: choose one of {choices}, or unset it")
    return cast(BackendName, named)
