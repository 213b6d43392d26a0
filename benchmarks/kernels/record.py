"""What the benchmarks share: the description of a machine, arguments, tables, result files."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import re
import shlex
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).resolve().parents[1] / "results"
PACKAGES = "torch cuda-core nvidia-cuda-nvrtc numpy triton megatron-core liger-kernel "
PACKAGES += "cut-cross-entropy transformer-engine quack-kernels"


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
    for package in PACKAGES.split():
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    for wheel in (RESULTS.parent / "wheels").glob("transformer_engine-*.whl"):
        versions["transformer-engine"] = wheel.name.split("-")[1]
    if device.type == "cuda":
        from cuda.bindings.driver import cuDriverGetVersion

        versions["CUDA of torch"] = str(torch.version.cuda)
        versions["CUDA of the driver"] = str(cuDriverGetVersion()[1])
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


def arguments(description: str | None, rounds: int) -> argparse.ArgumentParser:
    """The flags that all benchmarks of the kernels have."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--budget-s", type=float, default=math.inf, help="begin nothing later")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--rehearse", action="store_true", help="little, on the CPU, emulated")
    return parser


class Result:
    """The device that the flags choose, and a result file, which outlives its program.

    In a rehearsal the device is the CPU, with the CUDA kernels emulated on it. `record` is what
    `save` writes.
    """

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.device = torch.device("cpu" if options.rehearse else options.device)
        if self.device.type == "cpu":
            torch.set_num_threads(1)
        if options.rehearse:
            print("rehearsal: no figure of this run is a measurement")
            from megatron_rw.kernels.selection import use_backend
            from tests.kernels import emulation

            emulation.install()
            use_backend("cuda")
        self.record = about(self.device) | {"rehearsal": options.rehearse}
        self._path = options.output or results_file(name, self.device)

    def save(self, **more: Any) -> None:
        """Add to the record and write it, without the folders of absolute paths."""
        self.record |= more
        text = json.dumps(self.record, indent=1)
        self._path.write_text(re.sub(r"(?<![\w.])/(?:[\w.+-]+/)+", "", text) + "\n")


def print_table(title: str, rows: Sequence[Sequence[str]]) -> None:
    """Columns as wide as their widest value, the first aligned to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    print(f"\n{title}")
    for first, *rest in rows:
        values = (f"{value:>{width}}" for value, width in zip(rest, widths[1:], strict=True))
        print(f"{first:<{widths[0]}}", *values, sep="  ", flush=True)
