"""Encodes texts word by word and remembers the ids of words, as most words were seen before.

A word here is what a regular expression matches such that no token crosses its ends and nothing
beyond them changes its ids, whatever the text. That is proved from the tokenizer's definition, as
for `segments.NextCut`, and from two neighbouring characters alone: a word ends between them if they
are of different classes (letters, digits, others), and before white space. Characters for which
that would tear a token apart are of no class, and words do not end beside them.
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

from megatron_rw.data.tokenizers.safe_cuts import GPT2_WORDS, LATER_WORDS, SegmentEncoder, split

# Words that are remembered, twice, and the longest one: about 16 MB of English.
_WORDS, _LONGEST = 1 << 16, 64
# Characters of a text whose words are listed at a time.
_BLOCK = 1 << 16
# Where words cost more than segments, as where few recur, words rest so long that trying them now
# and then costs a twentieth. Batches of fewer characters tell nothing.
_REST_PER_LOSS, _LONGEST_REST, _TELLING = 20, 200, 1 << 14

_LETTER_OR_DIGIT = re.compile(r"[^\W_]")
_DIGIT = r"\d"


class WordEncoder:
    """Encodes texts word by word while that is faster than segments.

    Args:
        words: Matches any text, word by word.
        encode_word: Gives the ids of one word.
        segments: The other way, of a tokenizer whose texts may be cut; words end at every cut.
    """

    def __init__(
        self,
        words: re.Pattern[str],
        encode_word: Callable[[str], Sequence[int]],
        segments: SegmentEncoder,
    ) -> None:
        self.segments = segments
        self._words = words
        self._memory = _Memory(encode_word, np.dtype(segments.dtype).char)
        self._resting = 0
        self._segments_cost = 0.0  # seconds a character, when last seen

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[Any]]:
        """Returns the ids of each text, `[tokens]`."""
        resting = self._resting > 0
        start = process_time()
        encoded = self.segments.encode_batch(texts) if resting else list(map(self._encode, texts))
        characters = sum(map(len, texts))
        if characters >= _TELLING:
            self._judge(resting, (process_time() - start) / characters)
        return encoded

    def _judge(self, resting: bool, cost: float) -> None:
        if resting:
            self._segments_cost = cost
            self._resting -= 1
        elif self._segments_cost == 0:
            self._resting = 1
        elif cost > self._segments_cost:
            loss = cost / self._segments_cost - 1
            self._resting = min(_LONGEST_REST, math.ceil(_REST_PER_LOSS * loss))

    def _encode(self, text: str) -> NDArray[Any]:
        ids_of, words_of = self._memory.__getitem__, self._words.findall
        blocks = split(text, self.segments.next_cut, _BLOCK)
        ids = [b"".join(map(ids_of, words_of(block))) for block in blocks]
        return np.frombuffer(b"".join(ids), self.segments.dtype)


class _Memory(dict[str, bytes]):
    """Words to the bytes of their ids; a word that is missing is encoded.

    When it is full, it begins anew, and words that were there before are moved over when they are
    met again: those that recur stay.
    """

    def __init__(self, encode: Callable[[str], Sequence[int]], typecode: str) -> None:
        self._encode = encode
        self._typecode = typecode
        self._before: dict[str, bytes] = {}

    def __missing__(self, word: str) -> bytes:
        ids = self._before.get(word)
        if ids is None:
            ids = array(self._typecode, self._encode(word)).tobytes()
        if len(word) <= _LONGEST:
            if len(self) >= _WORDS:
                self._before = dict(self)
                self.clear()
            self[word] = ids
        return ids


def sentencepiece_words(pieces: Sequence[str], space: str) -> re.Pattern[str] | None:
    """Returns what matches the words of a byte-pair encoding with bytes for unknown characters.

    Args:
        pieces: The pieces that text can become, with spaces for the model's own character.
        space: The model's own character, which is the same to it as a space.

    Returns:
        The expression; None if a piece goes on after a space.
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
    r"""Returns what matches words, or several, of a byte-level tokenizer.

    The classes are of ASCII alone, so that no version of Unicode matters. An apostrophe is in none,
    as `'s` is a word, and in the patterns after GPT-2's what stands before a letter may belong to
    it. There, line ends belong to what is before them, but for a slash after them.

    Args:
        pattern: The regular expression that matches the tokenizer's words.
        added: The added tokens, which are looked for before words are.

    Returns:
        The expression; None if `pattern` is not known, or an added token has white space in it.
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

    Args:
        tokens: The tokens.
        words: Gives the expression without some characters, which are as in a character class.
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
