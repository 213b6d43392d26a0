"""The weighted loss of a micro-batch: value and gradient against the oracle, then over ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from megatron_rw.reweighting import (
    ReduceGroup,
    ReweightConfig,
    TokenBatch,
    WeightedSet,
    Weighting,
    make_reweighter,
    sample_sums,
)
from tests.ranks import run_ranks
from tests.reweighting import oracle

SAMPLES, TOKENS = 8, 12


def micro_batch(
    seed: int, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token losses, a ragged mask with one sample that has no active token, and domains."""
    generator = torch.Generator().manual_seed(seed)
    losses = torch.rand(SAMPLES, TOKENS, generator=generator, dtype=dtype) * 5
    mask = (torch.rand(SAMPLES, TOKENS, generator=generator) < 0.6).to(torch.float32)
    mask[3] = 0
    mask[5, : TOKENS // 2] = 0
    return losses, mask, torch.arange(SAMPLES) % 3


@dataclass
class Weighed:
    """One micro-batch weighed in the scope `microbatch`."""

    local_objective: torch.Tensor
    weighted: WeightedSet

    @property
    def weights(self) -> torch.Tensor:
        return self.weighted.weights


def weigh(
    strategy: Any,
    losses: torch.Tensor,
    mask: torch.Tensor,
    domain: torch.Tensor | None = None,
    ranks: ReduceGroup | None = None,
) -> Weighed:
    seen: list[WeightedSet] = []
    setting: dict[str, Any] = {"top_share": 1.0} if strategy == "topk" else {"temperature": 0.4}
    config = ReweightConfig(strategy=strategy, **setting)
    reweighter = make_reweighter(config, ranks, seen.append)
    reweighter.begin(0)
    objective = reweighter.weigh(TokenBatch(losses, mask, domain=domain))
    assert reweighter.finish() is None
    return Weighed(objective, *seen)


@pytest.mark.parametrize("strategy", oracle.STRATEGIES)
@pytest.mark.parametrize("seed", [0, 1])
def test_gradient_is_the_oracles(strategy: Any, seed: int) -> None:
    losses, mask, domain = micro_batch(seed)
    losses.requires_grad_()
    weighted = weigh(strategy, losses, mask, domain)
    weighted.local_objective.backward()
    expected = oracle.token_gradient(
        losses.tolist(), mask.tolist(), Weighting(strategy=strategy, temperature=0.4)
    )
    assert losses.grad is not None
    torch.testing.assert_close(
        losses.grad, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-15
    )
    value = sum(
        w * loss
        for w, loss in zip(
            weighted.weights.tolist(),
            oracle.sample_losses(losses.tolist(), mask.tolist()),
            strict=True,
        )
        if loss is not None
    )
    assert weighted.local_objective.item() == pytest.approx(value, rel=1e-12)
    assert weighted.weighted.objective.item() == pytest.approx(value, rel=1e-12)


def test_sample_without_an_active_token_is_in_no_moment() -> None:
    losses, mask, domain = micro_batch(0)
    weights = weigh("linupper", losses, mask, domain).weights
    assert weights[3] == 0
    others = [i for i in range(SAMPLES) if i != 3]
    alone = weigh("linupper", losses[others], mask[others], domain[others]).weights
    torch.testing.assert_close(weights[others], alone)


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_nonfinite_sample_never_spreads(broken: float) -> None:
    losses, mask, domain = micro_batch(0)
    mask[6] = 1
    losses[6, 2] = broken
    losses.requires_grad_()
    weighted = weigh("linupper", losses, mask, domain)
    weighted.local_objective.backward()
    assert weighted.weights[6] == 0
    assert math.isfinite(weighted.local_objective.item())
    assert losses.grad is not None
    assert torch.isfinite(losses.grad).all()
    assert (losses.grad[6] == 0).all()


def test_token_outside_the_mask_may_be_anything() -> None:
    losses, mask, domain = micro_batch(0)
    expected = weigh("linupper", losses, mask, domain).local_objective
    losses = torch.where(mask > 0, losses, math.nan)
    actual = weigh("linupper", losses, mask, domain).local_objective
    assert actual.item() == expected.item()


def test_all_masked_is_zero_with_zero_gradient() -> None:
    losses, mask, domain = micro_batch(0)
    losses.requires_grad_()
    weighted = weigh("extremes", losses, torch.zeros_like(mask), domain)
    weighted.local_objective.backward()
    assert weighted.local_objective.item() == 0
    assert losses.grad is not None
    assert (losses.grad == 0).all()


def test_half_precision_losses_are_summed_in_fp32() -> None:
    losses = torch.full((2, 4096), 2.75, dtype=torch.bfloat16)
    loss_sum, tokens = sample_sums(losses, torch.ones(2, 4096))
    assert loss_sum.dtype == torch.float32
    assert (loss_sum / tokens).tolist() == [2.75, 2.75]


def test_strategy_none_has_no_reweighter() -> None:
    with pytest.raises(ValueError, match="Megatron's own loss"):
        make_reweighter(ReweightConfig())


def weighted_on_rank(dp: int, cp: int) -> dict[str, Any]:
    """This rank's rows and token shard, weighted over Megatron's groups."""
    from megatron_rw.integrations.groups import data_parallel_ranks

    ranks = data_parallel_ranks()
    assert (ranks.dp_size, ranks.cp_size) == (dp, cp)
    losses, mask, domain = micro_batch(0)
    rows = slice(ranks.dp_rank * (SAMPLES // dp), (ranks.dp_rank + 1) * (SAMPLES // dp))
    columns = slice(ranks.cp_rank * (TOKENS // cp), (ranks.cp_rank + 1) * (TOKENS // cp))
    mine = losses[rows, columns].clone().requires_grad_()
    weighted = weigh("quadratic", mine, mask[rows, columns], domain[rows], ranks)
    weighted.local_objective.backward()
    assert mine.grad is not None
    return {
        "rows": rows,
        "columns": columns,
        "gradient": mine.grad,
        "part": weighted.local_objective.item(),
        "objective": weighted.weighted.objective.item(),
        "weights": weighted.weights,
        "domain": weighted.weighted.units.domain,
    }


# Sample 5 has no active token in the first half: under cp=2 its rank holds none of it. The last
# layout has both at once, and TP besides, whose ranks must all agree.
@pytest.mark.parametrize(
    ("processes", "dp", "sizes"),
    [
        (2, 2, {}),
        (2, 1, {"context_parallel_size": 2}),
        (4, 2, {"context_parallel_size": 2}),
        (4, 2, {"tensor_model_parallel_size": 2}),
    ],
)
def test_ranks_together_give_the_single_process_gradient(
    processes: int, dp: int, sizes: dict[str, int]
) -> None:
    cp = sizes.get("context_parallel_size", 1)
    parts = run_ranks(processes, weighted_on_rank, dp, cp, **sizes)
    losses, mask, domain = micro_batch(0)
    losses.requires_grad_()
    whole = weigh("quadratic", losses, mask, domain)
    whole.local_objective.backward()
    assert losses.grad is not None
    for part in parts:
        expected = losses.grad[part["rows"], part["columns"]]
        torch.testing.assert_close(part["gradient"], expected, rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(part["weights"], whole.weights, rtol=1e-12, atol=0)
        assert torch.equal(part["domain"], domain.double())
        assert part["objective"] == pytest.approx(whole.weighted.objective.item(), rel=1e-12)
    tp = processes // (dp * cp)
    total = sum(part["part"] for part in parts) / tp
    assert total == pytest.approx(whole.local_objective.item(), rel=1e-12)
