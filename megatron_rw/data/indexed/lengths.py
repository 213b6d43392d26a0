"""The lengths of documents, counted by powers of two, shown as text or as a picture."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_rw.errors import UserError
from megatron_rw.platform.files import complete_file

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

    def text(self) -> list[str]:
        """Returns the lines of a histogram."""
        most = max((count for _, _, count in self.bins()), default=1)
        return [
            f"{f'{low:,}' if low == high else f'{low:,}-{high:,}':>27} {count:>15,} "
            f"{'#' * round(_BAR_CHARACTERS * count / most)}".rstrip()
            for low, high, count in self.bins()
        ]


def check_picture(path: Path) -> None:
    """Checks that a picture can be drawn into this file.

    Raises:
        UserError: If it cannot.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError(
            "--picture needs a package that is not installed; run: pip install matplotlib"
        )
    from matplotlib.backend_bases import FigureCanvasBase

    kinds = sorted(FigureCanvasBase.get_supported_filetypes())
    if path.suffix[1:].lower() not in kinds:
        raise UserError(f"--picture {path}: no kind of picture; name it .{', .'.join(kinds)}")
    if not path.absolute().parent.is_dir():
        raise UserError(f"--picture {path}: there is no directory {path.parent}; make it")


def draw(lengths: Mapping[str, Lengths], path: Path) -> None:
    """Draws the share of documents by length, a line for each dataset.

    Args:
        lengths: Name of a dataset to the lengths of its documents.
        path: The picture; its suffix names the format.
    """
    from matplotlib.figure import Figure  # pyplot could open a window

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for name, counted in lengths.items():
        bins = [(max(low, 0.5), high + 1, count) for low, high, count in counted.bins()]
        edges = [bins[0][0], *(high for _, high, _ in bins)]
        axes.stairs([count / counted.documents for _, _, count in bins], edges, label=name)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("tokens of a document")
    axes.set_ylabel("share of the documents")
    axes.legend(fontsize="small")
    with complete_file(path) as file:
        figure.savefig(file, dpi=150, format=path.suffix[1:])
