"""What a rank finds out by looking at its own machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import socket
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_rw.platform import Device
from megatron_rw.resilience.folder import nearest_existing

NONE = "none"
GIB = 2**30
_DRIVER = Path("/proc/driver/nvidia/version")


def amount(nbytes: float) -> str:
    """Returns a number of bytes as text, `1.5 GiB`."""
    return f"{nbytes / GIB:,.1f} GiB" if nbytes >= GIB else f"{nbytes / 2**20:,.1f} MiB"


@dataclass(frozen=True)
class Facts:
    """One rank's machine.

    Attributes:
        rank: Of the process that looked.
        host: Its name.
        refusal: Why the job would not start on this rank, None where it would.
        setup: What has to be the same on all ranks, by name: the device, the driver, CUDA, NCCL,
            Python and packages; "none" where there is none.
        device_memory: Bytes of the GPU, None on the CPU.
        free_memory: Bytes of it that nobody uses.
        free_disk: Bytes free on the disk of --save, None without --save, or where it is no folder.
        save_problem: Why --save cannot be written to, None where it can.
    """

    rank: int
    host: str
    refusal: str | None
    setup: dict[str, str]
    device_memory: int | None
    free_memory: int | None
    free_disk: int | None
    save_problem: str | None


def look_around(rank: int, device: Device, save: str | None, refusal: str | None) -> Facts:
    """Returns the facts of this rank; on CUDA about the current device."""
    free, total = torch.cuda.mem_get_info() if device == "cuda" else (None, None)
    free_disk, save_problem = try_to_save(save)
    return Facts(
        rank=rank,
        host=socket.gethostname(),
        refusal=refusal,
        setup=_setup(device),
        device_memory=total,
        free_memory=free,
        free_disk=free_disk,
        save_problem=save_problem,
    )


def _setup(device: Device) -> dict[str, str]:
    on_gpu = device == "cuda"
    return {
        "device": torch.cuda.get_device_name() if on_gpu else "CPU",
        "driver": driver_version(_DRIVER),
        "CUDA": str(torch.version.cuda) if on_gpu else NONE,
        "NCCL": ".".join(map(str, torch.cuda.nccl.version())) if on_gpu else NONE,
        "Python": platform.python_version(),
        "torch": torch.__version__,
        **{
            name: _package_version(name) for name in ("megatron-core", "transformer-engine", "apex")
        },
    }


def _package_version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return NONE


def driver_version(path: Path) -> str:
    """Returns the version of NVIDIA's kernel module, which /proc also shows in containers."""
    try:
        found = re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)", path.read_text())
    except OSError:
        return NONE
    return found[1] if found else "unknown"


def try_to_save(save: str | None) -> tuple[int | None, str | None]:
    """Writes a small file where the job will save, and deletes it.

    A folder that is not there yet is not created: the job does that, with rights that it needs in
    the nearest folder above, which is tried instead.

    Args:
        save: Folder, None for a job that saves nothing; object storage is not tried.

    Returns:
        Bytes free there, and what the operating system says against writing.
    """
    if save is None or "://" in save:
        return None, None
    folder = nearest_existing(save)
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".preflight-") as stream:
            stream.write(b"\0" * 4096)
            stream.flush()
            os.fsync(stream.fileno())
        return shutil.disk_usage(folder).free, None
    except OSError as error:
        return None, f"{error.strerror or error}: {folder}"
