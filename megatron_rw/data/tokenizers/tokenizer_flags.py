"""The command-line flags that choose a tokenizer, with Megatron's names and defaults."""

from argparse import ArgumentParser, Namespace
from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import arg

from megatron_rw.data.tokenizers import byte_tokenizer
from megatron_rw.errors import UserError

SENTENCEPIECE_TYPES = ("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer")
# Types that need a --tokenizer-model.
MODEL_TYPES = (*SENTENCEPIECE_TYPES, "HuggingFaceTokenizer", "TikTokenizer")
BYTE_LEVEL = "ByteLevelTokenizer"
TYPES = (*MODEL_TYPES, BYTE_LEVEL)


@dataclass(frozen=True)
class TokenizerFlags:
    """The flags that choose a tokenizer, with Megatron's names and defaults.

    Attributes:
        type: `--tokenizer-type`, one of `TYPES`.
        model: `--tokenizer-model`: a file, or for Hugging Face a directory. None for bytes.
        vocab_size: `--vocab-size`, of TikTokenizer alone: its special tokens and ranks.
        special_tokens: `--tokenizer-special-tokens`, of TikTokenizer and HuggingFaceTokenizer.
        tiktoken_pattern: `--tiktoken-pattern`, "v1" or "v2".
        tiktoken_num_special_tokens: `--tiktoken-num-special-tokens`.
        sentencepiece_ignore_extra_whitespaces: Not
            `--no-tokenizer-sentencepiece-ignore-extra-whitespaces`.
        hf_include_special_tokens: Not `--tokenizer-hf-no-include-special-tokens`.
    """

    type: Annotated[str, arg(name="tokenizer-type")] = "SentencePieceTokenizer"
    model: Annotated[str | None, arg(name="tokenizer-model")] = None
    vocab_size: int | None = None
    special_tokens: Annotated[tuple[str, ...] | None, arg(name="tokenizer-special-tokens")] = None
    tiktoken_pattern: Literal["v1", "v2"] | None = None
    tiktoken_num_special_tokens: int = 1000
    sentencepiece_ignore_extra_whitespaces: Annotated[
        bool, arg(name="tokenizer-sentencepiece-ignore-extra-whitespaces")
    ] = True
    hf_include_special_tokens: Annotated[bool, arg(name="hf-include-special-tokens")] = True

    def __post_init__(self) -> None:
        if self.type in MODEL_TYPES and self.model is None:
            raise UserError(f"--tokenizer-type {self.type} needs a --tokenizer-model")
        if self.type == BYTE_LEVEL and self.model is not None:
            raise UserError(
                f"--tokenizer-type {BYTE_LEVEL} has no model; leave --tokenizer-model out"
            )

    @property
    def tokenizer_type(self) -> str:
        """`--tokenizer-type`."""
        return self.type

    @property
    def tokenizer_model(self) -> str | None:
        """`--tokenizer-model`."""
        return self.model

    def training_flags(self) -> list[str]:
        """Returns the flags that give the training program this tokenizer."""
        if self.type == BYTE_LEVEL:
            size = str(byte_tokenizer.VOCAB_SIZE)
            return ["--tokenizer-type", "NullTokenizer", "--vocab-size", size]
        flags = ["--tokenizer-type", self.type, "--tokenizer-model", str(self.model)]
        if self.vocab_size is not None:
            flags += ["--vocab-size", str(self.vocab_size)]
        if self.special_tokens is not None:
            flags += ["--tokenizer-special-tokens", *self.special_tokens]
        if self.type == "TikTokenizer":
            if self.tiktoken_pattern is not None:
                flags += ["--tiktoken-pattern", self.tiktoken_pattern]
            flags += ["--tiktoken-num-special-tokens", str(self.tiktoken_num_special_tokens)]
        if not self.sentencepiece_ignore_extra_whitespaces:
            flags.append("--no-tokenizer-sentencepiece-ignore-extra-whitespaces")
        if not self.hf_include_special_tokens:
            flags.append("--tokenizer-hf-no-include-special-tokens")
        return flags


def add_tokenizer_flags(parser: ArgumentParser) -> None:
    """Adds the flags of `TokenizerFlags` to a tool's command line."""
    defaults = TokenizerFlags(BYTE_LEVEL)
    group = parser.add_argument_group("tokenizer", "with the names and defaults of Megatron")
    group.add_argument(
        "--tokenizer-type",
        choices=TYPES,
        default="SentencePieceTokenizer",
        metavar="TYPE",
        help=f"{', '.join(TYPES)} (%(default)s); {BYTE_LEVEL} gives the UTF-8 bytes and is "
        "trained with --tokenizer-type NullTokenizer --vocab-size 257",
    )
    group.add_argument(
        "--tokenizer-model",
        metavar="PATH",
        help="a SentencePiece .model, a Hugging Face directory, or tiktoken's .json vocabulary",
    )
    group.add_argument(
        "--vocab-size", type=int, metavar="N", help="of TikTokenizer: number of token ids (131072)"
    )
    group.add_argument(
        "--tokenizer-special-tokens",
        nargs="+",
        dest="special_tokens",
        metavar="TOKEN",
        help="of TikTokenizer and HuggingFaceTokenizer",
    )
    group.add_argument(
        "--tiktoken-pattern", choices=["v1", "v2"], help="how text is cut into words (v2)"
    )
    group.add_argument(
        "--tiktoken-num-special-tokens",
        type=int,
        default=defaults.tiktoken_num_special_tokens,
        metavar="N",
        help="first ids, kept for special tokens (%(default)s)",
    )
    group.add_argument(
        "--no-tokenizer-sentencepiece-ignore-extra-whitespaces",
        dest="tokenizer_sentencepiece_ignore_extra_whitespaces",
        action="store_false",
        help="keep runs of spaces that the SentencePiece model would fold",
    )
    group.add_argument(
        "--tokenizer-hf-no-include-special-tokens",
        action="store_true",
        help="leave out what a Hugging Face tokenizer puts around every text, as <s>",
    )


def tokenizer_flags(args: Namespace) -> TokenizerFlags:
    """Returns the flags of a command line that `add_tokenizer_flags` prepared.

    Raises:
        UserError: If they do not go together.
    """
    return TokenizerFlags(
        type=args.tokenizer_type,
        model=args.tokenizer_model,
        vocab_size=args.vocab_size,
        special_tokens=None if args.special_tokens is None else tuple(args.special_tokens),
        tiktoken_pattern=args.tiktoken_pattern,
        tiktoken_num_special_tokens=args.tiktoken_num_special_tokens,
        sentencepiece_ignore_extra_whitespaces=args.tokenizer_sentencepiece_ignore_extra_whitespaces,
        hf_include_special_tokens=not args.tokenizer_hf_no_include_special_tokens,
    )
