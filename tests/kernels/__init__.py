"""What the tests of the kernels share: where they run, and in which backends."""

from __future__ import annotations

import torch

from megatron_rw.kernels.selection import BackendName

# Where there is no GPU, the CUDA kernels run emulated on the CPU.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS: list[BackendName] = ["torch", "cuda"]
