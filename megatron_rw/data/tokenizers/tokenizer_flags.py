"""The command-line flags that choose a tokenizer, with Megatron's names and defaults."""

from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from tyro.conf import arg

from megatron_rw.errors import UserError

TokenizerType = Literal[
    "SentencePieceTokenizer",
    "GPTSentencePieceTokenizer",
    "Llama2Tokenizer",
    "HuggingFaceTokenizer",
    "TikTokenizer",
    "ByteLevelTokenizer",
]
TYPES: tuple[TokenizerType, ...] = get_args(TokenizerType)
BYTE_LEVEL: TokenizerType = "ByteLevelTokenizer"


@dataclass(frozen=True, kw_only=True)
class TokenizerOptions:
    """The flags of a tokenizer beside its type, with Megatron's names and defaults."""

    tokenizer_model: Annotated[str | None, arg(metavar="PATH")] = None
    """A SentencePiece .model, a Hugging Face directory, or a .json vocabulary of tiktoken."""
    vocab_size: Annotated[int | None, arg(metavar="N")] = None
    """For TikTokenizer: the number of token ids, special tokens included; Megatron takes 131072 if
    it is not given."""
    tokenizer_special_tokens: Annotated[tuple[str, ...] | None, arg(metavar="TOKEN [...]")] = None
    """For TikTokenizer and HuggingFaceTokenizer: special tokens to add."""
    tiktoken_pattern: Literal["v1", "v2"] | None = None
    """For TikTokenizer: how text is cut into words; Megatron takes v2 if it is not given."""
    tiktoken_num_special_tokens: Annotated[int, arg(metavar="N")] = 1000
    """For TikTokenizer: how many of the first ids are kept for special tokens."""
    tokenizer_sentencepiece_ignore_extra_whitespaces: bool = True
    """Keep runs of spaces that the SentencePiece model would fold."""
    tokenizer_hf_no_include_special_tokens: bool = False
    """Leave out the special tokens that a Hugging Face tokenizer puts around every text, such as
    <s>."""


@dataclass(frozen=True, kw_only=True)
class TokenizerFlags(TokenizerOptions):
    """The flags that choose a tokenizer; a `UserError` if they do not go together."""

    tokenizer_type: TokenizerType = "SentencePieceTokenizer"
    """The kind of tokenizer. ByteLevelTokenizer gives the UTF-8 bytes; train on them with
    --tokenizer-type NullTokenizer --vocab-size 257."""

    def __post_init__(self) -> None:
        if self.tokenizer_type not in TYPES:
            raise UserError(
                f"--tokenizer-type {self.tokenizer_type}: is not known; give one of "
                f"{', '.join(TYPES)}"
            )
        if self.tokenizer_type != BYTE_LEVEL and self.tokenizer_model is None:
            raise UserError(f"--tokenizer-type {self.tokenizer_type} needs a --tokenizer-model")
        if self.tokenizer_type == BYTE_LEVEL and self.tokenizer_model is not None:
            raise UserError(
                f"--tokenizer-type {BYTE_LEVEL} has no model; leave --tokenizer-model out"
            )
