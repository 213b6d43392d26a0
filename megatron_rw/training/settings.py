"""The settings of a run, by subject: the source of our flags, their help and their checks."""

from __future__ import annotations

import dataclasses
from argparse import Namespace
from dataclasses import dataclass, field
from typing import Literal

from megatron_rw.observability.config import MonitoringConfig
from megatron_rw.platform import Device
from megatron_rw.resilience.saving import CheckpointConfig
from megatron_rw.resilience.step_guard import NonFiniteConfig
from megatron_rw.reweighting import ReweightConfig


@dataclass(frozen=True, kw_only=True)
class DeviceConfig:
    """Where the program runs."""

    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto: CUDA when a device is visible, otherwise the CPU over gloo."""


@dataclass(frozen=True, kw_only=True)
class KernelConfig:
    """Which implementations compute the loss and the weights."""

    cross_entropy_impl: Literal["megatron", "fused"] = "megatron"
    """megatron: core's cross-entropy, which --cross-entropy-loss-fusion varies. fused: ours, which
    reads the logits once forward and overwrites them with their gradient backward."""

    fused_linear_cross_entropy: bool = False
    """Compute the output layer and the cross-entropy of its logits as one operation: no backward
    pass over the logits, no second buffer of their size, none at all during evaluation."""

    logits_budget_mib: int | None = None
    """MiB that --fused-linear-cross-entropy may take for the logits of a micro-batch. Where they do
    not fit, backward computes them again in parts of the vocabulary. No limit by default."""

    reweight_kernels: Literal["auto", "torch", "triton", "cuda"] = "auto"
    """Implementation of the fused cross-entropies and of the weighting. cuda is built with nvcc at
    first use. auto: what the environment variable MEGATRON_RW_KERNELS names, otherwise triton on a
    GPU and torch elsewhere."""

    @property
    def logits_budget(self) -> int | None:
        """The budget of --logits-budget-mib in bytes."""
        return None if self.logits_budget_mib is None else self.logits_budget_mib << 20


# The dataclasses whose fields are flags under their own name, in the order of --help.
CONFIGS = (DeviceConfig, KernelConfig, CheckpointConfig, NonFiniteConfig, MonitoringConfig)
# Before the names of ReweightConfig's fields.
REWEIGHT_PREFIX = "reweight"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All settings of a run."""

    megatron: Namespace  # Megatron's own flags, validated once `parse_args` has returned.
    device: Device
    reweight: ReweightConfig = field(default_factory=ReweightConfig)
    kernels: KernelConfig = field(default_factory=KernelConfig)
    checkpoints: CheckpointConfig = field(default_factory=CheckpointConfig)
    nonfinite: NonFiniteConfig = field(default_factory=NonFiniteConfig)
    monitoring: MonitoringConfig = field(default_factory=MonitoringConfig)

    @property
    def megatron_decides(self) -> bool:
        """Whether Megatron's rerun state machine judges a step that is not finite.

        It runs such a step again to tell a faulty GPU from a faulty sample, and then ends the run.
        We only explain it.
        """
        args = self.megatron
        return bool(
            args.check_for_nan_in_loss_and_grad
            and self.nonfinite.on_nonfinite == "raise"
            and args.rerun_mode != "disabled"
        )

    @classmethod
    def of(cls, args: Namespace, device: Device) -> Settings:
        """Builds and checks the settings from parsed arguments."""
        return cls(
            megatron=args,
            device=device,
            reweight=_read(ReweightConfig, args, f"{REWEIGHT_PREFIX}_"),
            kernels=_read(KernelConfig, args),
            checkpoints=_read(CheckpointConfig, args),
            nonfinite=_read(NonFiniteConfig, args),
            monitoring=_read(MonitoringConfig, args),
        )


def _read[Config](config: type[Config], args: Namespace, prefix: str = "") -> Config:
    names = [each.name for each in dataclasses.fields(config)]  # type: ignore[arg-type]
    return config(**{name: getattr(args, prefix + name) for name in names})
