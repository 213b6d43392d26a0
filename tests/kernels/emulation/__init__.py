"""Builds the CUDA kernels for the CPU, see emulation.h, and a program that runs all of them."""

from __future__ import annotations

import fcntl
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.utils import cpp_extension

from megatron_rw.kernels.cuda_library import CXX_FLAGS, FOLDER

HERE = Path(__file__).parent
BUILD = HERE / ".build"
KERNELS = [str(path) for path in sorted(FOLDER.glob("*.cu"))]
FLAGS = ["-std=c++20", "-Wall", "-Werror", "-Wno-unknown-pragmas", "-DMEGATRON_RW_EMULATED"]


def library() -> Path:
    """The operators with kernels for the CPU."""
    torch_flags = [flag for flag in CXX_FLAGS if flag.startswith("-DTORCH")]
    for folder in cpp_extension.include_paths():
        torch_flags += ["-isystem", folder]
    for folder in cpp_extension.library_paths():
        torch_flags += [f"-L{folder}"]
    return compiled(
        "emulated.so",
        ["-shared", "-fPIC", "-O2", *torch_flags],
        [*KERNELS, str(FOLDER / "operators.cpp")],
        ["-ltorch_cpu", "-ltorch"],
    )


def exercise(*sanitizers: str) -> Path:
    """The program exercise.cpp, built with sanitizers of the compiler."""
    flags = ["-g", "-O1", f"-fsanitize={','.join(sanitizers)}", "-fno-sanitize-recover=all"]
    return compiled(
        f"exercise-{sanitizers[0]}", flags, [*KERNELS, str(HERE / "exercise.cpp")], ["-pthread"]
    )


def exercise_on_gpu(output: Path) -> Path:
    """The same program, not emulated."""
    command = ["nvcc", "-std=c++20", "-O2", "-lineinfo", "-arch=native", "-x", "cu", f"-I{FOLDER}"]
    subprocess.run([*command, *KERNELS, str(HERE / "exercise.cpp"), "-o", str(output)], check=True)
    return output


def compiled(
    name: str, flags: Sequence[str], sources: Sequence[str], libraries: Sequence[str] = ()
) -> Path:
    """Compile, unless what is there is newer than all sources; test workers take turns."""
    BUILD.mkdir(exist_ok=True)
    output = BUILD / f"{torch.__version__}-{name}"
    with (BUILD / f"{name}.turn").open("w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        inputs = [*FOLDER.iterdir(), *HERE.glob("*.*"), Path(__file__)]
        newest = max(path.stat().st_mtime for path in inputs)
        if not output.exists() or output.stat().st_mtime < newest:
            command = ["g++", *FLAGS, f"-I{HERE}", f"-I{FOLDER}", *flags, "-x", "c++", *sources]
            subprocess.run([*command, "-x", "none", *libraries, "-o", str(output)], check=True)
    return output
