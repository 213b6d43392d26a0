"""The scope `microbatch`: a micro-batch across the data-parallel group is the set."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rw.reweighting.config import ReweightConfig, temperature_at
from megatron_rw.reweighting.samples import ReduceGroup, SampleSet, gather_samples, sample_sums
from megatron_rw.reweighting.weights import loss_weights


@dataclass(frozen=True)
class WeightedLoss:
    """The weighted loss of one micro-batch.

    Attributes:
        local_objective: scalar with gradient, this rank's part of Σ_{i∈S} w_i·l_i. The parts of
            the data- and context-parallel ranks add up to the objective.
        samples: the whole set, on every rank.
        weights: `[n]`, w_i, detached, in the order of `samples`.
    """

    local_objective: Tensor
    samples: SampleSet
    weights: Tensor

    @property
    def objective(self) -> Tensor:
        """Scalar without gradient, Σ_{i∈S} w_i·l_i over all ranks."""
        # 0·NaN is NaN: a sample without weight must not reach the sum at all.
        return torch.where(self.weights > 0, self.weights * self.samples.losses, 0.0).sum()


class Reweighter:
    """Turns the token losses of a micro-batch into its weighted loss.

    Args:
        config: strategy, temperature and warm-up; `config.enabled` must hold.
        ranks: the ranks whose samples compete.
    """

    def __init__(self, config: ReweightConfig, ranks: ReduceGroup | None = None) -> None:
        if not config.enabled:
            raise ValueError("strategy none has no weights; use Megatron's own loss")
        self.config = config
        self.ranks = ranks or ReduceGroup()

    def temperature(self, step: int) -> float:
        """r(t), see `temperature_at`."""
        return temperature_at(self.config, step)

    def __call__(
        self, token_losses: Tensor, loss_mask: Tensor, step: int, domain: Tensor | None = None
    ) -> WeightedLoss:
        """Weigh one micro-batch. One collective over `ranks.group`, no host synchronisation.

        Args:
            token_losses: `[b, s]`, cross-entropy of this rank's tokens, nats, with gradient.
            loss_mask: `[b, s]`, 1 where a token counts.
            step: completed steps of reweighted training.
            domain: `[b]` int64, for the metrics alone. All 0 when None.

        Returns:
            The weighted loss; its gradient with respect to token (i, t) is w_i·m_it/Σ_t m_it.
        """
        loss_sum, tokens = sample_sums(token_losses, loss_mask)
        if domain is None:
            domain = torch.zeros_like(tokens)
        samples = gather_samples(loss_sum, tokens, domain, self.ranks)
        weights = loss_weights(
            samples.losses,
            self.config.strategy,
            self.temperature(step),
            self.config.delta,
            mask=samples.has_tokens,
        )
        own = weights[samples.local]
        per_token = own / samples.tokens[samples.local].clamp(min=1.0)
        local_objective = (torch.where(own > 0, loss_sum, 0.0) * per_token).sum()
        return WeightedLoss(local_objective, samples, weights)
