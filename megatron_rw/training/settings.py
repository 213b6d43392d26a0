"""The settings of a run, by subject: the source of our flags, their help and their checks."""

from __future__ import annotations

import dataclasses
from argparse import Namespace
from dataclasses import dataclass, field
from typing import Literal

from megatron_rw.errors import UserError
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
    """Save memory: compute the output layer and its cross-entropy in parts of the vocabulary, which
    take no more than --logits-budget-mib. Backward computes the logits again."""

    logits_budget_mib: int | None = None
    """MiB that --fused-linear-cross-entropy may take for the logits of a micro-batch and for what
    goes with them."""

    reweight_kernels: Literal["auto", "torch", "cuda"] = "auto"
    """Implementation of the fused cross-entropies and of the weighting. auto: what the environment
    variable MEGATRON_RW_KERNELS names, otherwise cuda on a GPU and torch elsewhere."""

    def __post_init__(self) -> None:
        """Checks that output layer and budget are given together; raises `UserError`."""
        if not self.fused_linear_cross_entropy:
            if self.logits_budget_mib is not None:
                raise UserError(
                    "--logits-budget-mib without --fused-linear-cross-entropy does nothing."
                )
        elif self.logits_budget_mib is None:
            raise UserError(
                "--fused-linear-cross-entropy saves memory within a budget: add "
                "--logits-budget-mib MIB. Where the logits fit, --cross-entropy-impl fused is the "
                "fast path: give that in its place."
            )
        elif self.logits_budget_mib <= 0:
            raise UserError(f"--logits-budget-mib must be above 0, not {self.logits_budget_mib}.")

    @property
    def logits_budget(self) -> int | None:
        """The bytes that logits may take; None where the output layer is not fused."""
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
    def uses_kernels(self) -> bool:
        """Whether weights or losses are computed by our kernels."""
        ours = self.kernels.cross_entropy_impl == "fused" or self.kernels.fused_linear_cross_entropy
        return ours or self.reweight.enabled or self.monitoring.log_logit_scale

    @property
    def wants_entropy(self) -> bool:
        """Whether weights follow the entropy of predictions, which our cross-entropy computes."""
        return self.reweight.signal == "entropy"

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
