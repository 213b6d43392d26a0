"""What every result says of itself: machine, versions, date, command."""

from __future__ import annotations

import os
import platform
import re
import shlex
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).resolve().parents[1] / "results"
PACKAGES = (
    "torch",
    "triton",
    "megatron-core",
    "liger-kernel",
    "cut-cross-entropy",
    "transformer-engine",
    "numpy",
)


def device_name(device: torch.device) -> str:
    """The GPU's, or the processor's with its cores."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return f"{line.split(':', 1)[1].strip()}, {os.cpu_count()} cores"
    return platform.machine()


def about(device: torch.device) -> dict[str, Any]:
    """The head of a result."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    if device.type == "cuda":
        versions["cuda"] = str(torch.version.cuda)
    return {
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.now(UTC).date().isoformat(),
        "device": device_name(device),
        "versions": versions,
    }


def results_file(name: str, device: torch.device) -> Path:
    """Where the result of a benchmark on this device belongs: `results/NAME_DEVICE.json`."""
    model = device_name(device) if device.type == "cuda" else "cpu"
    RESULTS.mkdir(parents=True, exist_ok=True)
    return RESULTS / f"{name}_{re.sub('[^a-z0-9]+', '_', model.lower()).strip('_')}.json"
