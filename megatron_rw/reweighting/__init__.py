"""The method: strategies, temperature, sample losses, weights and their metrics.

It imports torch and our kernels only, not Megatron or the training program, so that another program
can use it by itself.
"""

from megatron_rw.errors import UserError as ConfigError
from megatron_rw.kernels.sums import SampleSums, sample_sums
from megatron_rw.kernels.torch_weights import effective_sample_size
from megatron_rw.kernels.weights import loss_weights
from megatron_rw.reweighting.config import ReweightConfig, temperature_at
from megatron_rw.reweighting.metrics import (
    DomainLosses,
    DomainReport,
    LossByDomain,
    ReweightReport,
    WeightMetrics,
)
from megatron_rw.reweighting.samples import ReduceGroup, SampleSet, gather_samples
from megatron_rw.reweighting.scopes import (
    DeferredReweighter,
    Observer,
    Reweighter,
    WeightedSet,
    make_reweighter,
)

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
    "SampleSet",
    "SampleSums",
    "WeightMetrics",
    "WeightedSet",
    "effective_sample_size",
    "gather_samples",
    "loss_weights",
    "make_reweighter",
    "sample_sums",
    "temperature_at",
]
