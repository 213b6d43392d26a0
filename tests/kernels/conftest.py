"""Where there is no GPU, the CUDA kernels run emulated."""

from __future__ import annotations

import os

import torch

from tests.kernels import emulation

if not torch.cuda.is_available():
    # Hypothesis chooses between backends itself, and the real program runs in processes of its own.
    os.environ["MEGATRON_RW_CUDA_LIBRARY"] = str(emulation.library())
