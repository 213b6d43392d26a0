"""The CUDA C++ backend: the kernels in `csrc`.

Forward, a block reads a row once; a second kernel joins the shards and adds up the samples.
Backward, a block reads a row and writes its gradient, in place where the caller says so. No
atomics: results repeat bit for bit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from megatron_rw.kernels.cuda_launch import launcher
from megatron_rw.kernels.options import (
    RANGE_QUANTILE,
    Combined,
    CrossEntropyOptions,
    Plan,
    Shard,
    Statistic,
    Units,
    UnitWeights,
    Weighting,
    WeightStrategy,
)
from megatron_rw.kernels.sums import SampleSums

# Tokens of a sample that one block joins: kChunk in csrc/statistics.cuh.
CHUNK = 8192
# kMostThreads, kWeighThreads in csrc.
MOST_THREADS, WEIGH_THREADS = 1024, 512
_TYPES = {torch.float32: "float", torch.bfloat16: "bf16", torch.float16: "half"}


@dataclass(frozen=True)
class Launch:
    """Threads of a block of the two passes over the logits, multiples of 32 up to 1024."""

    forward_threads: int = 256
    backward_threads: int = 256


# Not tuned yet: no GPU has run them. `benchmarks/kernels/compare.py launches` tries others.
LAUNCH = Launch()


class CudaBackend:
    """Runs on a GPU; see `Backend`.

    Args:
        launch: how the passes over the logits are cut.
    """

    def __init__(self, launch: Launch = LAUNCH) -> None:
        self._launch = launch

    def statistics(
        self, logits: Tensor, target: Tensor, shard: Shard, options: CrossEntropyOptions
    ) -> Tensor:
        """See `Backend`."""
        table = logits.new_empty(options.rows, *target.shape, dtype=torch.float32)
        launcher(logits.device)(
            _kernel("statistics", logits, options.entropy),
            (target.numel(), 1),
            self._launch.forward_threads,
            *_strided(logits),
            *_strided(target),
            table.data_ptr(),
            target.shape[1],
            shard.start,
            shard.columns,
            options.ignore_index,
        )
        return table

    def combine(
        self,
        tables: Tensor,
        target: Tensor,
        shard: Shard,
        options: CrossEntropyOptions,
        loss_mask: Tensor | None,
    ) -> Combined:
        """See `Backend`."""
        sequence, batch = target.shape
        chunks = -(-sequence // CHUNK)
        made = tables.new_empty(3 + options.entropy, sequence, batch)
        losses, lse, *entropy = made[0], made[1:3], *made[3:]
        sums = None if loss_mask is None else tables.new_empty(2, chunks, batch)
        launcher(tables.device)(
            "combine",
            (batch, chunks),
            min(-(-sequence // 32) * 32, MOST_THREADS),
            tables.data_ptr(),
            len(tables),
            options.rows,
            *_strided(target),
            *((0, 0, 0) if loss_mask is None else _strided(loss_mask)),
            losses.data_ptr(),
            lse.data_ptr(),
            entropy[0].data_ptr() if entropy else 0,
            0 if sums is None else sums.data_ptr(),
            sequence,
            batch,
            shard.vocab_size,
            options.ignore_index,
        )
        by_sample = None
        if sums is not None:
            # One partial sum, or few of a long sequence in a fixed order.
            by_sample = SampleSums(*(sums[:, 0] if chunks == 1 else sums.sum(dim=1)).unbind())
        return Combined(losses, lse, by_sample, entropy[0] if entropy else None)

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
        """See `Backend`."""
        launcher(logits.device)(
            _kernel("gradient", logits),
            (target.numel(), 1),
            self._launch.backward_threads,
            *_strided(logits),
            *_strided(out),
            *_strided(target),
            lse.data_ptr(),
            *_strided(upstream),
            target.shape[1],
            shard.start,
            shard.columns,
            logits.shape[2],
            options.ignore_index,
        )

    def weigh(self, units: Units, weighting: Weighting, given: Tensor | None) -> UnitWeights:
        """See `Backend`; float32.

        Raises:
            ValueError: the signals are float64.
        """
        signals, r = units.signals, weighting.temperature
        if signals.dtype != torch.float32:
            raise ValueError("the CUDA backend weighs float32 signals; float64 needs backend torch")
        on_device = r.to(signals) if isinstance(r, Tensor) else None
        read = [None if x is None else x.contiguous() for x in (*units, given, on_device)]
        weights = signals.new_empty(len(signals))
        statistics, plan = signals.new_empty(len(Statistic)), signals.new_empty(len(Plan))
        launcher(signals.device)(
            "weigh",
            (1, 1),
            min(-(-len(signals) // 32) * 32, WEIGH_THREADS),
            *(0 if x is None else x.data_ptr() for x in read),
            *(x.data_ptr() for x in (weights, statistics, plan)),
            len(signals),
            get_args(WeightStrategy).index(weighting.strategy),
            1.0 if isinstance(r, Tensor) else float(r),
            float(weighting.delta),
            float(weighting.largest_score),
            float(weighting.top_share),
            float(weighting.target_ess or 0),
            float(weighting.max_weight or math.inf),
            RANGE_QUANTILE if weighting.range == "quantile" else 0.0,
        )
        return UnitWeights(weights, statistics, plan)


def _kernel(name: str, logits: Tensor, *variant: bool) -> str:
    if logits.dtype not in _TYPES:
        raise ValueError(f"the CUDA kernels take no {logits.dtype} logits: use backend torch")
    arguments = [_TYPES[logits.dtype], *(str(flag).lower() for flag in variant)]
    return f"{name}<{', '.join(arguments)}>"


def _strided(tensor: Tensor) -> tuple[int, ...]:
    """Address and strides in elements, as the kernels take them."""
    return (tensor.data_ptr(), *tensor.stride())
