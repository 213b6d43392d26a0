"""Shapes of what the CUDA operators return, for `torch.compile` and FakeTensor.

Importing this needs the operators, see `cuda_library.load`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_rw.kernels.weights import Statistic

# Tokens of a sample that one block joins: kChunk in csrc/kernels.h.
CHUNK = 8192


@torch.library.register_fake("megatron_rw_cuda::statistics")
def _statistics(
    logits: Tensor,
    target: Tensor,
    start: int,
    columns: int,
    ignore_index: int,
    softcap: float,
    with_sum: bool,
    threads: int,
    block_columns: int,
) -> Tensor:
    sequence, batch, _ = logits.shape
    parts = -(-columns // block_columns)
    return logits.new_empty(parts, 4 if with_sum else 3, sequence, batch, dtype=torch.float32)


@torch.library.register_fake("megatron_rw_cuda::merge")
def _merge(tables: Tensor) -> Tensor:
    return tables.new_empty(1, *tables.shape[1:])


@torch.library.register_fake("megatron_rw_cuda::combine")
def _combine(
    tables: Tensor,
    target: Tensor,
    loss_mask: Tensor | None,
    vocab_size: int,
    ignore_index: int,
    z_loss: float,
    smoothing: float,
) -> tuple[Tensor, Tensor, Tensor]:
    _, _, sequence, batch = tables.shape
    chunks = 0 if loss_mask is None else -(-sequence // CHUNK)
    losses = tables.new_empty(sequence, batch)
    return losses, torch.empty_like(losses), tables.new_empty(2, chunks, batch)


@torch.library.register_fake("megatron_rw_cuda::gradient")
def _gradient(
    logits: Tensor,
    target: Tensor,
    lse: Tensor,
    upstream: Tensor,
    start: int,
    columns: int,
    ignore_index: int,
    softcap: float,
    z_loss: float,
    smoothing: float,
    uniform: float,
    threads: int,
    block_columns: int,
    out: Tensor,
) -> None:
    return None


@torch.library.register_fake("megatron_rw_cuda::probabilities")
def _probabilities(
    logits: Tensor,
    target: Tensor,
    start: int,
    columns: int,
    ignore_index: int,
    softcap: float,
    threads: int,
) -> Tensor:
    return logits.new_empty(1, 3, *logits.shape[:2], dtype=torch.float32)


@torch.library.register_fake("megatron_rw_cuda::subtract_targets")
def _subtract_targets(
    probabilities: Tensor,
    table: Tensor,
    target: Tensor,
    lse: Tensor,
    start: int,
    columns: int,
    ignore_index: int,
    softcap: float,
    z_loss: float,
    largest_ratio: float,
) -> Tensor:
    return torch.empty_like(lse)


@torch.library.register_fake("megatron_rw_cuda::scale_rows")
def _scale_rows(matrix: Tensor, scale: Tensor, out: Tensor) -> None:
    return None


@torch.library.register_fake("megatron_rw_cuda::weigh")
def _weigh(
    losses: Tensor,
    mask: Tensor | None,
    given_range: Tensor | None,
    temperature_tensor: Tensor | None,
    temperature: float,
    strategy: int,
    delta: float,
    largest_score: float,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(losses), losses.new_empty(len(Statistic))
