"""Both backends of `weigh_samples` against the fp64 oracle: weights, statistics, given ranges."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_rw.kernels import SampleWeights, Statistic, weigh_samples
from tests.kernels import BACKENDS, DEVICE
from tests.reweighting import oracle


def spread_losses(count: int, seed: int = 0) -> Tensor:
    """Losses as training has them, with a tie at the top."""
    losses = torch.rand(count, generator=torch.Generator().manual_seed(seed)) * 6 + 1
    losses[-1] = losses.max()
    return losses.to(DEVICE)


def check(result: SampleWeights, losses: Tensor, mask: Tensor | None, weights: list[float]) -> None:
    """Weights are the oracle's, and statistics, as `Statistic` says, those in fp64 of them."""
    keep = torch.isfinite(losses) if mask is None else torch.isfinite(losses) & mask
    wanted = torch.tensor(weights, dtype=torch.float64, device=DEVICE)
    active, total = losses[keep].double(), wanted.sum()
    share = wanted / total.clamp(min=1e-300)
    squares = share.square().sum()
    moments: list[Any] = [math.inf, -math.inf, 0.0, 0.0]
    if keep.any():
        moments = [active.min(), active.max(), active.mean(), active.var(correction=0)]
    ess = 1 / squares if keep.any() else 0.0
    objective = (share[keep] * active).sum()
    statistics = [keep.sum(), *moments, total, ess, share.max(), objective]
    assert result.weights.dtype == torch.float32
    assert not result.weights[~keep].any()
    made = torch.tensor(statistics, dtype=torch.float64, device=DEVICE)
    for found, exactly in ((result.weights, wanted), (result.statistics, made)):
        torch.testing.assert_close(found.double(), exactly, rtol=2e-5, atol=1e-7)


# One sample, one warp, a ragged last block, and the most that a single launch is meant for.
@pytest.mark.parametrize("count", [1, 2, 37, 300, 5000, 65536])
@pytest.mark.parametrize("strategy", oracle.STRATEGIES)
def test_weights_and_statistics_are_the_oracles(strategy: Any, count: int, name: Any) -> None:
    losses = spread_losses(count)
    for r in (0.4, 100.0, torch.tensor(0.7, device=DEVICE)):
        result = weigh_samples(losses, strategy, r, backend_name=name)
        weights = oracle.weights(losses.tolist(), strategy, float(r), 1.0, [True] * count)
        check(result, losses, None, weights)


# On a grid: losses nearer than fp32 can tell apart may land on either side of the range that counts
# as collapsed.
a_loss = st.one_of(
    st.integers(0, 160).map(lambda eighths: eighths / 8),
    st.sampled_from([math.nan, math.inf, -math.inf, 3.0]),
)


@settings(max_examples=40)
@given(
    st.lists(st.tuples(a_loss, st.booleans()), min_size=1, max_size=20),
    st.sampled_from(oracle.STRATEGIES),
    st.sampled_from([0.5, 2.0]),
    st.sampled_from(BACKENDS),
)
def test_masked_and_nonfinite_samples_weigh_nothing(
    samples: list[tuple[float, bool]], strategy: Any, delta: float, name: Any
) -> None:
    losses = torch.tensor([loss for loss, _ in samples], device=DEVICE)
    mask = torch.tensor([keep for _, keep in samples], device=DEVICE)
    active = [keep and math.isfinite(loss) for loss, keep in samples]
    result = weigh_samples(losses, strategy, 0.7, delta, mask, backend_name=name)
    check(result, losses, mask, oracle.weights(losses.tolist(), strategy, 0.7, delta, active))


@pytest.mark.parametrize("strategy", oracle.STRATEGIES)
def test_range_that_is_given(strategy: Any, name: Any) -> None:
    losses = spread_losses(301)
    losses[7] = math.nan
    mask = torch.arange(301, device=DEVICE) % 5 > 0
    # Narrower than the losses, so that both ends are clamped.
    low, high, r, delta = 2.0, 5.0, 0.4, 1.5
    bounds = torch.tensor([low, high])
    # Of any strides.
    bounds = torch.stack([bounds, bounds + 9], dim=1)[:, 0]
    result = weigh_samples(losses, strategy, r, delta, mask, bounds, backend_name=name)
    h_max = {"uniform": 0.0, "quadratic": 1.0}.get(strategy, delta)

    def weight(loss: float) -> float:
        u = min(max(2 * delta * (loss - low) / (high - low) - delta, -delta), delta)
        return math.exp((oracle.score(u, strategy, delta) - h_max) / r)

    samples = zip(losses.tolist(), mask.tolist(), strict=True)
    weights = [weight(loss) if keep and loss == loss else 0.0 for loss, keep in samples]
    check(result, losses, mask, weights)


def test_collapsed_ranges_make_equal_weights(name: Any) -> None:
    losses = spread_losses(5)
    for values, bounds in (
        (losses, torch.tensor([math.inf, -math.inf])),  # Of an empty set.
        (losses, torch.tensor([3.0, 3.0])),
        (torch.full_like(losses, 2.5), None),
    ):
        how = {"given_range": bounds, "backend_name": name}
        assert len(set(weigh_samples(values, "extremes", 1.0, **how).weights.tolist())) == 1


@pytest.mark.parametrize("count", [0, 2])
def test_empty_sets(count: int, name: Any) -> None:
    losses = torch.tensor([math.nan, 2.0], device=DEVICE)[:count]
    nobody = torch.tensor([True, False], device=DEVICE)[:count]
    result = weigh_samples(losses, "linupper", 1.0, mask=nobody, backend_name=name)
    assert result.weights.tolist() == [0.0] * count
    assert result.statistics.tolist() == [0, math.inf, -math.inf, 0, 0, 0, 0, 0, 0]


def test_sums_over_many_samples_keep_their_digits(name: Any) -> None:
    # Equal, so that roundings of a running sum all go one way.
    losses = torch.full((65536,), 1.1, device=DEVICE)
    losses[:64] = 7.3
    statistics = weigh_samples(losses, "uniform", 1.0, backend_name=name).statistics
    exact = losses.double()
    wanted = torch.stack([exact.mean(), exact.var(correction=0), exact.mean()])
    places = [Statistic.MEAN, Statistic.VARIANCE, Statistic.OBJECTIVE]
    torch.testing.assert_close(statistics[places].double(), wanted, rtol=1e-6, atol=0)


def test_sharp_temperature_does_not_overflow(name: Any) -> None:
    losses = torch.arange(4.0, device=DEVICE)
    result = weigh_samples(losses, "extremes", 1e-4, backend_name=name)
    assert result.weights.tolist() == [0.5, 0.0, 0.0, 0.5]


def test_results_repeat_bit_for_bit(name: Any) -> None:
    losses = spread_losses(20_000)
    first, second = (weigh_samples(losses, "quadratic", 0.4, backend_name=name) for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_captured_in_a_cuda_graph_without_asking_the_host(name: Any) -> None:
    losses, r = spread_losses(4096), torch.tensor(1.0, device=DEVICE)
    with torch.cuda.stream(torch.cuda.Stream()):
        weigh_samples(losses, "linupper", r, backend_name=name)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = weigh_samples(losses, "linupper", r, backend_name=name)
    losses.copy_(spread_losses(4096, seed=1))
    r.fill_(0.4)
    graph.replay()
    weights = oracle.weights(losses.tolist(), "linupper", 0.4, 1.0, [True] * 4096)
    check(result, losses, None, weights)
