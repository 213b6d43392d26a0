"""Sample weights from sample losses: equations 1 to 4 of the method, on one set of samples.

    u_i = 2δ·(l_i − l_min)/(l_max − l_min) − δ
    h_i = 0 | min(u_i + δ, δ) | 1 − u_i²/δ² | |u_i|     (uniform|linupper|quadratic|extremes)
    w_i = exp(h_i/r) / Σ_j exp(h_j/r)

Sow et al., arXiv 2502.06733. A sample outside the mask, or whose loss is not finite, has weight
exactly 0 and touches no other sample's weight. No gradient flows through the result and the host
never waits for the device.
"""

from __future__ import annotations

import math
from typing import get_args

import torch
from torch import Tensor

from megatron_rw.kernels.options import SampleWeights, Statistic, WeightStrategy
from megatron_rw.kernels.selection import BackendName, backend, default_backend


@torch.no_grad()
# The CUDA kernels are started behind the compiler's back.
@torch.compiler.disable
def weigh_samples(
    losses: Tensor,
    strategy: WeightStrategy,
    temperature: float | Tensor,
    delta: float = 1.0,
    mask: Tensor | None = None,
    given_range: Tensor | None = None,
    *,
    backend_name: BackendName | None = None,
) -> SampleWeights:
    """Weights and statistics of the samples of one set.

    With a range given, a weight depends on its own sample alone and is not normalised:
    `exp((h(u_i) − h_max)/r)`, u_i clamped to [−δ, δ]. `torch.compile` breaks its graph around it.

    Args:
        losses: `[n]`, float32 or float64, nats per token.
        strategy: `uniform`, `linupper`, `quadratic` or `extremes`.
        temperature: r > 0. As a scalar tensor it may change between replays of a CUDA graph; the
            host does not look at its value then.
        delta: δ > 0.
        mask: `[n]` bool, True for the samples of the set. All of them when None.
        given_range: `[2]` (l_min, l_max) to form u with. l_max below l_min, as in an empty set,
            makes all weights equal.
        backend_name: see `default_backend` when None; only torch takes float64.

    Raises:
        ValueError: not 1-D, another dtype (bf16 losses would quantise the weights), an unknown
            strategy, a temperature or δ that is not a finite number above 0.
    """
    _check(losses, strategy, temperature, delta, mask, given_range)
    if given_range is not None:
        given_range = given_range.to(losses).contiguous()
    if isinstance(temperature, Tensor):
        temperature = temperature.to(losses).reshape(())
    if len(losses) == 0:
        nothing = losses.new_zeros(len(Statistic))
        nothing[Statistic.LOW], nothing[Statistic.HIGH] = math.inf, -math.inf
        return SampleWeights(losses.clone(), nothing)
    name = backend_name or default_backend(losses.device, losses.dtype)
    return backend(name).weigh(losses, strategy, temperature, delta, mask, given_range)


def _check(
    losses: Tensor,
    strategy: WeightStrategy,
    temperature: float | Tensor,
    delta: float,
    mask: Tensor | None,
    given_range: Tensor | None,
) -> None:
    if losses.dim() != 1:
        raise ValueError(f"losses must be 1-D, one per sample, not of shape {tuple(losses.shape)}")
    if losses.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"losses must be float32 or float64, not {losses.dtype}: rounding them to fewer bits "
            "quantises the weights"
        )
    if strategy not in get_args(WeightStrategy):
        raise ValueError(f"strategy {strategy!r} gives no weights")
    for name, value in (("temperature", temperature), ("delta", delta)):
        if not isinstance(value, Tensor) and not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} must be a finite number above 0, not {value}")
    if isinstance(temperature, Tensor) and temperature.numel() != 1:
        raise ValueError(f"temperature must be one number, not {tuple(temperature.shape)}")
    if mask is not None and (mask.shape != losses.shape or mask.dtype != torch.bool):
        raise ValueError(
            f"mask must be bool, one for each of {len(losses)} losses, not {mask.dtype} of shape "
            f"{tuple(mask.shape)}"
        )
    if mask is not None and mask.device != losses.device:
        raise ValueError(f"mask must be on {losses.device}, not on {mask.device}")
    if given_range is not None and given_range.shape != (2,):
        raise ValueError(f"given_range must be [2], not of shape {tuple(given_range.shape)}")


def loss_weights(
    losses: Tensor,
    strategy: WeightStrategy,
    temperature: float | Tensor,
    delta: float = 1.0,
    mask: Tensor | None = None,
) -> Tensor:
    """Normalised weights alone: `[n]`, sums to 1, or to 0 when the set is empty.

    Arguments and errors are those of `weigh_samples`.
    """
    return weigh_samples(losses, strategy, temperature, delta, mask).weights
