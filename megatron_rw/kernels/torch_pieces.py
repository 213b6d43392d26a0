"""Helpers of the torch backend: logits a few rows at a time, targets, rows of zeros."""

import torch
from torch import Tensor

from megatron_rw.kernels.options import CrossEntropyOptions, Shard

# Logits at a time. 2 MiB in fp32 stay in a processor's cache; with smaller pieces the work between
# two of them would take a noticeable share of the time.
CHUNK_ELEMENTS = 1 << 19


def computed_in(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64, fp32 for what has fewer bits."""
    return torch.promote_types(dtype, torch.float32)


def local_columns(
    target: Tensor, shard: Shard, options: CrossEntropyOptions
) -> tuple[Tensor, Tensor]:
    """Each target's column in the shard, `[s, b, 1]`, and whether it has one, `[s, b]`."""
    column = target.contiguous() - shard.start
    here = (column >= 0) & (column < shard.columns) & (target != options.ignore_index)
    return column.where(here, 0).unsqueeze(-1), here


def clear_rows(matrix: Tensor, rows: Tensor) -> None:
    """Put literal zeros into rows, as 0·NaN is NaN.

    Args:
        matrix: `[n, v]`.
        rows: `[n, 1]` bool.
    """
    # A device is not asked whether there are any, which would make the host wait.
    if matrix.is_cuda:
        matrix.masked_fill_(rows, 0.0)
    elif rows.any():
        matrix[rows.squeeze(-1)] = 0.0


class Scratch:
    """Memory for one piece at a time, kept: the allocator may give pages back after every use.

    Args:
        pieces: `[n, ·]` each, the first the longest.
    """

    def __init__(self, pieces: list[Tensor]) -> None:
        self._single = [
            torch.empty(piece.shape, dtype=computed_in(piece.dtype), device=piece.device)
            for piece in pieces[:1] * 2
        ]

    def read(self, piece: Tensor) -> Tensor:
        """The piece in fp32 (fp64 where it is)."""
        if piece.dtype == computed_in(piece.dtype):
            return piece
        return self._single[0][: len(piece)].copy_(piece)

    def space(self, z: Tensor, number: int = 1) -> Tensor:
        """As large as `z`; number 0 is what `read` returns, where that is a copy."""
        return self._single[number][: len(z)]


def cut_pieces(logits: Tensor, *others: Tensor) -> list[list[Tensor]]:
    """Cut tensors `[s, b, ·]` alike into views `[n, ·]` of about CHUNK_ELEMENTS logits each."""
    tensors = [logits, *others]
    rows = max(1, CHUNK_ELEMENTS // max(1, logits.shape[-1]))
    if all(_is_one_run(tensor) for tensor in tensors):
        return [list(tensor.view(-1, tensor.shape[-1]).split(rows)) for tensor in tensors]
    return [[piece for part in tensor for piece in part.split(rows)] for tensor in tensors]


def _is_one_run(tensor: Tensor) -> bool:
    """Whether `[s, b, ·]` can be viewed as `[s·b, ·]`."""
    sequence, batch, _ = tensor.shape
    return min(sequence, batch) == 1 or tensor.stride(0) == batch * tensor.stride(1)
