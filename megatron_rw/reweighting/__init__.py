"""The method: strategies, temperature, sample losses, weights and their metrics.

It imports torch and our kernels only, not Megatron or the training program, so that another program
can use it by itself.
"""

from megatron_rw.errors import UserError as ConfigError
from megatron_rw.kernels.options import Units, UnitWeights, Weighting
from megatron_rw.kernels.sums import SampleSums, sample_sums
from megatron_rw.kernels.weights import loss_weights, weigh_units
from megatron_rw.reweighting.config import ReweightConfig, weighting_at
from megatron_rw.reweighting.metrics import (
    DomainLosses,
    DomainReport,
    LossByDomain,
    ReweightReport,
    WeightMetrics,
)
from megatron_rw.reweighting.scopes import (
    DeferredReweighter,
    Observer,
    Reweighter,
    make_reweighter,
)
from megatron_rw.reweighting.sets import WeightedSet
from megatron_rw.reweighting.units import ReduceGroup, TokenBatch, UnitSet, UnitSums

__all__ = [
    "ConfigError",
    "DeferredReweighter",
    "DomainLosses",
    "DomainReport",
    "LossByDomain",
    "Observer",
    "ReduceGroup",
    "ReweightConfig",
    "ReweightReport",
    "Reweighter",
    "SampleSums",
    "TokenBatch",
    "UnitSet",
    "UnitSums",
    "UnitWeights",
    "Units",
    "WeightMetrics",
    "WeightedSet",
    "Weighting",
    "loss_weights",
    "make_reweighter",
    "sample_sums",
    "weigh_units",
    "weighting_at",
]
