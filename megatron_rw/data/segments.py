"""Cuts long texts into short segments that a tokenizer encodes to the same ids.

A tokenizer's working memory and, for byte-pair encoding, its time per character grow with the
length of what it is given; segments of a few lines stay in the processor's caches. Where a text
may be cut is the tokenizer's business (`NextCut`): only where its own definition proves that no
token crosses the cut and that nothing on one side changes the other.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from itertools import batched, chain, islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

# The first place at or after a position where a text may be cut; the text's length if none.
NextCut = Callable[[str, int], int]

# The fastest of 150 to 16,000 for byte-pair encoding, by little: see docs/data.md.
SEGMENT_CHARACTERS = 500
# Segments that are encoded at a time; bounds what the libraries hold beside the ids.
_GROUP = 1000

# How byte-level tokenizers cut text into words before any token is looked for. None matches an
# ASCII letter or digit followed by white space, and none looks back.
_WORDS = (
    # GPT-2
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    # cl100k, Llama 3
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    # Qwen 2
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    # o200k
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    # Tekken, core's tiktoken "v2"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    # core's tiktoken "v1"
    r"[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
)
_AFTER_A_WORD = re.compile(r"(?<=[A-Za-z0-9])[ \t\r\n]")


def split(text: str, next_cut: NextCut, size: int, dropped: int = 0) -> list[str]:
    """Cuts a text.

    Args:
        text: The text.
        next_cut: Where it may be cut.
        size: Characters of a segment, at least; it then goes on up to the next cut.
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


def encode_segments(
    texts: Sequence[Sequence[str]],
    encode: Callable[[list[str]], Iterable[NDArray[Any]]],
    dtype: type[Any],
) -> list[NDArray[Any]]:
    """Encodes the segments of texts, a bounded number at a time.

    Args:
        texts: The segments of each text.
        encode: Gives the ids of each of some segments.
        dtype: Type of the result.

    Returns:
        The ids of each text, `[tokens]`.
    """
    pieces = chain.from_iterable(
        encode(list(group)) for group in batched(chain.from_iterable(texts), _GROUP)
    )
    # Unsafe is what NumPy calls int32 to uint16; every id of the vocabulary fits the dtype.
    return [
        np.concatenate(list(islice(pieces, len(segments))), dtype=dtype, casting="unsafe")
        for segments in texts
    ]


def separates_words(pattern: str) -> bool:
    """Whether `after_a_word` never cuts what this pattern of a byte-level tokenizer matches."""
    return pattern in _WORDS


def after_a_word(text: str, start: int) -> int:
    """Is the `NextCut` between an ASCII letter or digit and white space."""
    found = _AFTER_A_WORD.search(text, start)
    return found.start() if found else len(text)
