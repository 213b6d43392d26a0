"""Compiles the CUDA kernels in memory and starts them on torch's stream, through `cuda.core`.

NVRTC, which comes with torch, makes a cubin of the sources in `csrc` for the device at hand. No
other compiler, no header and no file is needed, and none is written.
"""

from __future__ import annotations

import importlib
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TextIO

import torch

from megatron_rw.kernels.options import BackendError

if TYPE_CHECKING:
    from cuda.core import Kernel, ObjectCode, Stream

SOURCES = ("device.cuh", "statistics.cuh", "gradient.cuh", "weigh.cuh")
FOLDER = Path(__file__).parent / "csrc"
# As NVRTC has them: templates with their arguments.
KERNELS = (
    *(
        kernel.format(dtype)
        for kernel in ("statistics<{}, false>", "statistics<{}, true>", "gradient<{}>")
        for dtype in ("float", "bf16", "half")
    ),
    "combine",
    "weigh",
)
_REMEDY = "use --reweight-kernels torch (MEGATRON_RW_KERNELS=torch outside of the program)"


class Launcher(Protocol):
    """Starts kernels on one device and returns at once."""

    def __call__(
        self, kernel: str, grid: tuple[int, int], threads: int, *arguments: int | float
    ) -> None:
        """Start a kernel.

        Args:
            kernel: one of `KERNELS`.
            grid: blocks.
            threads: of a block, a multiple of 32 up to 1024.
            arguments: 8 bytes each: int for pointers and integers, float for doubles.
        """


_launchers: dict[str, Launcher] = {}


def use_launcher(device: str, launcher: Launcher) -> None:
    """Have kernels on a device started by something else, as tests do on the CPU."""
    _launchers[device] = launcher


def launcher(device: torch.device) -> Launcher:
    """What starts kernels on a device; compiles them at the first call.

    Raises:
        BackendError: they cannot be compiled, or not for this device; the message has the remedy.
    """
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    found = _launchers.get(str(device))
    if found is None:
        if device.type != "cuda":
            raise BackendError(
                f"the CUDA kernels need a GPU, and this run is on device {device.type}: {_REMEDY}"
            )
        found = _launchers[str(device)] = _DeviceLauncher(device.index)
    return found


def source() -> str:
    """All kernels as one translation unit; errors name the file and the line."""
    return "".join(f'#line 1 "{name}"\n{(FOLDER / name).read_text()}' for name in SOURCES)


def compile_kernels(architecture: str, log: TextIO | None = None) -> ObjectCode:
    """Compile all kernels in memory; no GPU is needed.

    Args:
        architecture: `sm_90a` and the like.
        log: gets what the compiler and the assembler say, registers and spills among it.

    Raises:
        BackendError: `cuda.core` or NVRTC is missing or fails.
    """
    try:
        from cuda.core import Program, ProgramOptions
        from cuda.pathfinder import DynamicLibNotFoundError
    except ImportError as error:
        raise BackendError(
            f"the CUDA kernels are compiled through cuda.core, which cannot be imported ({error}): "
            f"pip install cuda-core cuda-bindings, or {_REMEDY}"
        ) from error
    options = ProgramOptions(
        std="c++20",
        arch=architecture,
        # Generic lambdas run on the device, and cannot be marked so in the source.
        device_as_default_execution_space=True,
        ptxas_options="-v",
    )
    try:
        program = Program(source(), "c++", options)
        return program.compile("cubin", name_expressions=KERNELS, logs=log)
    except DynamicLibNotFoundError as error:
        raise BackendError(
            "NVRTC, which compiles the CUDA kernels, was not found; torch's builds for CUDA bring "
            f"it: pip install nvidia-cuda-nvrtc, or {_REMEDY}"
        ) from error
    # The class of NVRTC's own errors is private.
    except Exception as error:
        said = " ".join(str(error).split())
        raise BackendError(
            f"NVRTC did not compile the CUDA kernels for {architecture}: {said}. A newer "
            f"nvidia-cuda-nvrtc knows newer GPUs; install it, or {_REMEDY}"
        ) from error


class _DeviceLauncher:
    def __init__(self, index: int) -> None:
        major, minor = torch.cuda.get_device_capability(index)
        code = compile_kernels(f"sm_{major}{minor}" + ("a" if major == 9 else ""))
        # It is there, as the kernels were compiled through it. Imported once, not at every launch.
        self._cuda = importlib.import_module("cuda.core")
        self._index = index
        self._kernels: dict[str, Kernel] = {}
        self._streams: dict[int, Stream] = {}
        self._ready = threading.local()
        try:
            with torch.cuda.device(index):
                self._bind()
                self._kernels = {name: code.get_kernel(name) for name in KERNELS}
        # The class of the driver's own errors is private.
        except Exception as error:
            raise BackendError(
                f"the driver did not load the CUDA kernels ({error}): {_REMEDY}"
            ) from error

    def __call__(
        self, kernel: str, grid: tuple[int, int], threads: int, *arguments: int | float
    ) -> None:
        with torch.cuda.device(self._index):
            self._bind()
            handle = torch.cuda.current_stream().cuda_stream
            if handle not in self._streams:
                self._streams[handle] = self._cuda.Stream.from_handle(handle)
            config = self._cuda.LaunchConfig(grid=grid, block=threads)
            self._cuda.launch(self._streams[handle], config, self._kernels[kernel], *arguments)

    def _bind(self) -> None:
        """Make the device's context current: a thread of autograd may have none of its own yet."""
        if not getattr(self._ready, "bound", False):
            self._cuda.Device(self._index).set_current()
            self._ready.bound = True
