"""Which implementation of the kernels runs."""

import functools
import os
from typing import Literal, cast, get_args

import torch

from megatron_rw.kernels.options import Backend, BackendError

BackendName = Literal["torch", "cuda"]
BACKEND_VARIABLE = "MEGATRON_RW_KERNELS"

_chosen: BackendName | None = None


def use_backend(name: BackendName | None) -> None:
    """Choose for this process, before the environment variable and the device do.

    Args:
        name: None to leave it to them again.
    """
    global _chosen
    _chosen = name


def default_backend(device: torch.device, dtype: torch.dtype | None = None) -> BackendName:
    """What the first of these names: the dtype, `use_backend`, `MEGATRON_RW_KERNELS`, the device.

    Only torch takes fp64. A GPU has the CUDA kernels, any other device torch.

    Raises:
        BackendError: the variable names no backend.
    """
    if dtype == torch.float64:
        return "torch"
    named = _chosen or os.environ.get(BACKEND_VARIABLE)
    if not named:
        return "cuda" if device.type == "cuda" else "torch"
    if named not in get_args(BackendName):
        choices = ", ".join(get_args(BackendName))
        raise BackendError(f"{BACKEND_VARIABLE}={named}: choose one of {choices}, or unset it")
    return cast(BackendName, named)


@functools.cache
def backend(name: BackendName) -> Backend:
    """The backend of that name; imports what it needs."""
    if name == "cuda":
        from megatron_rw.kernels.cuda_backend import CudaBackend

        return CudaBackend()
    from megatron_rw.kernels.torch_backend import TorchBackend

    return TorchBackend()


def check_backend(device: torch.device) -> BackendName:
    """Make sure that the default backend can run, and compile the kernels if it is CUDA's.

    Args:
        device: where it shall run.

    Returns:
        Its name.

    Raises:
        BackendError: it cannot.
    """
    name = default_backend(device)
    if name == "cuda":
        from megatron_rw.kernels.cuda_launch import launcher

        launcher(device)
    return name
