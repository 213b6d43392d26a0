"""How long documents are: counted by powers of two, shown in a terminal or as a picture."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_rw.errors import UserError
from megatron_rw.platform.files import complete_file

_BAR = 40


class Lengths:
    """Counts documents by their length, however many.

    Attributes:
        documents: How many were counted.
        tokens: Of all of them.
        shortest: Tokens of the shortest.
        longest: Tokens of the longest.
    """

    def __init__(self) -> None:
        self._bins = np.zeros(65, np.int64)  # bin 0 is of no tokens, bin k of 2^(k-1) to 2^k - 1
        self.documents = self.tokens = self.longest = 0
        self.shortest = -1

    def add(self, tokens: NDArray[np.int64]) -> None:
        """Counts documents, given the tokens of each, [documents]."""
        if len(tokens) == 0:
            return
        self._bins += np.bincount(np.frexp(tokens)[1], minlength=65)
        self.documents += len(tokens)
        self.tokens += int(tokens.sum())
        shortest = int(tokens.min())
        self.shortest = shortest if self.shortest < 0 else min(shortest, self.shortest)
        self.longest = max(int(tokens.max()), self.longest)

    def bins(self) -> list[tuple[int, int, int]]:
        """Returns (fewest tokens, most tokens, documents) of every bin between the filled ones."""
        filled = np.flatnonzero(self._bins)
        if len(filled) == 0:
            return []
        return [
            (1 << number >> 1, max(0, (1 << number) - 1), int(self._bins[number]))
            for number in range(filled[0], filled[-1] + 1)
        ]

    def summary(self) -> dict[str, Any]:
        """Returns what there is to say, for `json`."""
        return {
            "shortest": self.shortest,
            "mean": self.tokens / max(1, self.documents),
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
            f"{'#' * round(_BAR * count / most)}".rstrip()
            for low, high, count in self.bins()
        ]


def check_picture(path: Path) -> None:
    """See that a picture can be drawn and put there.

    Raises:
        UserError: It cannot.
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
        lengths: Name to what was counted.
        path: Of the picture; its suffix is its kind.
    """
    from matplotlib.figure import Figure  # without pyplot no window is opened anywhere

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
