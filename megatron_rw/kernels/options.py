"""What the kernels are asked for and what they return, and the protocol of their backends."""

import math
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal, NamedTuple, Protocol, get_args

from torch import Tensor

from megatron_rw.kernels.sums import SampleSums

WeightStrategy = Literal["uniform", "linupper", "quadratic", "extremes", "topk", "softmax"]
SignalRange = Literal["minmax", "quantile"]

# Below this range of signals (nats) a set has no order to speak of and its weights are uniform.
COLLAPSED_RANGE = 1e-6
# Share of the units below, and above, the range `quantile`.
RANGE_QUANTILE = 0.05
# Most that one score may exceed another by, over the temperature, where weights are used before
# their sum is known: a larger exponent would let gradients underflow. Also the sharpest that a
# temperature is made for a target of the effective sample size.
LARGEST_EXPONENT = 20.0
# Below this temperature fp32 cannot tell scores of one size apart.
LEAST_TEMPERATURE = 1e-6

# Rows of a table of statistics: the largest logit m, Σ exp(z − m), the target's logit (0 where it
# is elsewhere), and, for the entropy alone, Σ exp(z − m)·(z − m).
MAX, SUM_EXP, TARGET, SPREAD = range(4)


class BackendError(ValueError):
    """The kernels that were asked for cannot run here; the message names the remedy."""


@dataclass(frozen=True, kw_only=True)
class CrossEntropyOptions:
    """Settings of the cross-entropy."""

    ignore_index: int = -100
    """Label of a token without a loss: its loss and the gradient of its logits are 0, and it is in
    no sum."""

    vocab_size: int | None = None
    """Columns of the whole vocabulary that take part; padding lies behind them. All when None."""

    entropy: bool = False
    """Return the entropy of each token's prediction as well; it costs 4 bytes a token more in the
    exchange of tensor-parallel ranks."""

    def __post_init__(self) -> None:
        """Check the vocabulary's size; a ValueError below 1."""
        if self.vocab_size is not None and self.vocab_size < 1:
            raise ValueError(f"vocab_size must be 1 or more, not {self.vocab_size}")

    @property
    def rows(self) -> int:
        """How many rows a table of statistics has."""
        return SPREAD + self.entropy


@dataclass(frozen=True)
class Shard:
    """This rank's part of the vocabulary.

    Attributes:
        start: index of its first column in the whole vocabulary.
        columns: how many of its columns take part; padding lies behind them.
        vocab_size: columns that take part over all ranks, V.
    """

    start: int
    columns: int
    vocab_size: int


class Combined(NamedTuple):
    """Losses of the whole vocabulary.

    Attributes:
        losses: `[s, b]` fp32 (fp64 where the logits are), nats.
        lse: `[2, s, b]`, same dtype, the log-sum-exp as a sum that keeps its digits whatever all
            logits have in common: a maximum m, and log Σ exp(z − m).
        sums: of the losses and the mask, where there is one.
        entropy: `[s, b]`, same dtype, nats, where it was asked for.
    """

    losses: Tensor
    lse: Tensor
    sums: SampleSums | None
    entropy: Tensor | None


@dataclass(frozen=True, kw_only=True)
class Weighting:
    """How the weights of a set follow from its signals; see `weights.weigh_units`."""

    strategy: WeightStrategy
    """The score h."""

    temperature: float | Tensor = 1.0
    """r. As a scalar tensor it may change between replays of a CUDA graph; the host does not look
    at its value then."""

    delta: float = 1.0
    """δ, half-width of the interval that signals are scaled to."""

    top_share: float = 1.0
    """k: the share of the units that strategy `topk` keeps."""

    target_ess: float | None = None
    """f: the effective sample size, as a fraction, that the temperature is chosen for."""

    max_weight: float | None = None
    """c: the most that a weight may be of what it would be without a strategy."""

    range: SignalRange = "minmax"
    """What is scaled to [−δ, δ]: all signals, or those between two quantiles."""

    def __post_init__(self) -> None:
        """Check every setting.

        Raises:
            ValueError: the first that is out of range.
        """
        if self.strategy not in get_args(WeightStrategy):
            raise ValueError(f"strategy {self.strategy!r} gives no weights")
        r = self.temperature
        if isinstance(r, Tensor):
            if r.numel() != 1:
                raise ValueError(f"temperature must be one number, not {tuple(r.shape)}")
        elif not (math.isfinite(r) and r > LEAST_TEMPERATURE):
            raise ValueError(
                f"temperature must be a finite number above {LEAST_TEMPERATURE:g}, not {r}"
            )
        if not (math.isfinite(self.delta) and self.delta > 0):
            raise ValueError(f"delta must be a finite number above 0, not {self.delta}")
        for name in ("top_share", "target_ess"):
            share = getattr(self, name)
            if share is not None and not 0 < share <= 1:
                raise ValueError(f"{name} must be above 0 and at most 1, not {share}")
        if self.max_weight is not None and not self.max_weight >= 1:
            raise ValueError(f"max_weight must be 1 or more, not {self.max_weight}")

    @property
    def largest_score(self) -> float:
        """The largest score that the strategy can give to any signal; the smallest is 0.

        That of `softmax`, whose score is the signal itself, is the upper end of its range.
        """
        if self.strategy in ("uniform", "topk", "softmax"):
            return 0.0
        return 1.0 if self.strategy == "quadratic" else self.delta


class Units(NamedTuple):
    """What competes for weight: samples, documents or tokens.

    Attributes:
        signals: `[n]` fp32 or fp64, nats.
        mask: `[n]` bool, True for the units of the set. All of them when None.
        base: `[n]`, b ≥ 0 in the dtype of the signals, what weights are without a strategy, up to a
            factor. Units with 0 are not in the set. 1 when None.
        counts: `[n]`, same dtype, how many units a row stands for. 1 when None.
    """

    signals: Tensor
    mask: Tensor | None = None
    base: Tensor | None = None
    counts: Tensor | None = None


class Statistic(IntEnum):
    """Places in `UnitWeights.statistics`; all are of the active units."""

    COUNT = 0
    """|S|: inside the mask, with a base, and finite."""
    BASE = 1
    """Σ b."""
    TOTAL = 2
    """Σ of the weights as returned: 1 when they are normalised."""
    ESS = 3
    """Effective sample size as a fraction, (Σ w)²/(Σ b · Σ w²/b); 0 when there are none."""
    LARGEST = 4
    """Largest relative weight, max w/b · Σ b/Σ w; 0 when there are none."""


class Plan(IntEnum):
    """Places in `UnitWeights.plan`: with these numbers a unit's weight depends on itself alone."""

    LOW = 0
    """Signal that is scaled to −δ; +inf when there are no units."""
    HIGH = 1
    """Signal that is scaled to δ; −inf when there are no units."""
    TEMPERATURE = 2
    """r."""
    THRESHOLD = 3
    """Smallest signal that `topk` keeps; 0 for the others."""
    LEVEL = 4
    """Most that (h − h_max)/r counts as; 0 when nothing is capped."""


class UnitWeights(NamedTuple):
    """Weights of a set.

    Attributes:
        weights: `[n]` in the dtype of the signals.
        statistics: `[5]`, same dtype; see `Statistic`.
        plan: `[5]`, same dtype, of this set, also where the weights follow another; see `Plan`.
    """

    weights: Tensor
    statistics: Tensor
    plan: Tensor


class Backend(Protocol):
    """The two passes over the logits, the step between them, and the weighting.

    Targets are `[s, b]` int64, labels in the whole vocabulary, or `options.ignore_index`.
    """

    def statistics(
        self, logits: Tensor, target: Tensor, shard: Shard, options: CrossEntropyOptions
    ) -> Tensor:
        """One read of the logits.

        Args:
            logits: `[s, b, columns + padding]` fp32, bf16 or fp16, any strides.
            target: see above.
            shard: which columns take part.
            options: its ignored label and its entropy apply here.

        Returns:
            `[options.rows, s, b]` fp32 (fp64 where the logits are): MAX, SUM_EXP, TARGET
            and, for the entropy, SPREAD.
        """

    def combine(
        self,
        tables: Tensor,
        target: Tensor,
        shard: Shard,
        options: CrossEntropyOptions,
        loss_mask: Tensor | None,
    ) -> Combined:
        """Join the tables of all shards.

        Args:
            tables: `[shards, options.rows, s, b]`, see `statistics`.
            target: see above.
            shard: its vocabulary counts here.
            options: as for `statistics`.
            loss_mask: `[s, b]` in the dtype of the tables, 1 where a token counts in its sample's
                sums.
        """

    def gradient(
        self,
        logits: Tensor,
        target: Tensor,
        lse: Tensor,
        upstream: Tensor,
        shard: Shard,
        options: CrossEntropyOptions,
        out: Tensor,
    ) -> None:
        """One read of the logits and one write of their gradient.

        Args:
            logits: as for `statistics`.
            target: see above.
            lse: `[2, s, b]`, contiguous, over the whole vocabulary; see `Combined`.
            upstream: `[s, b]` in the dtype of `lse`, any strides. Where it is 0, or the token is
                ignored, the row is literal zeros.
            shard: which columns take part; padding gets zeros.
            options: as in the forward pass.
            out: like `logits`; may be `logits` itself.
        """

    def weigh(self, units: Units, weighting: Weighting, given: Tensor | None) -> UnitWeights:
        """See `weights.weigh_units`, which has checked the arguments; there is a unit."""
