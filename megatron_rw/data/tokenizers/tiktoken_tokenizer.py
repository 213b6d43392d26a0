"""Vocabularies of tiktoken, encoded in words or segments where that changes no id."""

import re
from itertools import chain
from typing import Any

from numpy.typing import NDArray

from megatron_rw.data.tokenizers.core_tokenizer import (
    build_core_tokenizer,
    optimal_dtype,
    require_package,
)
from megatron_rw.data.tokenizers.library_tokenizer import LibraryTokenizer
from megatron_rw.data.tokenizers.safe_cuts import (
    SEGMENT_CHARACTERS,
    CutTextEncoder,
    cuts_between_words,
)
from megatron_rw.data.tokenizers.tokenizer_flags import TokenizerFlags
from megatron_rw.data.tokenizers.word_cache import byte_level_words, encoder_in_words


def load_tiktoken(
    flags: TokenizerFlags, segment_characters: int = SEGMENT_CHARACTERS
) -> LibraryTokenizer:
    """Loads core's kind of tiktoken vocabulary.

    As core does, the tokenizer takes a special token's name in a text for that token. A special
    token with white space in its name keeps texts from being cut.

    Raises:
        UserError: If tiktoken is not installed, or the vocabulary cannot be loaded.
    """
    require_package("tiktoken", f"--tokenizer-type {flags.tokenizer_type}")
    core = build_core_tokenizer(flags)
    encoding = core._tokenizer.tokenizer
    special = encoding.special_tokens_set
    special_token = re.compile("|".join(map(re.escape, special)))

    def encode(segments: list[str]) -> list[NDArray[Any]]:
        return [encoding.encode_to_numpy(segment, allowed_special="all") for segment in segments]

    def encode_word(word: str) -> list[int]:
        if special_token.search(word):
            return list(encoding.encode(word, allowed_special="all"))
        # With core's thousand special tokens each call would take a hundred times as long.
        return list(encoding.encode_ordinary(word))

    may_be_cut = not any(map(str.isspace, chain.from_iterable(special)))
    next_cut = cuts_between_words(encoding._pat_str) if may_be_cut else None
    segments = CutTextEncoder(encode, next_cut, optimal_dtype(core.vocab_size), segment_characters)
    words = byte_level_words(encoding._pat_str, special)
    encoder = encoder_in_words(segments, words, encode_word)
    return LibraryTokenizer(core.vocab_size, core.eod, encoder, encoding.decode)
