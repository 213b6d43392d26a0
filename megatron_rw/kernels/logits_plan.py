"""How much of a fused output layer's logits exists at a time."""

from dataclasses import dataclass

import torch

from megatron_rw.kernels.torch_pieces import CHUNK_ELEMENTS, computed_in

# The fewest columns of a split; a matrix product of fewer is inefficient.
FEWEST_COLUMNS = 1024
# The columns of a split are a multiple of this where they can be, so that its rows are aligned.
ALIGNED_COLUMNS = 64
# For a token's statistics, loss, log-sum-exp and gradient.
BYTES_OF_A_TOKEN = 128
MIB = 1 << 20


class BudgetError(ValueError):
    """The budget cannot be kept; the message names what can."""


@dataclass(frozen=True)
class LogitsPlan:
    """The splits of the vocabulary, whose logits exist one after the other.

    Attributes:
        columns: of a split, but for the last, which may have fewer.
        splits: how many make all columns.
        nbytes: beyond hidden states, weights and their gradients, at most.
    """

    columns: int
    splits: int
    nbytes: int

    def __str__(self) -> str:
        """One line for a log."""
        size = f"{self.nbytes / MIB:,.0f} MiB"
        return f"logits in {self.splits} split(s) of at most {self.columns} columns, {size}"


def plan_logits(
    tokens: int,
    columns: int,
    hidden_size: int,
    dtype: torch.dtype,
    budget: int,
    *,
    gathers: bool = False,
) -> LogitsPlan:
    """Cut the vocabulary into as few splits as a budget allows.

    Args:
        tokens: N, of one micro-batch on this rank.
        columns: of the vocabulary on this rank, V/tp.
        hidden_size: H.
        dtype: of hidden states, weight and logits.
        budget: bytes.
        gathers: the hidden states are gathered over the tensor-parallel group first.

    Raises:
        BudgetError: not even the fewest columns fit.
    """
    beside = _beside(tokens, hidden_size, dtype, gathers)
    fewest = min(columns, FEWEST_COLUMNS)
    most = (budget - beside) // (tokens * dtype.itemsize)
    if most < fewest:
        least = -(-(beside + tokens * fewest * dtype.itemsize) // MIB)
        raise BudgetError(
            f"a budget of {budget / MIB:,.0f} MiB for logits is too small for {tokens} tokens of "
            f"{hidden_size} hidden units: {least:,} MiB is the least; fewer tokens in a "
            "micro-batch need less"
        )
    splits = -(-columns // most)
    size = -(-columns // splits)
    size = min(most, -(-size // ALIGNED_COLUMNS) * ALIGNED_COLUMNS, columns)
    return LogitsPlan(size, -(-columns // size), beside + tokens * size * dtype.itemsize)


def _beside(tokens: int, hidden_size: int, dtype: torch.dtype, gathers: bool) -> int:
    """Bytes that do not grow with the columns of a split."""
    wide = computed_in(dtype).itemsize
    # The hidden states' gradient, which adds up over the splits in more bits, hidden states without
    # the tokens that do not count, and, under sequence parallelism, those of the whole sequence.
    row = hidden_size * (wide + (1 + gathers) * dtype.itemsize) + BYTES_OF_A_TOKEN
    # The torch backend computes in two copies of a few rows.
    return tokens * row + 2 * CHUNK_ELEMENTS * wide
