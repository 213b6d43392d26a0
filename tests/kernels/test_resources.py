"""The CUDA kernels as NVRTC compiles them, and under the sanitizers of the compiler."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from megatron_rw.kernels import cuda_launch
from tests.kernels import resources

RACE = """
import torch
from megatron_rw.kernels import cuda_launch
from tests.kernels import emulation
emulation.install({sanitizers})
losses = torch.rand(100)
place = losses.data_ptr()
# Weights over the statistics, and of more samples than there are.
arguments = (place, *[0] * 5, place, place, place, 120, 1, *[1.0] * 7)
cuda_launch.launcher(torch.device("cpu"))("weigh", (1, 1), 64, *arguments)
"""


@pytest.mark.parametrize("architecture", resources.ARCHITECTURES)
def test_kernels_stay_within_their_bounds(architecture: str) -> None:
    found = resources.resources(architecture)
    assert {kernel.kernel for kernel in found} == set(cuda_launch.KERNELS)
    assert {kernel.kernel: kernel.excess for kernel in found if kernel.excess} == {}


def test_compiling_needs_no_other_compiler_and_no_place_to_write() -> None:
    code = """
from megatron_rw.kernels import cuda_launch
print(len(cuda_launch.compile_kernels("sm_90a").code))
"""
    nowhere = {"PATH": "", "HOME": "/nonexistent", "TMPDIR": "/nonexistent"}
    nowhere["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, env=nowhere, cwd="/proc", capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) > 10_000


@pytest.mark.long
@pytest.mark.parametrize("sanitizers", [("address", "undefined"), ("thread",)], ids=" ".join)
def test_sanitizers_find_nothing(sanitizers: tuple[str, ...]) -> None:
    exercise = _run(sanitizers, "-m", "tests.kernels.exercise", *sanitizers)
    assert exercise.returncode == 0, exercise.stdout + exercise.stderr
    # And find something where there is something.
    race = _run(sanitizers, "-c", RACE.format(sanitizers=", ".join(map(repr, sanitizers))))
    assert race.returncode != 0
    assert "weigh.cuh" in race.stderr


def _run(sanitizers: tuple[str, ...], *command: str) -> subprocess.CompletedProcess[str]:
    name = "libtsan.so" if "thread" in sanitizers else "libasan.so"
    find = ["g++", f"-print-file-name={name}"]
    library = subprocess.run(find, check=True, capture_output=True, text=True).stdout.strip()
    variables = {
        "LD_PRELOAD": library,
        # Python and torch keep memory to their end, and are not watched themselves.
        "ASAN_OPTIONS": "detect_leaks=0",
        "TSAN_OPTIONS": "ignore_noninstrumented_modules=1",
    }
    command = (sys.executable, "-W", "ignore", *command)
    return subprocess.run(command, env=os.environ | variables, capture_output=True, text=True)
