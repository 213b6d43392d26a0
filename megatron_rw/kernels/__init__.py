"""Kernels of the method and of the loss it is made from: one interface, several backends."""

from megatron_rw.kernels.cross_entropy import (
    vocab_parallel_cross_entropy,
    vocab_parallel_cross_entropy_sums,
)
from megatron_rw.kernels.options import CrossEntropyOptions
from megatron_rw.kernels.sums import SampleSums, sample_sums
from megatron_rw.kernels.weights import SampleWeights, Statistic, loss_weights, weigh_samples

__all__ = [
    "CrossEntropyOptions",
    "SampleSums",
    "SampleWeights",
    "Statistic",
    "loss_weights",
    "sample_sums",
    "vocab_parallel_cross_entropy",
    "vocab_parallel_cross_entropy_sums",
    "weigh_samples",
]
