"""Builds the CUDA kernels with the package when asked to; pyproject.toml has everything else.

MEGATRON_RW_BUILD_CUDA=1 pip install --no-build-isolation .

Without isolation, as the build needs the torch that is installed.
"""

import os
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

VARIABLE = "MEGATRON_RW_BUILD_CUDA"


class BuildKernels(build_ext):
    """Has nvcc build the library where setuptools would put a module."""

    def get_ext_filename(self, fullname: str) -> str:
        """The file within the package that `cuda_library` looks for."""
        from megatron_rw.kernels import cuda_library

        return str(Path(*fullname.split(".")[:-1], cuda_library.packaged().name))

    def build_extension(self, ext: Extension) -> None:
        """Compile for all architectures that the project names."""
        from megatron_rw.kernels import cuda_library

        output = Path(self.get_ext_fullpath(ext.name)).absolute()
        output.parent.mkdir(parents=True, exist_ok=True)
        cuda_library.compile_library(output, cuda_library.ARCHITECTURES)


asked = os.environ.get(VARIABLE, "0")
if asked not in ("0", "1"):
    sys.exit(f"error: {VARIABLE}={asked}: 1 builds the CUDA kernels, 0 or nothing does not")
if asked == "1":
    sys.path.insert(0, str(Path(__file__).parent))
    setup(
        ext_modules=[Extension("megatron_rw.kernels._cuda", [])],
        cmdclass={"build_ext": BuildKernels},
    )
else:
    setup()
