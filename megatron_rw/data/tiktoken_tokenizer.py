"""tiktoken vocabularies, encoded in words or segments where that changes nothing."""

import re
from collections.abc import Sequence
from itertools import chain
from typing import Any

from numpy.typing import NDArray

from megatron_rw.data.core_tokenizer import build_core_tokenizer, optimal_dtype, require_package
from megatron_rw.data.segments import (
    SEGMENT_CHARACTERS,
    cuts_between_words,
    encode_segments,
    split,
)
from megatron_rw.data.tokenizer_flags import TokenizerFlags
from megatron_rw.data.words import WordEncoder, byte_level_words


class TikTokenizer:
    """Encodes with the `tiktoken.Encoding` of core's class, into arrays.

    As core does, it takes a special token's name in a text for that token. A special token with
    white space in its name keeps texts from being cut.

    Args:
        core: A `MegatronTokenizerText` over core's TikTokenTokenizer.
        segment_characters: The least length of a segment.
    """

    def __init__(self, core: Any, segment_characters: int = SEGMENT_CHARACTERS) -> None:
        self.vocab_size: int = core.vocab_size
        self.eod: int | None = core.eod
        self._dtype = optimal_dtype(self.vocab_size)
        self._encoding = core._tokenizer.tokenizer
        self._segment_characters = segment_characters
        special = self._encoding.special_tokens_set
        self._special_token = re.compile("|".join(map(re.escape, special)))
        self._next_cut = None
        self._words: WordEncoder | None = None
        if not any(map(str.isspace, chain.from_iterable(special))):
            self._next_cut = cuts_between_words(self._encoding._pat_str)
        words = byte_level_words(self._encoding._pat_str, special)
        if self._next_cut is not None and words is not None:
            self._words = WordEncoder(
                words, self._next_cut, self._encode_word, self._encode_segments, self._dtype
            )

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[Any]]:
        """See `tokenizer.Tokenizer`."""
        return self._words.encode_batch(texts) if self._words else self._encode_segments(texts)

    def _encode_segments(self, texts: Sequence[str]) -> list[NDArray[Any]]:
        segments = [split(text, self._next_cut, self._segment_characters) for text in texts]
        return encode_segments(segments, self._encode, self._dtype)

    def _encode(self, segments: list[str]) -> list[NDArray[Any]]:
        encode = self._encoding.encode_to_numpy
        return [encode(segment, allowed_special="all") for segment in segments]

    def _encode_word(self, word: str) -> list[int]:
        if self._special_token.search(word):
            return list(self._encoding.encode(word, allowed_special="all"))
        # With core's thousand special tokens each call would take a hundred times as long.
        return list(self._encoding.encode_ordinary(word))

    def detokenize(self, ids: Sequence[int]) -> str:
        """See `tokenizer.Tokenizer`; U+FFFD for what is no UTF-8."""
        return str(self._encoding.decode([int(id_) for id_ in ids]))


def load_tiktoken(flags: TokenizerFlags) -> TikTokenizer:
    """Loads core's kind of tiktoken vocabulary.

    Raises:
        InputError: If tiktoken is not installed.
    """
    require_package("tiktoken", flags.type)
    return TikTokenizer(build_core_tokenizer(flags))
