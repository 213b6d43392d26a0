"""The lengths of documents, counted by powers of two, shown as text or as a picture."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

_BAR_CHARACTERS = 40


class Lengths:
    """Counts documents by their length, in memory that does not grow with their number.

    Attributes:
        documents: Number of documents.
        tokens: Tokens of all documents.
        shortest: Tokens of the shortest document, -1 without documents.
        longest: Tokens of the longest document.
    """

    def __init__(self) -> None:
        # Bin 0 counts documents without tokens, bin k those of 2^(k-1) to 2^k - 1 tokens.
        self._bins = np.zeros(65, np.int64)
        self.documents = self.tokens = self.longest = 0
        self.shortest = -1

    def add(self, tokens: NDArray[np.int64]) -> None:
        """Adds documents by the number of tokens of each, [documents]."""
        if len(tokens) == 0:
            return
        self._bins += np.bincount(np.frexp(tokens)[1], minlength=65)
        self.documents += len(tokens)
        self.tokens += int(tokens.sum())
        shortest = int(tokens.min())
        self.shortest = shortest if self.shortest < 0 else min(shortest, self.shortest)
        self.longest = max(int(tokens.max()), self.longest)

    def bins(self) -> list[tuple[int, int, int]]:
        """Returns (fewest tokens, most tokens, documents) from the first to the last filled bin."""
        filled = np.flatnonzero(self._bins)
        if len(filled) == 0:
            return []
        return [
            (1 << number >> 1, max(0, (1 << number) - 1), int(self._bins[number]))
            for number in range(filled[0], filled[-1] + 1)
        ]

    @property
    def mean(self) -> float:
        """Tokens of a document on average."""
        return self.tokens / max(1, self.documents)

    def summary(self) -> dict[str, Any]:
        """Returns the counts, for JSON."""
        return {
            "shortest": self.shortest,
            "mean": self.mean,
            "longest": self.longest,
            "histogram": [
                {"from": low, "to": high, "documents": count} for low, high, count in self.bins()
            ],
        }

    def shares(self) -> tuple[list[float], list[float]]:
        """Returns the share of the documents in each bin, and the edges of the bins."""
        bins = self.bins()
        edges = [max(bins[0][0], 0.5), *(high + 1 for _, high, _ in bins)]
        return [count / self.documents for _, _, count in bins], edges

    def text(self) -> list[str]:
        """Returns the lines of a histogram."""
        most = max((count for _, _, count in self.bins()), default=1)
        return [
            f"{f'{low:,}' if low == high else f'{low:,}-{high:,}':>27} {count:>15,} "
            f"{'#' * round(_BAR_CHARACTERS * count / most)}".rstrip()
            for low, high, count in self.bins()
        ]
