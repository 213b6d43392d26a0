"""What a rank finds out by looking at its own machine."""

import contextlib
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
    """One rank's machine; sizes are in bytes."""

    rank: int
    host: str
    refusal: str | None  # Why the job would not start on this rank.
    setup: dict[str, str]  # What has to be the same on all ranks, by name; "none" for what is not.
    device_memory: int | None  # None on the CPU.
    free_memory: int | None  # Of the device's, what nobody uses.
    free_disk: int | None  # On the disk of --save; None without --save, or where it is no folder.
    save_problem: str | None  # Why --save cannot be written to.


def look_around(rank: int, device: Device, save: str | None, refusal: str | None) -> Facts:
    """Returns the facts of this rank; on CUDA about the current device."""
    on_gpu = device == "cuda"
    free, total = torch.cuda.mem_get_info() if on_gpu else (None, None)
    setup = {
        "device": torch.cuda.get_device_name() if on_gpu else "CPU",
        "driver": driver_version(_DRIVER),
        "CUDA": str(torch.version.cuda) if on_gpu else NONE,
        "NCCL": ".".join(map(str, torch.cuda.nccl.version())) if on_gpu else NONE,
        "Python": platform.python_version(),
        "torch": torch.__version__,
    }
    for name in ("megatron-core", "transformer-engine", "apex"):
        setup[name] = NONE
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            setup[name] = importlib.metadata.version(name)
    return Facts(rank, socket.gethostname(), refusal, setup, total, free, *try_to_save(save))


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
    the nearest folder above, which is tried instead. Object storage is not tried. Returns the bytes
    free there, and what the operating system says against writing.
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
