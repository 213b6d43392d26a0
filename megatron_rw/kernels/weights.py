"""Weights from signals: equations 1 to 4 of the method and what goes beyond the paper, on one set.

    u_x = 2δ·(s_x − s_min)/(s_max − s_min) − δ
    h_x = 0 | min(u_x + δ, δ) | 1 − u_x²/δ² | |u_x| | s_x
          (uniform|linupper|quadratic|extremes|softmax)
    w_x = b_x·exp(h_x/r) / Σ_y b_y·exp(h_y/r)

Sow et al., arXiv 2502.06733, where s_x is the loss of a sample and b_x is 1. Strategy `topk` gives
w_x = b_x/Σ b_y to the share k of the units with the largest signals, and 0 to the others. A unit
outside the mask, or whose signal is not finite, has weight exactly 0 and touches no other unit's
weight. No gradient flows through the result and the host never waits for the device.
"""

import math

import torch
from torch import Tensor

from megatron_rw.kernels.options import (
    Plan,
    Statistic,
    Units,
    UnitWeights,
    Weighting,
    WeightStrategy,
)
from megatron_rw.kernels.selection import BackendName, backend, default_backend
from megatron_rw.kernels.torch_weights import competing, planned_exponents


@torch.no_grad()
# The CUDA kernels are started behind the compiler's back.
@torch.compiler.disable
def weigh_units(
    units: Units,
    weighting: Weighting,
    given: Tensor | None = None,
    *,
    backend_name: BackendName | None = None,
) -> UnitWeights:
    """Weights, statistics and plan of one set.

    With a plan given, a weight depends on its own unit alone and is not normalised:
    `b·exp(min((h(u) − h_max)/r, level))`, u clamped to [−δ, δ]. `torch.compile` breaks its graph
    around it.

    Args:
        units: see `Units`.
        weighting: see `Weighting`.
        given: `[5]`, the plan of another set; see `Plan`. One whose high end is below its low end,
            as that of an empty set, weighs all alike.
        backend_name: see `default_backend` when None; only torch takes float64.

    Raises:
        ValueError: not 1-D, another dtype (bf16 signals would quantise the weights), or arguments
            that do not fit each other.
    """
    signals = units.signals
    _check(units, given)
    if given is not None:
        given = given.to(signals).contiguous()
    if len(signals) == 0:
        plan = signals.new_zeros(len(Plan))
        plan[Plan.LOW], plan[Plan.HIGH] = math.inf, -math.inf
        return UnitWeights(signals.clone(), signals.new_zeros(len(Statistic)), plan)
    name = backend_name or default_backend(signals.device, signals.dtype)
    return backend(name).weigh(units, weighting, given)


@torch.no_grad()
@torch.compiler.disable
def planned_weights(units: Units, weighting: Weighting, plan: Tensor) -> Tensor:
    """Weights that `weigh_units` gives with a plan, without statistics: `[n]`, not normalised."""
    if default_backend(units.signals.device, units.signals.dtype) == "cuda":
        # One kernel, though it makes a plan of these units too.
        return weigh_units(units, weighting, plan).weights
    signals, base, _ = competing(units)
    return base * planned_exponents(signals, weighting, plan.to(signals)).exp()


def _check(units: Units, given: Tensor | None) -> None:
    signals = units.signals
    if signals.dim() != 1:
        raise ValueError(f"signals must be 1-D, one per unit, not of shape {tuple(signals.shape)}")
    if signals.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"signals must be float32 or float64, not {signals.dtype}: rounding them to fewer bits "
            "quantises the weights"
        )
    for name, dtype in (("mask", torch.bool), ("base", signals.dtype), ("counts", signals.dtype)):
        tensor: Tensor | None = getattr(units, name)
        if tensor is None:
            continue
        if tensor.shape != signals.shape or tensor.dtype != dtype:
            raise ValueError(
                f"{name} must be {dtype}, one for each of {len(signals)} signals, not "
                f"{tensor.dtype} of shape {tuple(tensor.shape)}"
            )
        if tensor.device != signals.device:
            raise ValueError(f"{name} must be on {signals.device}, not on {tensor.device}")
    if given is not None and given.shape != (len(Plan),):
        raise ValueError(f"given must be [{len(Plan)}], not of shape {tuple(given.shape)}")


def loss_weights(
    losses: Tensor,
    strategy: WeightStrategy,
    temperature: float | Tensor,
    delta: float = 1.0,
    mask: Tensor | None = None,
) -> Tensor:
    """Normalised weights of samples by their losses: `[n]`, sums to 1, or to 0 of an empty set.

    Args:
        losses: `[n]` fp32 or fp64, nats per token.
        strategy: see the equations above; `topk` needs `weigh_units`, which has its share.
        temperature: r, above 1e-6; see `Weighting`.
        delta: δ > 0.
        mask: `[n]` bool, True for the samples of the set. All of them when None.

    Raises:
        ValueError: see `weigh_units` and `Weighting`.
    """
    weighting = Weighting(strategy=strategy, temperature=temperature, delta=delta)
    return weigh_units(Units(losses, mask), weighting).weights
