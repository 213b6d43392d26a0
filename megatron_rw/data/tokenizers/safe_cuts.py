"""Cuts long texts into short segments that a tokenizer encodes to the same ids.

The memory of a tokenizer grows with the length of a text, and so does the time per character of
byte-pair encoding; segments of a few lines stay in the processor's caches. A text may be cut
(`NextCut`) only where the tokenizer's definition proves that no token crosses the cut and that
neither side changes the ids of the other.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import batched, chain, islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Returns the first place, at or after a position, where a text may be cut; if there is none, the
# text's length.
NextCut = Callable[[str, int], int]

# Slightly faster than other sizes from 300 to 16,000, for SentencePiece and Hugging Face together.
SEGMENT_CHARACTERS = 1000
_GROUP = 100  # Segments that are encoded at a time, to bound the memory of the libraries.

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
    # Tekken
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
# White space after something always starts a match of GPT-2's pattern.
_GPT2_CUT = re.compile(r"(?<=\S)[ \t\r\n]")
# In the later patterns line ends may belong to the punctuation before them, with a slash after
# them, but are matched all together: the last one ends a match.
_LATER_CUT = re.compile(r"(?<=\S)[ \t]|(?<=[\r\n])(?=[^\s/])")


def cut_text(text: str, next_cut: NextCut | None, size: int) -> list[str]:
    """Cuts a text into segments, at least one.

    Each but the last has at least `size` characters and extends to the next cut.
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
class CutTextEncoder:
    """Encodes texts in segments, or whole where they may not be cut."""

    # Returns the ids of each segment of a list.
    encode: Callable[[list[str]], Iterable[NDArray[Any]]]
    next_cut: NextCut | None  # Where texts may be cut; None if they may not.
    dtype: type[Any]
    characters: int = SEGMENT_CHARACTERS  # The least length of a segment.

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[Any]]:
        """Returns the ids of each text, `[tokens]`."""
        cut = [cut_text(text, self.next_cut, self.characters) for text in texts]
        pieces = chain.from_iterable(
            self.encode(list(group)) for group in batched(chain.from_iterable(cut), _GROUP)
        )
        # NumPy calls int32 to uint16 unsafe, but every id of the vocabulary fits the dtype.
        return [
            np.concatenate(list(islice(pieces, len(segments))), dtype=self.dtype, casting="unsafe")
            for segments in cut
        ]


def cuts_between_words(pattern: str | None) -> NextCut | None:
    """Returns where texts may be cut for a byte-level tokenizer; None if that is not known.

    Its tokens stay within words. So a cut is safe where one word ends whatever follows, and the
    next word starts whatever comes before.
    """
    if pattern == GPT2_WORDS:
        return partial(_next_match, _GPT2_CUT)
    return partial(_next_match, _LATER_CUT) if pattern in LATER_WORDS else None


def _next_match(pattern: re.Pattern[str], text: str, start: int) -> int:
    found = pattern.search(text, start)
    return found.start() if found else len(text)
