"""Cuts long texts into short segments that a tokenizer encodes to the same ids.

A tokenizer's working memory and, for byte-pair encoding, its time per character grow with the
length of what it is given; segments of a few lines stay in the processor's caches. Where a text
may be cut is the tokenizer's business (`NextCut`): only where its own definition proves that no
token crosses the cut and that nothing on one side changes the other.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import batched, chain, islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

# The first place at or after a position where a text may be cut; the text's length if none.
NextCut = Callable[[str, int], int]

# The fastest of 300 to 16,000 for SentencePiece and Hugging Face together, by little.
SEGMENT_CHARACTERS = 1000
# Segments that are encoded at a time; bounds what the libraries hold beside the ids.
_GROUP = 100

# How byte-level tokenizers find words, before any token is looked for; GPT-2's is built into the
# `tokenizers` library. None looks back, and none matches white space with something on both sides.
GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LATER_WORDS = (
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
# White space after something always starts a match of GPT-2's pattern.
_GPT2_CUT = re.compile(r"(?<=\S)[ \t\r\n]")
# In the later patterns line ends may belong to the punctuation before them, with a slash after
# them, but are matched all together: the last one ends a match.
_LATER_CUT = re.compile(r"(?<=\S)[ \t]|(?<=[\r\n])(?=[^\s/])")


def split(text: str, next_cut: NextCut | None, size: int) -> list[str]:
    """Cuts a text.

    Args:
        text: The text.
        next_cut: Where it may be cut; None for nowhere.
        size: Characters of a segment, at least; it then goes on up to the next cut.

    Returns:
        The segments, at least one.
    """
    if next_cut is None:
        return [text]
    segments = []
    start = 0
    while len(text) - start > size:
        cut = next_cut(text, start + size)
        if cut == len(text):
            break
        segments.append(text[start:cut])
        start = cut
    segments.append(text[start:])
    return segments


@dataclass(frozen=True)
class SegmentEncoder:
    """Encodes texts in segments, or whole where they may not be cut.

    Attributes:
        encode: Gives the ids of each of some segments.
        next_cut: Where texts may be cut; None for nowhere.
        dtype: Type of the ids.
        characters: The least length of a segment.
    """

    encode: Callable[[list[str]], Iterable[NDArray[Any]]]
    next_cut: NextCut | None
    dtype: type[Any]
    characters: int = SEGMENT_CHARACTERS

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[Any]]:
        """Returns the ids of each text, `[tokens]`."""
        cut = [split(text, self.next_cut, self.characters) for text in texts]
        pieces = chain.from_iterable(
            self.encode(list(group)) for group in batched(chain.from_iterable(cut), _GROUP)
        )
        # Unsafe is what NumPy calls int32 to uint16; every id of the vocabulary fits the dtype.
        return [
            np.concatenate(list(islice(pieces, len(segments))), dtype=self.dtype, casting="unsafe")
            for segments in cut
        ]


def cuts_between_words(pattern: str | None) -> NextCut | None:
    """Returns where texts may be cut for a byte-level tokenizer, None if that is not known.

    Its tokens stay within words, so a place where a word ends whatever follows, and where the next
    one starts whatever came before, is safe.

    Args:
        pattern: The regular expression that matches its words.
    """
    if pattern == GPT2_WORDS:
        return partial(_next_match, _GPT2_CUT)
    return partial(_next_match, _LATER_CUT) if pattern in LATER_WORDS else None


def _next_match(pattern: re.Pattern[str], text: str, start: int) -> int:
    found = pattern.search(text, start)
    return found.start() if found else len(text)
