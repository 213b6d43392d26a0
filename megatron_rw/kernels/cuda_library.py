"""Finds, or builds at first use, the library of the CUDA C++ kernels and registers its operators.

Looked for in this order: the file that MEGATRON_RW_CUDA_LIBRARY names; one that was built with the
package (`MEGATRON_RW_BUILD_CUDA=1 pip install --no-build-isolation .`); one that was built here
before. Otherwise nvcc builds one for this machine's GPU, once.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.utils import cpp_extension

from megatron_rw.kernels.selection import BackendError

LIBRARY_VARIABLE = "MEGATRON_RW_CUDA_LIBRARY"
CACHE_VARIABLE = "TORCH_EXTENSIONS_DIR"
FOLDER = Path(__file__).parent / "csrc"
SOURCES = ("operators.cpp", "statistics.cu", "gradient.cu", "probabilities.cu", "weigh.cu")
# The stable ABI of torch 2.11, which later versions keep.
CXX_FLAGS = ("-O3", "-std=c++20", "-DTORCH_TARGET_VERSION=0x020b000000000000", "-DUSE_CUDA")
# Of a build with the package, which may run elsewhere: Ampere, Hopper, Blackwell and later.
ARCHITECTURES = ("80", "90a", "100", "100+PTX")

_loaded_for: set[str] = set()


# Called, not traced, where torch.compile meets it.
@torch.compiler.assume_constant_result
def load(device_type: str) -> None:
    """Register `torch.ops.megatron_rw_cuda`.

    Args:
        device_type: where the operators will run.

    Raises:
        BackendError: there is no library and none can be built, or it does not fit.
    """
    if device_type in _loaded_for:
        return
    path = _find() or _built_here(device_type)
    try:
        torch.ops.load_library(path)
        fits = _has_kernels(device_type.upper())
    except (OSError, RuntimeError) as error:
        raise BackendError(f"{path} is no library of CUDA kernels for here: {error}") from error
    if not fits:
        raise BackendError(f"the CUDA kernels in {path} do not run on device {device_type}")
    from megatron_rw.kernels import cuda_fakes  # noqa: F401

    _loaded_for.add(device_type)


def packaged() -> Path:
    """Where the library is that was built with the package from these sources, if it was."""
    return Path(__file__).parent / f"_cuda_{fingerprint()}.so"


def compile_library(output: Path, architectures: Sequence[str]) -> None:
    """Build the library with nvcc; it appears only when complete.

    Args:
        output: the library.
        architectures: `90a` for code, `100+PTX` for what later GPUs' drivers translate.

    Raises:
        BackendError: nvcc is not there or fails; the message has the end of what it said.
    """
    nvcc = Path(cpp_extension.CUDA_HOME or "", "bin", "nvcc")
    if cpp_extension.CUDA_HOME is None or not nvcc.is_file():
        raise BackendError(f"no nvcc was found to build the CUDA kernels with. {_remedy()}")
    unfinished = output.with_suffix(f".{os.getpid()}.so")
    command = [str(nvcc), *CXX_FLAGS, "-shared", "-Xcompiler", "-fPIC", "--cudart", "shared"]
    command += ["--threads", "0", *map(_gencode, architectures)]
    command += [f"-I{folder}" for folder in cpp_extension.include_paths()]
    command += [f"-L{folder}" for folder in cpp_extension.library_paths()]
    command += ["-ltorch_cuda", "-ltorch_cpu", "-ltorch", "-o", str(unfinished)]
    command += [str(FOLDER / source) for source in SOURCES]
    try:
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode != 0:
            last = "\n".join((result.stdout + result.stderr).strip().splitlines()[-20:])
            raise BackendError(f"building the CUDA kernels failed:\n{last}\n{_remedy()}")
        unfinished.rename(output)
    finally:
        unfinished.unlink(missing_ok=True)


def fingerprint() -> str:
    """Of all that a built library depends on but the architecture."""
    digest = hashlib.sha256(f"{torch.version.cuda} {CXX_FLAGS}".encode())
    for path in sorted(FOLDER.iterdir()):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _has_kernels(key: str) -> bool:
    found: bool = torch._C._dispatch_has_kernel_for_dispatch_key("megatron_rw_cuda::weigh", key)
    return found


def _find() -> Path | None:
    named = os.environ.get(LIBRARY_VARIABLE)
    if named:
        if not Path(named).is_file():
            raise BackendError(f"{LIBRARY_VARIABLE}={named}: there is no such file")
        return Path(named)
    return packaged() if packaged().is_file() else None


def _built_here(device_type: str) -> Path:
    """The library for this machine's GPU; processes take turns, and the first builds it."""
    if device_type != "cuda":
        raise BackendError(
            f"the CUDA kernels need a GPU, and this run is on device {device_type}; "
            "the backend torch runs anywhere"
        )
    major, minor = torch.cuda.get_device_capability()
    architecture = f"{major}{minor}" + ("a" if major >= 9 else "")
    cache = os.environ.get(CACHE_VARIABLE)
    folder = Path(cache) if cache else Path.home() / ".cache" / "torch_extensions"
    library = folder / f"megatron_rw_cuda_{fingerprint()}_sm_{architecture}.so"
    if library.is_file():
        return library
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # The system drops a lock with the process that holds it: a killed one leaves none behind.
        with library.with_suffix(".lock").open("w") as turn:
            fcntl.flock(turn, fcntl.LOCK_EX)
            if not library.is_file():
                print(f"building the CUDA kernels, once: {library}", flush=True)
                start = time.monotonic()
                compile_library(library, [architecture])
                print(f"built the CUDA kernels in {time.monotonic() - start:.0f} s", flush=True)
    except OSError as error:
        raise BackendError(
            f"the CUDA kernels cannot be built in {folder}: {error}. Set {CACHE_VARIABLE} to a "
            "folder that can be written."
        ) from error
    return library


def _gencode(architecture: str) -> str:
    number = architecture.removesuffix("+PTX")
    kind = "compute" if architecture.endswith("+PTX") else "sm"
    return f"-gencode=arch=compute_{number},code={kind}_{number}"


def _remedy() -> str:
    return (
        f"Install the CUDA toolkit {torch.version.cuda} and set CUDA_HOME to it, or name a library "
        f"that was built elsewhere in {LIBRARY_VARIABLE}, or use --reweight-kernels triton."
    )
