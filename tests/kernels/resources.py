"""What the compiler makes of the CUDA kernels on each architecture; pytest prints it at its end."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import astuple, dataclass
from pathlib import Path

import pytest

from megatron_rw.kernels.cuda_library import CXX_FLAGS, FOLDER

_PROPERTY = "resources"
_NAMES = {"__nv_bfloat16": "bfloat16", "__half": "half"}
_FLAGS = {
    "statistics_kernel": ("general", "plain"),
    "gradient_kernel": ("plain", "soft-cap"),
    "probabilities_kernel": ("plain", "soft-cap"),
}
_rows: list[tuple[object, ...]] = []


@dataclass(frozen=True)
class Resources:
    """Of one kernel: bytes, and registers of a thread."""

    architecture: str
    kernel: str
    registers: int
    shared: int
    stack: int
    spilled: int


def resources(architecture: str) -> list[Resources]:
    """Compile all kernels for `80`, `90a`, … and read the assembler's report."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for source in sorted(FOLDER.glob("*.cu")):
            command = ["nvcc", *CXX_FLAGS, "-Xptxas", "-v", "-cubin", str(source)]
            command += [f"-gencode=arch=compute_{architecture},code=sm_{architecture}"]
            command += ["-o", str(Path(folder, "kernel.cubin"))]
            result = subprocess.run(command, capture_output=True, text=True)
            assert result.returncode == 0, result.stderr
            found += _parsed(architecture, result.stdout + result.stderr)
    return found


def _parsed(architecture: str, report: str) -> list[Resources]:
    kernels = []
    for part in report.split("Function properties for ")[1:]:

        def number(pattern: str, text: str = part) -> int:
            match = re.search(pattern, text)
            return int(match[1]) if match else 0

        kernels.append(
            Resources(
                architecture,
                _name(part.splitlines()[0].strip()),
                number(r"Used (\d+) registers"),
                number(r"(\d+) bytes smem"),
                number(r"(\d+) bytes stack frame"),
                number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"),
            )
        )
    return kernels


def _name(mangled: str) -> str:
    command = ["c++filt", mangled]
    name = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    match = re.search(r"([a-z]+(?:_[a-z]+)*_kernel)(?:<([^>]*)>)?", name)
    assert match, name
    kernel, arguments = match.groups()
    if not arguments:
        return kernel
    chosen = [_NAMES.get(argument, argument) for argument in arguments.split(", ")]
    if kernel in _FLAGS:
        chosen[-1] = _FLAGS[kernel][chosen[-1] == "true"]
    return ", ".join([kernel, *chosen])


@pytest.fixture
def record_resources(record_property: Callable[[str, object], None]) -> Callable[..., None]:
    """Takes what `resources` found."""
    return lambda kernel: record_property(_PROPERTY, astuple(kernel))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Keep what a test recorded, wherever it ran."""
    if report.when == "call":
        _rows.extend(tuple(value) for name, value in report.user_properties if name == _PROPERTY)  # type: ignore[arg-type]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print a line a kernel and architecture."""
    if not _rows:
        return
    terminalreporter.section("CUDA kernels: registers of a thread, bytes of the rest")
    line = "{:6}{:40}{:>10}{:>8}{:>7}{:>9}"
    head = ("sm_", "kernel", "registers", "shared", "stack", "spilled")
    for row in (head, *sorted(_rows, key=str)):
        terminalreporter.write_line(line.format(*row))
