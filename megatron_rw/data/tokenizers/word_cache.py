"""Encodes texts word by word and keeps the ids of words, since most words of a text occur often.

A word here is what a regular expression matches such that no token crosses its ends and no text
outside of it changes its ids. The tokenizer's definition proves that, as for `safe_cuts.NextCut`.
Whether a word ends between two characters depends on these two alone: it does if they are of
different classes (letters, digits, others), and before white space. A character for which that
would cut a token into two is in no class, and words do not end beside it.
"""

import math
import re
import string
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from time import process_time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_rw.data.tokenizers.safe_cuts import GPT2_WORDS, LATER_WORDS, CutTextEncoder, cut_text

# Words in each of the two halves of the cache, and characters of the longest word that is kept:
# about 16 MB of English.
_CACHED_WORDS, _LONGEST_WORD = 1 << 16, 64
_BLOCK_CHARACTERS = 1 << 16  # Characters of a text whose words are listed at a time.
# Where words are slower than segments, because few words recur, segments are used for so many
# batches that the occasional batch in words costs at most a twentieth of the time.
_BATCHES_PER_LOSS, _MOST_BATCHES = 20, 200
_LEAST_MEASURED = 1 << 14  # The time that a batch takes is measured from this many characters on.

_LETTER_OR_DIGIT = re.compile(r"[^\W_]")
_DIGIT = r"\d"


class CachedWordEncoder:
    """Encodes texts word by word while that is faster than in segments.

    `words` matches any text, word by word, and words end wherever `segments` may cut a text.
    """

    def __init__(
        self,
        words: re.Pattern[str],
        encode_word: Callable[[str], Sequence[int]],
        segments: CutTextEncoder,
    ) -> None:
        self.segments, self.dtype = segments, segments.dtype
        self._words = words
        self._cache = _WordCache(encode_word, np.dtype(segments.dtype).char)
        self._batches_in_segments = 0
        self._segment_cost = 0.0  # seconds per character, when last measured

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[Any]]:
        """Returns the ids of each text, `[tokens]`."""
        in_segments = self._batches_in_segments > 0
        start = process_time()
        encoded = (
            self.segments.encode_batch(texts) if in_segments else list(map(self._encode, texts))
        )
        characters = sum(map(len, texts))
        if characters >= _LEAST_MEASURED:
            self._choose_next(in_segments, (process_time() - start) / characters)
        return encoded

    def _choose_next(self, in_segments: bool, cost: float) -> None:
        if in_segments:
            self._segment_cost = cost
            self._batches_in_segments -= 1
        elif self._segment_cost == 0:
            self._batches_in_segments = 1
        elif cost > self._segment_cost:
            loss = cost / self._segment_cost - 1
            self._batches_in_segments = min(_MOST_BATCHES, math.ceil(_BATCHES_PER_LOSS * loss))

    def _encode(self, text: str) -> NDArray[Any]:
        ids_of, words_of = self._cache.__getitem__, self._words.findall
        blocks = cut_text(text, self.segments.next_cut, _BLOCK_CHARACTERS)
        ids = [b"".join(map(ids_of, words_of(block))) for block in blocks]
        return np.frombuffer(b"".join(ids), self.segments.dtype)


def encoder_in_words(
    segments: CutTextEncoder,
    words: re.Pattern[str] | None,
    encode_word: Callable[[str], Sequence[int]],
) -> CutTextEncoder | CachedWordEncoder:
    """Returns an encoder in words where texts may be cut and words are known, else in segments."""
    if segments.next_cut is None or words is None:
        return segments
    return CachedWordEncoder(words, encode_word, segments)


class _WordCache(dict[str, bytes]):
    """Maps words to the bytes of their ids, and encodes a word that is missing.

    When it is full, it starts again empty and keeps the words until then as a second half. Words
    that occur again are moved over from there, so that frequent words stay.
    """

    def __init__(self, encode: Callable[[str], Sequence[int]], typecode: str) -> None:
        self._encode = encode
        self._typecode = typecode
        self._before: dict[str, bytes] = {}

    def __missing__(self, word: str) -> bytes:
        ids = self._before.get(word)
        if ids is None:
            ids = array(self._typecode, self._encode(word)).tobytes()
        if len(word) <= _LONGEST_WORD:
            if len(self) >= _CACHED_WORDS:
                self._before = dict(self)
                self.clear()
            self[word] = ids
        return ids


def sentencepiece_words(pieces: Sequence[str], space: str) -> re.Pattern[str] | None:
    """Returns an expression for the words of a byte-pair encoding with bytes for rare characters.

    `space` is the model's own mark for a space, which it takes for a space in texts as well, and
    for which `pieces` have a space. Returns None if a piece has a space inside.
    """

    def words(stuck: set[str]) -> re.Pattern[str]:
        alone = "".join(sorted(stuck))
        others = rf"[^\w {space}{alone}]++"
        runs = [r"[^\W\d_]++", others if "_" in stuck else rf"(?:{others}|_++)++"]
        if _DIGIT not in stuck:
            runs.append(r"\d++")
        run = f"(?:{'|'.join(runs)})?+"
        return re.compile(rf"[ {space}]*+{run}" + (rf"(?:[{alone}]++{run})*+" if stuck else ""))

    return _that_keep_whole(pieces, words)


def byte_level_words(pattern: str | None, added: Iterable[str]) -> re.Pattern[str] | None:
    r"""Returns an expression that matches one or several words of a byte-level tokenizer.

    The classes hold ASCII characters only, so that the version of Unicode does not matter. The
    apostrophe is in none of them, as `'s` is a word. In the patterns that came after GPT-2's, a
    mark before a letter may belong to its word, and line ends belong to what is before them unless
    a slash follows. The tokenizer looks for its added tokens before it looks for words. Returns
    None if `pattern` is not known, or an added token has white space in it.
    """
    if pattern != GPT2_WORDS and pattern not in LATER_WORDS:
        return None
    later = pattern != GPT2_WORDS

    def words(stuck: set[str]) -> re.Pattern[str]:
        marks = [re.escape(mark) for mark in string.punctuation if mark != "'"]
        others = "".join(mark for mark in marks if mark not in stuck)
        digits = "" if _DIGIT in stuck else "0-9"
        runs = ["[A-Za-z]++"]
        if others:
            runs.append(f"[{others}]++" + ("[A-Za-z]*+" if later else ""))
        if digits:
            runs.append("[0-9]++")
        run = f"(?:{'|'.join(runs)})?+"
        word = rf"{run}(?:[^\sA-Za-z{digits}{others}]++{run})*+"
        if later:
            inner = r"[^\S \t]\s*+(?:(?<![\r\n])|(?=/))"
            return re.compile(rf"\s*+{word}(?:{inner}{word})*+(?:[^\S \t]\s*+)?+")
        return re.compile(rf"\s*+{word}(?:[^\S \t\r\n]\s*+{word})*+")

    return _that_keep_whole(list(added), words)


def _that_keep_whole(
    tokens: Sequence[str], words: Callable[[set[str]], re.Pattern[str]]
) -> re.Pattern[str] | None:
    """Takes characters out of their classes until no word ends inside a token.

    `words` returns the expression with some characters, written as in a character class, in no
    class. The result is None if a token has white space inside.
    """
    stuck: set[str] = set()
    while True:
        pattern = words(stuck)
        torn = {pair for token in tokens for pair in _borders(pattern, token)}
        if not torn:
            return pattern
        for before, after in torn:
            if after.isspace():
                return None
            # A mark rather than all digits; letters stay a class.
            others = [other for other in (before, after) if not _LETTER_OR_DIGIT.match(other)]
            stuck.add(re.escape(others[0]) if others else _DIGIT)


def _borders(pattern: re.Pattern[str], text: str) -> Iterator[tuple[str, str]]:
    """Yields the characters before and after each end of a word inside a text."""
    for match in pattern.finditer(text):
        if 0 < match.end() < len(text):
            yield text[match.end() - 1], text[match.end()]
