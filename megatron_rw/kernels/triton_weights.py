"""`weigh_samples` in one launch: a single program goes over the losses, which its cache holds."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from megatron_rw.kernels.weights import (
    COLLAPSED_RANGE,
    SampleWeights,
    Statistic,
    WeightStrategy,
    largest_score,
)

# Samples at a time, and how many of them a warp takes.
LARGEST_BLOCK, SAMPLES_PER_WARP, MOST_WARPS = 8192, 256, 16
UNIFORM, LINUPPER, QUADRATIC, EXTREMES = (tl.constexpr(code) for code in range(4))
_CODES: dict[WeightStrategy, int] = {
    "uniform": 0,
    "linupper": 1,
    "quadratic": 2,
    "extremes": 3,
}
_COLLAPSED = tl.constexpr(COLLAPSED_RANGE)


@triton.jit
def _load(losses, mask, count, start, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    """Losses of a block, 0 where a sample is not active, and whether it is."""
    offsets = start + tl.arange(0, BLOCK)
    inside = offsets < count
    loss = tl.load(losses + offsets, mask=inside, other=0.0)
    # Neither NaN nor infinite.
    active = inside & (tl.abs(loss) < float("inf"))
    if MASKED:
        active = active & (tl.load(mask + offsets, mask=inside, other=0) != 0)
    return tl.where(active, loss, 0.0), active, offsets, inside


@triton.jit
def _score(loss, low, high, delta, STRATEGY: tl.constexpr):
    spread = high - low
    wide = spread >= _COLLAPSED
    # Subtract before dividing: h = 2δl/range − … cancels when the range is small.
    u = 2.0 * delta * ((loss - low) / tl.where(wide, spread, 1.0)) - delta
    u = tl.where(wide, tl.minimum(tl.maximum(u, -delta), delta), 0.0)
    if STRATEGY == UNIFORM:
        score = u * 0.0
    elif STRATEGY == LINUPPER:
        score = tl.minimum(u + delta, delta)
    elif STRATEGY == QUADRATIC:
        score = 1.0 - (u / delta) * (u / delta)
    else:
        score = tl.abs(u)
    return score


@triton.jit
def _weigh_kernel(
    losses,
    mask,
    given_range,
    temperature,
    weights,
    statistics,
    count,
    delta,
    largest_score,
    STRATEGY: tl.constexpr,
    MASKED: tl.constexpr,
    GIVEN: tl.constexpr,
    TEMPERATURE_ON_DEVICE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    r = tl.load(temperature).to(tl.float32) if TEMPERATURE_ON_DEVICE else temperature
    low = float("inf")
    high = -float("inf")
    number = 0.0
    loss_sum = 0.0
    for start in range(0, count, BLOCK):
        loss, active, _, _ = _load(losses, mask, count, start, MASKED, BLOCK)
        low = tl.minimum(low, tl.min(tl.where(active, loss, float("inf")), axis=0))
        high = tl.maximum(high, tl.max(tl.where(active, loss, -float("inf")), axis=0))
        number += tl.sum(active.to(tl.float32), axis=0)
        loss_sum += tl.sum(loss, axis=0)
    samples = tl.maximum(number, 1.0)
    mean = loss_sum / samples

    if GIVEN:
        range_low = tl.load(given_range)
        range_high = tl.load(given_range + 1)
        best = largest_score
    else:
        range_low = low
        range_high = high
        best = -float("inf")
    variance = 0.0
    for start in range(0, count, BLOCK):
        loss, active, _, _ = _load(losses, mask, count, start, MASKED, BLOCK)
        distance = tl.where(active, loss - mean, 0.0)
        variance += tl.sum(distance * distance, axis=0)
        if not GIVEN:
            # exp(0) for the best sample: no overflow at any temperature.
            score = _score(loss, range_low, range_high, delta, STRATEGY)
            best = tl.maximum(best, tl.max(tl.where(active, score, -float("inf")), axis=0))

    total = 0.0
    squares = 0.0
    largest = 0.0
    objective = 0.0
    for start in range(0, count, BLOCK):
        loss, active, offsets, inside = _load(losses, mask, count, start, MASKED, BLOCK)
        score = _score(loss, range_low, range_high, delta, STRATEGY)
        weight = tl.where(active, tl.exp((score - best) / r), 0.0)
        total += tl.sum(weight, axis=0)
        squares += tl.sum(weight * weight, axis=0)
        largest = tl.maximum(largest, tl.max(weight, axis=0))
        objective += tl.sum(weight * loss, axis=0)
        if GIVEN:
            tl.store(weights + offsets, weight, mask=inside)
    divisor = tl.where(total > 0, total, 1.0)

    if not GIVEN:
        for start in range(0, count, BLOCK):
            loss, active, offsets, inside = _load(losses, mask, count, start, MASKED, BLOCK)
            score = _score(loss, range_low, range_high, delta, STRATEGY)
            weight = tl.where(active, tl.exp((score - best) / r), 0.0)
            tl.store(weights + offsets, weight / divisor, mask=inside)

    tl.store(statistics, number)
    tl.store(statistics + 1, low)
    tl.store(statistics + 2, high)
    tl.store(statistics + 3, mean)
    tl.store(statistics + 4, variance / samples)
    tl.store(statistics + 5, total if GIVEN else total / divisor)
    tl.store(statistics + 6, tl.where(squares > 0, total * (total / squares), 0.0))
    tl.store(statistics + 7, largest / divisor)
    tl.store(statistics + 8, objective / divisor)


def weigh(
    losses: Tensor,
    strategy: WeightStrategy,
    temperature: float | Tensor,
    delta: float,
    mask: Tensor | None,
    given_range: Tensor | None,
) -> SampleWeights:
    """See `weigh_samples`; float32, not empty.

    Raises:
        ValueError: the losses are float64.
    """
    if losses.dtype.itemsize != 4:
        raise ValueError("the Triton backend weighs float32 losses; float64 needs backend torch")
    losses = losses.contiguous()
    weights = losses.new_empty(losses.shape)
    statistics = losses.new_empty(len(Statistic))
    count = losses.numel()
    on_device = isinstance(temperature, Tensor)
    block = min(LARGEST_BLOCK, triton.next_power_of_2(count))
    _weigh_kernel[(1,)](
        losses,
        losses if mask is None else mask.contiguous(),
        losses if given_range is None else given_range,
        temperature if on_device else float(temperature),
        weights,
        statistics,
        count,
        float(delta),
        largest_score(strategy, float(delta)),
        STRATEGY=_CODES[strategy],
        MASKED=mask is not None,
        GIVEN=given_range is not None,
        TEMPERATURE_ON_DEVICE=on_device,
        BLOCK=block,
        num_warps=min(MOST_WARPS, max(1, block // SAMPLES_PER_WARP)),
    )
    return SampleWeights(weights, statistics)
