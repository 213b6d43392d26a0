"""What a cross-entropy shall compute, checked once, and what its backends have in common."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from megatron_rw.kernels.sums import SampleSums


@dataclass(frozen=True, kw_only=True)
class CrossEntropyOptions:
    """Settings of `vocab_parallel_cross_entropy`."""

    ignore_index: int = -100
    """Label of a token without a loss: its loss and the gradient of its logits are 0."""

    vocab_size: int | None = None
    """Columns of the whole vocabulary that take part; padding lies behind them. All when None."""

    z_loss: float = 0.0
    """Adds z_loss·lse², which keeps the logits' scale in check."""

    label_smoothing: float = 0.0
    """ε in [0, 1): probability spread evenly over the labels that are not the target."""

    softcap: float | None = None
    """c > 0: the logits are c·tanh(z/c) first."""

    def __post_init__(self) -> None:
        """Check every setting.

        Raises:
            ValueError: the first that is out of range.
        """
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must be in [0, 1), not {self.label_smoothing}")
        if not (math.isfinite(self.z_loss) and self.z_loss >= 0):
            raise ValueError(f"z_loss must be 0 or more, not {self.z_loss}")
        if self.softcap is not None and not (math.isfinite(self.softcap) and self.softcap > 0):
            raise ValueError(f"softcap must be above 0, not {self.softcap}")
        if self.vocab_size is not None and self.vocab_size < 2:
            raise ValueError(f"vocab_size must be 2 or more, not {self.vocab_size}")


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

    def smoothing(self, options: CrossEntropyOptions) -> float:
        """ε·V/(V−1): the weight of the mean over all labels, the target included."""
        return options.label_smoothing * self.vocab_size / (self.vocab_size - 1)


# Rows of a table of statistics: the largest logit m, Σ exp(z − m), the target's logit (0 where it
# is elsewhere), and, with label smoothing alone, Σ z.
MAX, SUM_EXP, TARGET, SUM = range(4)


class Combined(NamedTuple):
    """Losses of the whole vocabulary.

    Attributes:
        losses: `[s, b]` fp32.
        lse: `[s, b]` fp32.
        sums: of the losses and the mask, where there is one.
    """

    losses: Tensor
    lse: Tensor
    sums: SampleSums | None


class CrossEntropyBackend(Protocol):
    """The two passes over the logits, and the step between them.

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
            options: soft-cap and label smoothing count here.

        Returns:
            `[parts, 3, s, b]` fp32 (4 with label smoothing), rows MAX, SUM_EXP, TARGET, SUM, of
            one or more parts of the shard.
        """

    def merge(self, tables: Tensor) -> Tensor:
        """Make one part, `[1, rows, s, b]`, of the several of a shard."""

    def combine(
        self,
        tables: Tensor,
        target: Tensor,
        shard: Shard,
        options: CrossEntropyOptions,
        loss_mask: Tensor | None,
    ) -> Combined:
        """Join the parts of all shards.

        Args:
            tables: `[parts, rows, s, b]`, see `statistics`.
            target: see above.
            shard: its vocabulary counts here.
            options: as for `statistics`.
            loss_mask: `[s, b]`, 1 where a token counts in its sample's sums.
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
            lse: `[s, b]` fp32, contiguous, over the whole vocabulary.
            upstream: `[s, b]` fp32, any strides. Where it is 0, or the token is ignored, the row is
                literal zeros.
            shard: which columns take part; padding gets zeros.
            options: as in the forward pass.
            out: like `logits`; may be `logits` itself.
        """
