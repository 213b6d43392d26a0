"""The CUDA C++ backend of the fused output layer's row passes: the kernels in csrc.

`probabilities`: a block a row keeps the first part of it in registers between reading and writing,
and reads the rest a second time, mostly from the L2 cache. No atomics: results repeat bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_rw.kernels import cuda_library
from megatron_rw.kernels.options import CrossEntropyOptions, Shard
from megatron_rw.kernels.probabilities import largest_ratio

# Threads of a block of the pass over the logits. Not tuned yet: no GPU has run it.
THREADS = 512


class CudaProbabilities:
    """Runs on a GPU; see `ProbabilityBackend`.

    Args:
        threads: of a block of the pass over the logits, a multiple of 32 up to 1024.
    """

    def __init__(self, threads: int = THREADS) -> None:
        self._threads = threads

    def probabilities(
        self, logits: Tensor, target: Tensor, shard: Shard, options: CrossEntropyOptions
    ) -> Tensor:
        """See `ProbabilityBackend`."""
        cuda_library.load(logits.device.type)
        table: Tensor = torch.ops.megatron_rw_cuda.probabilities(
            logits,
            target,
            shard.start,
            shard.columns,
            options.ignore_index,
            options.softcap or 0.0,
            self._threads,
        )
        return table

    def subtract_targets(
        self,
        probabilities: Tensor,
        table: Tensor,
        target: Tensor,
        lse: Tensor,
        shard: Shard,
        options: CrossEntropyOptions,
    ) -> Tensor:
        """See `ProbabilityBackend`."""
        scale: Tensor = torch.ops.megatron_rw_cuda.subtract_targets(
            probabilities,
            table,
            target,
            lse,
            shard.start,
            shard.columns,
            options.ignore_index,
            options.softcap or 0.0,
            options.z_loss,
            largest_ratio(probabilities.dtype),
        )
        return scale

    def scale_rows(self, matrix: Tensor, scale: Tensor, out: Tensor) -> None:
        """See `ProbabilityBackend`."""
        cuda_library.load(matrix.device.type)
        torch.ops.megatron_rw_cuda.scale_rows(matrix, scale, out)
