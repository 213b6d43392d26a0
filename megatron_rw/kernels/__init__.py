"""Kernels of the method and of the loss it is made from: one interface, two backends."""

from megatron_rw.kernels.cross_entropy import CrossEntropy, vocab_parallel_cross_entropy
from megatron_rw.kernels.linear_cross_entropy import linear_weighted_cross_entropy
from megatron_rw.kernels.logits_plan import BudgetError, LogitsPlan, plan_logits
from megatron_rw.kernels.options import (
    CrossEntropyOptions,
    Plan,
    Statistic,
    Units,
    UnitWeights,
    Weighting,
)
from megatron_rw.kernels.sums import SampleSums, sample_sums
from megatron_rw.kernels.weights import loss_weights, weigh_units

__all__ = [
    "BudgetError",
    "CrossEntropy",
    "CrossEntropyOptions",
    "LogitsPlan",
    "Plan",
    "SampleSums",
    "Statistic",
    "UnitWeights",
    "Units",
    "Weighting",
    "linear_weighted_cross_entropy",
    "loss_weights",
    "plan_logits",
    "sample_sums",
    "vocab_parallel_cross_entropy",
    "weigh_units",
]
