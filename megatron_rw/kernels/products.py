"""Matrix products that add to a result of more bits than their operands have."""

import torch
from torch import Tensor

# Of an operand at a time, where the CPU has to widen it first.
WIDENED_ELEMENTS = 1 << 19


def add_product(into: Tensor, left: Tensor, right: Tensor) -> None:
    """`into += left·right`, with all sums in the dtype of `into`.

    Args:
        into: `[m, n]`, contiguous, fp32 for fp16 and bf16 operands, otherwise of their dtype.
        left: `[m, k]`, any strides.
        right: `[k, n]`, any strides.
    """
    if into.dtype == left.dtype:
        into.addmm_(left, right)
    elif into.is_cuda:
        # The matrix product itself adds in fp32, without a product of its own in memory.
        torch.addmm(into, left, right, out_dtype=into.dtype, out=into)
    else:
        step = max(1, WIDENED_ELEMENTS // max(into.shape))
        for part, piece in zip(left.split(step, dim=1), right.split(step), strict=True):
            into.addmm_(part.to(into.dtype), piece.to(into.dtype))
