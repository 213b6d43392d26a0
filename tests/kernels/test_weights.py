"""Every backend of `weigh_samples` against the fp64 oracle: weights, statistics, given ranges.

Where there is no GPU, Triton's kernel runs under its interpreter and the CUDA one emulated.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_rw.kernels import SampleWeights, Statistic, weigh_samples
from tests.reweighting import oracle

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS: list[Any] = ["torch", "triton", "cuda"]
STRATEGIES: list[Any] = ["uniform", "linupper", "quadratic", "extremes"]
TOLERANCE: dict[str, Any] = {"rtol": 2e-5, "atol": 1e-7}


@pytest.fixture(params=BACKENDS)
def name(request: pytest.FixtureRequest) -> Any:
    return request.param


def spread_losses(count: int, seed: int = 0) -> Tensor:
    """Losses as training has them, with a tie at the top."""
    losses = torch.rand(count, generator=torch.Generator().manual_seed(seed)) * 6 + 1
    losses[-1] = losses.max()
    return losses


def wanted_statistics(losses: list[float], weights: list[float]) -> list[float]:
    """As `Statistic` says, in fp64, of active samples."""
    count = len(losses)
    mean = math.fsum(losses) / max(count, 1)
    squares = math.fsum(w * w for w in weights)
    return [
        count,
        min(losses, default=math.inf),
        max(losses, default=-math.inf),
        mean,
        math.fsum((loss - mean) ** 2 for loss in losses) / max(count, 1),
        math.fsum(weights),
        1 / squares if squares else 0.0,
        max(weights, default=0.0),
        math.fsum(w * loss for w, loss in zip(weights, losses, strict=True)),
    ]


def check(losses: Tensor, mask: Tensor | None, result: SampleWeights, *how: Any) -> None:
    """Weights and statistics are the oracle's."""
    used = [True] * len(losses) if mask is None else mask.tolist()
    active = [keep and math.isfinite(x) for x, keep in zip(losses.tolist(), used, strict=True)]
    strategy, temperature, delta = (*how, 1.0)[:3]
    expected = oracle.weights(losses.tolist(), strategy, temperature, delta, active)
    assert result.weights.dtype == torch.float32
    torch.testing.assert_close(
        result.weights.cpu().double(), torch.tensor(expected, dtype=torch.float64), **TOLERANCE
    )
    assert all(w == 0 for w, keep in zip(result.weights.tolist(), active, strict=True) if not keep)
    kept = [(x, w) for x, w, keep in zip(losses.tolist(), expected, active, strict=True) if keep]
    statistics = wanted_statistics([x for x, _ in kept], [w for _, w in kept])
    torch.testing.assert_close(
        result.statistics.cpu().double(), torch.tensor(statistics, dtype=torch.float64), **TOLERANCE
    )


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("temperature", [0.4, 1.0, 100.0])
# One sample, one block, a ragged last block, and the most that a single launch is meant for.
@pytest.mark.parametrize("count", [1, 2, 37, 8192 + 5, 65536])
def test_weights_and_statistics_are_the_oracles(
    strategy: Any, temperature: float, count: int, name: Any
) -> None:
    losses = spread_losses(count)
    result = weigh_samples(losses.to(DEVICE), strategy, temperature, backend_name=name)
    check(losses, None, result, strategy, temperature)


a_loss = st.one_of(
    st.floats(0.0, 20.0, width=32), st.sampled_from([math.nan, math.inf, -math.inf, 3.0])
)


@settings(max_examples=40)
@given(
    st.lists(st.tuples(a_loss, st.booleans()), min_size=1, max_size=20),
    st.sampled_from(STRATEGIES),
    st.sampled_from([0.5, 2.0]),
    st.sampled_from(BACKENDS),
)
def test_masked_and_nonfinite_samples_weigh_nothing(
    samples: list[tuple[float, bool]], strategy: Any, delta: float, name: Any
) -> None:
    # On a grid: losses nearer than fp32 can tell apart may land on either side of the range that
    # counts as collapsed.
    losses = torch.tensor([x if not math.isfinite(x) else round(x * 8) / 8 for x, _ in samples])
    mask = torch.tensor([keep for _, keep in samples])
    result = weigh_samples(
        losses.to(DEVICE), strategy, 0.7, delta, mask.to(DEVICE), backend_name=name
    )
    check(losses, mask, result, strategy, 0.7, delta)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_range_that_is_given(strategy: Any, name: Any) -> None:
    losses = spread_losses(301)
    losses[7] = math.nan
    mask = torch.arange(301) % 5 > 0
    # Narrower than the losses, so that both ends are clamped.
    low, high, r, delta = 2.0, 5.0, 0.4, 1.5
    result = weigh_samples(
        losses.to(DEVICE),
        strategy,
        r,
        delta,
        mask.to(DEVICE),
        torch.tensor([low, high]),
        backend_name=name,
    )
    h_max = {"uniform": 0.0, "quadratic": 1.0}.get(strategy, delta)
    u = [
        min(max(2 * delta * (x - low) / (high - low) - delta, -delta), delta)
        for x in losses.tolist()
    ]
    expected = [
        math.exp((oracle.score(v, strategy, delta) - h_max) / r) if keep and x == x else 0.0
        for v, x, keep in zip(u, losses.tolist(), mask.tolist(), strict=True)
    ]
    torch.testing.assert_close(
        result.weights.cpu().double(), torch.tensor(expected, dtype=torch.float64), **TOLERANCE
    )
    total = math.fsum(expected)
    active = [(x, w / total) for x, w in zip(losses.tolist(), expected, strict=True) if w > 0]
    statistics = wanted_statistics([x for x, _ in active], [w for _, w in active])
    statistics[Statistic.TOTAL] = total
    torch.testing.assert_close(
        result.statistics.cpu().double(), torch.tensor(statistics, dtype=torch.float64), **TOLERANCE
    )


def test_range_of_an_empty_set_makes_equal_weights(name: Any) -> None:
    nothing = torch.tensor([math.inf, -math.inf])
    losses = spread_losses(5).to(DEVICE)
    result = weigh_samples(losses, "extremes", 1.0, given_range=nothing, backend_name=name)
    assert len(set(result.weights.tolist())) == 1


def test_empty_sets(name: Any) -> None:
    losses = torch.tensor([math.nan, 2.0], device=DEVICE)
    nobody = torch.tensor([True, False], device=DEVICE)
    expected = [0, math.inf, -math.inf, 0, 0, 0, 0, 0, 0]
    result = weigh_samples(losses, "linupper", 1.0, mask=nobody, backend_name=name)
    assert result.weights.tolist() == [0.0, 0.0]
    assert result.statistics.tolist() == expected
    result = weigh_samples(losses[:0], "linupper", 1.0, backend_name=name)
    assert result.weights.tolist() == []
    assert result.statistics.tolist() == expected


def test_sums_over_many_samples_keep_their_digits(name: Any) -> None:
    # Equal, so that roundings of a running sum all go one way.
    losses = torch.full((65536,), 1.1)
    losses[:64] = 7.3
    statistics = weigh_samples(losses.to(DEVICE), "uniform", 1.0, backend_name=name).statistics
    exact = losses.double()
    wanted = torch.stack([exact.mean(), exact.var(correction=0), exact.mean()])
    places = [Statistic.MEAN, Statistic.VARIANCE, Statistic.OBJECTIVE]
    torch.testing.assert_close(statistics[places].cpu().double(), wanted, rtol=1e-6, atol=0)


def test_temperature_on_the_device(name: Any) -> None:
    losses = spread_losses(50).to(DEVICE)
    r = torch.tensor(0.7, device=DEVICE)
    result = weigh_samples(losses, "linupper", r, backend_name=name)
    check(losses.cpu(), None, result, "linupper", 0.7)


def test_sharp_temperature_does_not_overflow(name: Any) -> None:
    losses = torch.tensor([0.0, 1.0, 2.0, 3.0], device=DEVICE)
    result = weigh_samples(losses, "extremes", 1e-4, backend_name=name)
    assert result.weights.tolist() == [0.5, 0.0, 0.0, 0.5]


def test_results_repeat_bit_for_bit(name: Any) -> None:
    losses = spread_losses(20_000).to(DEVICE)
    first, second = (weigh_samples(losses, "quadratic", 0.4, backend_name=name) for _ in range(2))
    assert torch.equal(first.weights, second.weights)
    assert torch.equal(first.statistics, second.statistics)


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_fp64_is_refused(name: Any) -> None:
    with pytest.raises(ValueError, match="float64 needs backend torch"):
        weigh_samples(torch.ones(3).double(), "linupper", 1.0, backend_name=name)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_captured_in_a_cuda_graph_without_asking_the_host(name: Any) -> None:
    losses, r = spread_losses(4096).to(DEVICE), torch.tensor(1.0, device=DEVICE)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        weigh_samples(losses, "linupper", r, backend_name=name)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = weigh_samples(losses, "linupper", r, backend_name=name)
    later = spread_losses(4096, seed=1)
    losses.copy_(later)
    r.fill_(0.4)
    graph.replay()
    check(later, None, result, "linupper", 0.4)
