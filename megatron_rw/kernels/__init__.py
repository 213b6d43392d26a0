"""Kernels of the method and of the loss it is made from: one interface, several backends."""

from megatron_rw.kernels.cross_entropy import vocab_parallel_cross_entropy
from megatron_rw.kernels.options import CrossEntropyOptions

__all__ = ["CrossEntropyOptions", "vocab_parallel_cross_entropy"]
