"""Cuts long texts into short segments that a tokenizer encodes to the same ids.

A tokenizer's working memory and, for byte-pair encoding, its time per character grow with the
length of what it is given; a megabyte in pieces of a page stays in the processor's caches. Where a
text may be cut is the tokenizer's business (`NextCut`): only where its own definition proves that
no token crosses the cut and nothing on one side changes the other.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

# The first place at or after a position where a text may be cut; the text's length if none.
NextCut = Callable[[str, int], int]


def split(text: str, size: int, next_cut: NextCut, dropped: int = 0) -> list[str]:
    """Cuts a text.

    Args:
        text: The text.
        size: Characters of a segment, at least; it then goes on up to the next cut.
        next_cut: Where it may be cut.
        dropped: Characters to leave out after every cut, for which the tokenizer puts something of
            its own at the start of a segment.

    Returns:
        The segments, at least one.
    """
    segments = []
    start = 0
    while len(text) - start > size:
        cut = next_cut(text, start + size)
        if cut == len(text):
            break
        segments.append(text[start:cut])
        start = cut + dropped
    segments.append(text[start:])
    return segments


def joined(
    pieces: Iterable[NDArray[Any]], counts: Sequence[int], dtype: type[Any]
) -> list[NDArray[Any]]:
    """Joins the ids of segments into the ids of texts.

    Args:
        pieces: The ids of every segment of every text, in order.
        counts: The number of segments of each text.
        dtype: What to convert to; every id fits.
    """
    pieces = iter(pieces)
    return [
        np.concatenate(list(islice(pieces, count)), dtype=dtype, casting="unsafe")
        for count in counts
    ]
