"""Compiles the kernels when a run starts, and stops all ranks where one of them cannot.

A rank that ended by itself would leave the others waiting until the launcher notices.
"""

import socket

import torch

from megatron_rw.errors import UserError, reported
from megatron_rw.kernels.options import BackendError
from megatron_rw.kernels.selection import check_backend
from megatron_rw.resilience.step_samples import gather
from megatron_rw.training.callbacks.base import Callback
from megatron_rw.training.settings import Settings


class KernelsCallback(Callback):
    """Compiles the kernels before the model is built."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def on_process_groups(self) -> None:
        """Compiles, or ends the run on all ranks."""
        with reported("compiling the kernels", alike=True):
            compile_on_all_ranks(self._settings)


def compile_here(settings: Settings) -> None:
    """Compiles the kernels that the run uses for this rank's device; a `UserError` if it fails."""
    if not settings.uses_kernels:
        return
    on_gpu = settings.device == "cuda"
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    try:
        check_backend(device)
    except BackendError as error:
        # This host alone may lack a package.
        raise UserError(str(error), known_to_all=False) from error


def compile_on_all_ranks(settings: Settings) -> None:
    """Compiles the kernels on every rank. Collective over all ranks.

    Raises a `UserError` on all ranks alike, with the first rank that cannot run them and its host.
    Where no rank can, it names none.
    """
    problem: tuple[str, str] | None = None
    try:
        compile_here(settings)
    except UserError as error:
        problem = (socket.gethostname(), str(error))
    found = gather(problem)
    problems = [(rank, *one) for rank, one in enumerate(found) if one is not None]
    if problems:
        rank, host, text = problems[0]
        raise UserError(f"rank {rank} on {host}: {text}" if None in found else text)
