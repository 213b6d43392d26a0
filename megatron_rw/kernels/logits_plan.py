"""How much of a fused output layer's logits exists at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_rw.kernels.torch_pieces import CHUNK_ELEMENTS, computed_in

# Columns at a time that still keep a matrix product busy.
FEWEST_COLUMNS = 1024
# Of logits that a pass without gradient holds, where no budget asks for less.
LOSS_ONLY_BYTES = 128 << 20
# Splits begin at multiples of these where they can: matrix products like it.
ALIGNED_COLUMNS = 64
# Statistics, losses, factors and the like.
BYTES_OF_A_TOKEN = 128
MIB = 1 << 20


class BudgetError(ValueError):
    """The budget cannot be kept; the message names what can."""


@dataclass(frozen=True)
class LogitsPlan:
    """What the forward pass keeps for the backward pass.

    Attributes:
        keep: all logits of this rank, written once and overwritten with probabilities, 6·N·H·V
            operations; otherwise none, and backward computes them again, 8·N·H·V.
        columns: that exist at a time.
        splits: of the vocabulary: how often that many make all columns.
        nbytes: beyond hidden states, weights and their gradients, at most.
    """

    keep: bool
    columns: int
    splits: int
    nbytes: int

    def __str__(self) -> str:
        """One line for a log."""
        size = f"{self.nbytes / MIB:,.0f} MiB"
        if self.keep:
            return f"keeps {self.columns} columns of logits from forward to backward, {size}"
        return (
            f"computes logits twice, in {self.splits} splits of at most {self.columns} columns, "
            f"{size}"
        )


def plan_logits(
    tokens: int,
    columns: int,
    hidden_size: int,
    dtype: torch.dtype,
    budget: int | None = None,
    *,
    gathers: bool = False,
) -> LogitsPlan:
    """Keep the logits where the budget allows, otherwise cut the vocabulary into few splits.

    Args:
        tokens: N, of one micro-batch on this rank.
        columns: of the vocabulary on this rank, V/tp.
        hidden_size: H.
        dtype: of hidden states, weight and logits.
        budget: bytes; None for no limit.
        gathers: the hidden states are gathered over the tensor-parallel group first.

    Raises:
        BudgetError: not even the fewest columns fit.
    """
    layer = _Layer(tokens, hidden_size, dtype, gathers)
    whole = layer.kept(columns)
    if budget is None or whole <= budget:
        return LogitsPlan(True, columns, 1, whole)
    least = least_budget(tokens, columns, hidden_size, dtype, gathers=gathers)
    if least > budget:
        raise BudgetError(
            f"a budget of {budget / MIB:,.0f} MiB for logits is too small for {tokens} tokens of "
            f"{hidden_size} hidden units: {_whole_mib(least)} MiB is the least, and "
            f"{_whole_mib(whole)} MiB keeps all logits; fewer tokens in a micro-batch need less"
        )
    fewest = min(columns, FEWEST_COLUMNS)
    most = max(fewest, (budget - layer.beside_splits) // (tokens * dtype.itemsize))
    size, splits = _even(columns, most)
    return LogitsPlan(False, size, splits, layer.split(size))


def plan_losses(
    tokens: int, columns: int, dtype: torch.dtype, budget: int | None = None
) -> LogitsPlan:
    """For a pass without gradient: all logits at a time only where they are few.

    Args:
        tokens: as in `plan_logits`, as are the others.
        columns: as there.
        dtype: as there.
        budget: as there, of logits alone; one too small for the fewest columns does not count.
    """
    limit = LOSS_ONLY_BYTES if budget is None else min(budget, LOSS_ONLY_BYTES)
    most = max(min(columns, FEWEST_COLUMNS), limit // (tokens * dtype.itemsize))
    size, splits = _even(columns, most)
    return LogitsPlan(False, size, splits, tokens * size * dtype.itemsize)


def least_budget(
    tokens: int, columns: int, hidden_size: int, dtype: torch.dtype, *, gathers: bool = False
) -> int:
    """Bytes, the smallest budget that `plan_logits` takes; arguments as there."""
    layer = _Layer(tokens, hidden_size, dtype, gathers)
    return min(layer.kept(columns), layer.split(min(columns, FEWEST_COLUMNS)))


def _even(columns: int, most: int) -> tuple[int, int]:
    """Columns of a split and their number: all of a size but the last, aligned where possible."""
    splits = -(-columns // most)
    size = -(-columns // splits)
    size = min(most, -(-size // ALIGNED_COLUMNS) * ALIGNED_COLUMNS, columns)
    return size, -(-columns // size)


def _whole_mib(nbytes: int) -> str:
    return f"{-(-nbytes // MIB):,}"


@dataclass(frozen=True)
class _Layer:
    """Bytes that an output layer takes beyond hidden states, weight and their gradients."""

    tokens: int
    hidden_size: int
    dtype: torch.dtype
    gathers: bool

    def kept(self, columns: int) -> int:
        """With all logits."""
        return self._logits(columns) + self._beside

    def split(self, columns: int) -> int:
        """With that many columns of them."""
        return self._logits(columns) + self._beside + self._total

    @property
    def beside_splits(self) -> int:
        """Of `split`, what does not grow with the columns beyond some."""
        return self._beside + self._total + 2 * CHUNK_ELEMENTS * computed_in(self.dtype).itemsize

    def _logits(self, columns: int) -> int:
        # The torch backend computes in two copies of a few rows.
        elements = self.tokens * columns
        scratch = 2 * computed_in(self.dtype).itemsize * min(elements, CHUNK_ELEMENTS)
        return elements * self.dtype.itemsize + scratch

    @property
    def _beside(self) -> int:
        # Hidden states times their rows' factors, and all of them under sequence parallelism.
        row = self.hidden_size * self.dtype.itemsize * (1 + self.gathers)
        return self.tokens * (row + BYTES_OF_A_TOKEN)

    @property
    def _total(self) -> int:
        # The hidden states' gradient, which adds up over the splits in more bits.
        return self.tokens * self.hidden_size * computed_in(self.dtype).itemsize
