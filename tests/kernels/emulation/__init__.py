"""Runs the CUDA kernels on the CPU; see emulation.h."""

from __future__ import annotations

import ctypes
import fcntl
import subprocess
from pathlib import Path

from megatron_rw.kernels import cuda_launch

HERE = Path(__file__).parent
BUILD = HERE / ".build"
FLAGS = ["-std=c++20", "-shared", "-fPIC", "-Wall", "-Werror", "-Wno-unknown-pragmas", "-pthread"]
# Of a block at most: kernels must be right for any number of warps, and two processor cores are
# slow at switching between a thousand threads.
MOST_THREADS = 64


class EmulatedLauncher:
    """Starts emulated kernels and waits for them; see `cuda_launch.Launcher`.

    Args:
        sanitizers: of the compiler, `address` and the like, that watch them.
    """

    def __init__(self, *sanitizers: str) -> None:
        self._library = ctypes.CDLL(str(_library(sanitizers)))

    def __call__(
        self, kernel: str, grid: tuple[int, int], threads: int, *arguments: int | float
    ) -> None:
        """Start a kernel.

        Raises:
            ValueError: CUDA would not start it so.
        """
        if not (0 < grid[0] < 2**31 and 0 < grid[1] < 2**16 and 0 < threads <= 1024):
            raise ValueError(f"no launch of {grid} blocks of {threads} threads")
        if threads % 32:
            raise ValueError(f"{threads} threads are no whole number of warps")
        # As `cuda.core` takes pointers and integers, and doubles.
        assert {type(value) for value in arguments} <= {int, float}
        values = [
            ctypes.c_double(value) if isinstance(value, float) else ctypes.c_longlong(value)
            for value in arguments
        ]
        pointers = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        entry = self._library[f"kernel_{cuda_launch.KERNELS.index(kernel)}"]
        entry(*map(ctypes.c_uint, (*grid, min(threads, MOST_THREADS))), pointers)


def install(*sanitizers: str) -> None:
    """Have the CUDA backend run on the CPU in this process."""
    cuda_launch.use_launcher("cpu", EmulatedLauncher(*sanitizers))


def _library(sanitizers: tuple[str, ...]) -> Path:
    """Compile, unless what is there is newer than all sources; test workers take turns."""
    BUILD.mkdir(exist_ok=True)
    name = "-".join(["emulated", *sanitizers])
    output = BUILD / f"{name}.so"
    with (BUILD / f"{name}.turn").open("w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        inputs = [*cuda_launch.FOLDER.iterdir(), HERE / "emulation.h", Path(__file__)]
        inputs.append(Path(cuda_launch.__file__))
        newest = max(path.stat().st_mtime for path in inputs)
        if not output.exists() or output.stat().st_mtime < newest:
            flags = [*FLAGS, "-O1" if sanitizers else "-O2"]
            if sanitizers:
                flags += ["-g", f"-fsanitize={','.join(sanitizers)}", "-fno-sanitize-recover=all"]
            entries = "".join(
                f'extern "C" void kernel_{number}(unsigned x, unsigned y, unsigned threads, '
                f"void** arguments) {{ run({kernel}, x, y, threads, arguments); }}\n"
                for number, kernel in enumerate(cuda_launch.KERNELS)
            )
            text = f'#include "emulation.h"\n{cuda_launch.source()}#line 1 "entries"\n{entries}'
            subprocess.run(
                ["g++", *flags, f"-I{HERE}", "-x", "c++", "-", "-o", str(output)],
                input=text,
                text=True,
                check=True,
            )
    return output
