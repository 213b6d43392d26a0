"""tiktoken vocabularies, encoded in words or segments where that changes nothing."""

import re
from collections.abc import Sequence
from itertools import chain
from typing import Any

from numpy.typing import NDArray

from megatron_rw.data.tokenizers.core_tokenizer import (
    build_core_tokenizer,
    optimal_dtype,
    require_package,
)
from megatron_rw.data.tokenizers.safe_cuts import (
    SEGMENT_CHARACTERS,
    CutTextEncoder,
    cuts_between_words,
)
from megatron_rw.data.tokenizers.tokenizer_flags import TokenizerFlags
from megatron_rw.data.tokenizers.word_cache import CachedWordEncoder, byte_level_words


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
        self._encoding = core._tokenizer.tokenizer
        special = self._encoding.special_tokens_set
        self._special_token = re.compile("|".join(map(re.escape, special)))
        next_cut = None
        if not any(map(str.isspace, chain.from_iterable(special))):
            next_cut = cuts_between_words(self._encoding._pat_str)
        segments = CutTextEncoder(
            self._encode, next_cut, optimal_dtype(self.vocab_size), segment_characters
        )
        self._encoder: CutTextEncoder | CachedWordEncoder = segments
        words = byte_level_words(self._encoding._pat_str, special)
        if next_cut and words:
            self._encoder = CachedWordEncoder(words, self._encode_word, segments)

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[Any]]:
        """See `tokenizer.Tokenizer`."""
        return self._encoder.encode_batch(texts)

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
        UserError: If tiktoken is not installed.
    """
    require_package("tiktoken", f"--tokenizer-type {flags.tokenizer_type}")
    return TikTokenizer(build_core_tokenizer(flags))
