"""The CUDA C++ backend: the kernels in csrc, called through torch's operators.

Forward, a block reads a stretch of a row once; a second kernel joins the stretches and shards and
adds up the samples. Backward, a block reads a stretch of a row and writes its gradient, in place
where the caller says so. No atomics: results repeat bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rw.kernels import cuda_library
from megatron_rw.kernels.options import Combined, CrossEntropyOptions, Shard
from megatron_rw.kernels.sums import SampleSums
from megatron_rw.kernels.weights import SampleWeights, WeightStrategy, largest_score


@dataclass(frozen=True)
class CudaLaunch:
    """How the two passes over the logits are cut.

    Attributes:
        forward_threads: of a block of the forward pass, a multiple of 32 up to 1024.
        forward_columns: of a row that such a block takes.
        backward_threads: of a block of the backward pass.
        backward_columns: of a row that such a block takes.
    """

    forward_threads: int = 256
    forward_columns: int = 32768
    backward_threads: int = 256
    backward_columns: int = 8192


# Not tuned yet: no GPU has run them. `benchmarks/kernels/tune.py --backend cuda` tries others.
LAUNCH = CudaLaunch()
# `Strategy` in csrc/kernels.h.
_CODES: dict[WeightStrategy, int] = {"uniform": 0, "linupper": 1, "quadratic": 2, "extremes": 3}


class CudaBackend:
    """Runs on a GPU; see `CrossEntropyBackend`.

    Args:
        launch: how the passes are cut; the default when None.
    """

    def __init__(self, launch: CudaLaunch | None = None) -> None:
        self._launch = launch or LAUNCH

    def statistics(
        self, logits: Tensor, target: Tensor, shard: Shard, options: CrossEntropyOptions
    ) -> Tensor:
        """See `CrossEntropyBackend`."""
        cuda_library.load(logits.device.type)
        tables: Tensor = torch.ops.megatron_rw_cuda.statistics(
            logits,
            target,
            shard.start,
            shard.columns,
            options.ignore_index,
            options.softcap or 0.0,
            options.label_smoothing > 0,
            self._launch.forward_threads,
            self._launch.forward_columns,
        )
        return tables

    def merge(self, tables: Tensor) -> Tensor:
        """See `CrossEntropyBackend`."""
        return tables if len(tables) == 1 else torch.ops.megatron_rw_cuda.merge(tables)

    def combine(
        self,
        tables: Tensor,
        target: Tensor,
        shard: Shard,
        options: CrossEntropyOptions,
        loss_mask: Tensor | None,
    ) -> Combined:
        """See `CrossEntropyBackend`."""
        losses, lse, sums = torch.ops.megatron_rw_cuda.combine(
            tables,
            target,
            None if loss_mask is None else loss_mask.float(),
            shard.vocab_size,
            options.ignore_index,
            options.z_loss,
            shard.smoothing(options),
        )
        if loss_mask is None:
            return Combined(losses, lse, None)
        # One partial sum, or few of a long sequence in a fixed order.
        by_sample = sums[:, 0] if sums.shape[1] == 1 else sums.sum(dim=1)
        return Combined(losses, lse, SampleSums(*by_sample.unbind()))

    def gradient(
        self,
        logits: Tensor,
        target: Tensor,
        lse: Tensor,
        upstream: Tensor,
        shard: Shard,
        options: CrossEntropyOptions,
        out: Tensor,
    ) -> None:
        """See `CrossEntropyBackend`."""
        smoothing = shard.smoothing(options)
        torch.ops.megatron_rw_cuda.gradient(
            logits,
            target,
            lse,
            upstream,
            shard.start,
            shard.columns,
            options.ignore_index,
            options.softcap or 0.0,
            options.z_loss,
            smoothing,
            smoothing / shard.vocab_size,
            self._launch.backward_threads,
            self._launch.backward_columns,
            out,
        )


def weigh(
    losses: Tensor,
    strategy: WeightStrategy,
    temperature: float | Tensor,
    delta: float,
    mask: Tensor | None,
    given_range: Tensor | None,
) -> SampleWeights:
    """See `weigh_samples`; float32, not empty.

    Raises:
        ValueError: the losses are float64.
    """
    if losses.dtype != torch.float32:
        raise ValueError("the CUDA backend weighs float32 losses; float64 needs backend torch")
    cuda_library.load(losses.device.type)
    scalar = None if isinstance(temperature, Tensor) else float(temperature)
    on_device = temperature.float() if isinstance(temperature, Tensor) else None
    return SampleWeights(
        *torch.ops.megatron_rw_cuda.weigh(
            losses.contiguous(),
            None if mask is None else mask.contiguous(),
            None if given_range is None else given_range.contiguous(),
            on_device,
            scalar or 0.0,
            _CODES[strategy],
            float(delta),
            largest_score(strategy, float(delta)),
        )
    )
