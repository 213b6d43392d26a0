"""The passes that a fused output layer needs beside those of the cross-entropy.

With ℓ = log Σ_v exp(z'_v) over the columns of this shard, and z' the capped logits,

    q_v = exp(z'_v − ℓ)·(1 − (z'_v/c)²)                       probabilities within the shard
    q_y ← q_y − (1 − (z'_y/c)²)·exp(lse − ℓ)/(1 + 2ζ·lse)     at the target
    s   = (1 + 2ζ·lse)·exp(ℓ − lse)

make s·q the gradient of a token's loss with respect to its logits. q is known as soon as the
shard's logits are, s not before the shards have exchanged their statistics; without tensor
parallelism and z-loss s is 1. Where exp(lse − ℓ) is beyond `largest_ratio`, all probability of the
shard is lost beside the target: q is then −(1 − (z'_y/c)²) there, 0 elsewhere, and s is 1.
"""

from __future__ import annotations

import functools
import math
from typing import Protocol

import torch
from torch import Tensor

from megatron_rw.kernels.options import CrossEntropyOptions, Shard
from megatron_rw.kernels.selection import BackendName

# log of the largest exp(lse − ℓ) that is written into a matrix of that dtype, which leaves room for
# weights in a product with it. Beyond, at most exp(−that) of the probability is left out: in fp16,
# with its few exponents, less than what it rounds by.
_LARGEST_EXPONENT = {
    torch.float16: 8.0,
    torch.bfloat16: 80.0,
    torch.float32: 80.0,
    torch.float64: 700.0,
}


def largest_ratio(dtype: torch.dtype) -> float:
    """What exp(lse − ℓ) may be for the target to be written among probabilities of a dtype."""
    return math.exp(_LARGEST_EXPONENT[dtype])


class ProbabilityBackend(Protocol):
    """Row passes over a shard's logits `[s, b, v]`, contiguous, and over matrices of hidden size.

    Targets are `[s, b]` int64, labels in the whole vocabulary, or `options.ignore_index`.
    """

    def probabilities(
        self, logits: Tensor, target: Tensor, shard: Shard, options: CrossEntropyOptions
    ) -> Tensor:
        """Overwrite the logits with q, the target not yet subtracted.

        Zeros in padding and in rows of ignored tokens. What is not finite, as in a row without a
        finite logit, is left to `subtract_targets`.

        Returns:
            `[1, 3, s, b]` fp32 (fp64 where the logits are), as `CrossEntropyBackend.statistics`.
        """

    def subtract_targets(
        self,
        probabilities: Tensor,
        table: Tensor,
        target: Tensor,
        lse: Tensor,
        shard: Shard,
        options: CrossEntropyOptions,
    ) -> Tensor:
        """Subtract the target from q, in place.

        Rows whose sum is not finite become zeros: q goes through matrix products, where 0·NaN is
        NaN.

        Args:
            probabilities: what `probabilities` left, `[s, b, v]`.
            table: what it returned.
            target: see above.
            lse: `[s, b]` over the whole vocabulary.
            shard: which columns take part.
            options: as for `probabilities`.

        Returns:
            s, `[s, b]` in the dtype of `lse`: 0 for ignored tokens, NaN where the loss is not
            finite.
        """

    def scale_rows(self, matrix: Tensor, scale: Tensor, out: Tensor) -> None:
        """`out = diag(scale)·matrix`, rounded once; rows of literal zeros where the scale is 0.

        Args:
            matrix: `[n, h]`, contiguous, of the dtype of `out` or fp32 (fp64 for fp64).
            scale: `[n]` fp32 (fp64 for fp64).
            out: `[n, h]`, contiguous; may be `matrix`.
        """


@functools.cache
def probability_backend(name: BackendName) -> ProbabilityBackend:
    """The backend of that name; imports what it needs."""
    if name == "triton":
        from megatron_rw.kernels.triton_probabilities import TritonProbabilities

        return TritonProbabilities()
    if name == "cuda":
        from megatron_rw.kernels.cuda_probabilities import CudaProbabilities

        return CudaProbabilities()
    from megatron_rw.kernels.torch_probabilities import TorchProbabilities

    return TorchProbabilities()
