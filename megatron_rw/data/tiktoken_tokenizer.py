"""tiktoken vocabularies, encoded in segments where that changes nothing."""

from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray

from megatron_rw.data.core_tokenizer import build_core_tokenizer, optimal_dtype, require_package
from megatron_rw.data.segments import (
    SEGMENT_CHARACTERS,
    after_a_word,
    encode_segments,
    separates_words,
    split,
)
from megatron_rw.data.tokenizer_flags import TokenizerFlags


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
        self._cuts = separates_words(self._encoding._pat_str) and not any(
            any(map(str.isspace, token)) for token in self._encoding.special_tokens_set
        )

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[Any]]:
        """See `tokenizer.Tokenizer`."""
        size = self._segment_characters
        segments = [split(text, after_a_word, size) if self._cuts else [text] for text in texts]
        return encode_segments(segments, self._encode, self._dtype)

    def _encode(self, segments: list[str]) -> list[NDArray[Any]]:
        encode = self._encoding.encode_to_numpy
        return [encode(segment, allowed_special="all") for segment in segments]

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
