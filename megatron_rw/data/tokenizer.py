"""The tokenizers of the data tools: Megatron's, encoding batches of texts into NumPy arrays.

`load_tokenizer` gives what `megatron.core.tokenizers.utils.build_tokenizer` gives the training
program for the same flags, id by id; only the way to the ids is faster. One type has another name
there: see `TokenizerFlags.training_flags`.

A tokenizer works in one thread, so that the tools can run one process per core.
"""

import hashlib
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from megatron_rw.data.command import InputError

SENTENCEPIECE_TYPES = ("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer")
# Types that need a --tokenizer-model.
MODEL_TYPES = (*SENTENCEPIECE_TYPES, "HuggingFaceTokenizer", "TikTokenizer")
BYTE_LEVEL = "ByteLevelTokenizer"
TYPES = (*MODEL_TYPES, BYTE_LEVEL)


class Tokenizer(Protocol):
    """What the tools need of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """Number of token ids, before any padding."""

    @property
    def eod(self) -> int | None:
        """The id that ends a document; None or negative if the model has none."""

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[Any]]:
        """Returns the ids of each text, `[tokens]` of `optimal_dtype(vocab_size)`.

        Empty for a text that has no token, as the empty one.
        """

    def detokenize(self, ids: Sequence[int]) -> str:
        """Returns the text of ids, for people to read.

        It is the text that was encoded where the tokenizer loses nothing. Special tokens are shown
        or left out as the tokenizer's library does.
        """


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

    type: str
    model: str | None = None
    vocab_size: int | None = None
    special_tokens: tuple[str, ...] | None = None
    tiktoken_pattern: str | None = None
    tiktoken_num_special_tokens: int = 1000
    sentencepiece_ignore_extra_whitespaces: bool = True
    hf_include_special_tokens: bool = True

    def __post_init__(self) -> None:
        if self.type in MODEL_TYPES and self.model is None:
            raise InputError(f"--tokenizer-type {self.type} needs a --tokenizer-model")
        if self.type == BYTE_LEVEL and self.model is not None:
            raise InputError(
                f"--tokenizer-type {BYTE_LEVEL} has no model; leave --tokenizer-model out"
            )

    def training_flags(self) -> list[str]:
        """Returns the flags that give the training program this tokenizer."""
        if self.type == BYTE_LEVEL:
            from megatron_rw.data.byte_tokenizer import VOCAB_SIZE

            return ["--tokenizer-type", "NullTokenizer", "--vocab-size", str(VOCAB_SIZE)]
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
        InputError: If they do not go together.
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


def load_tokenizer(flags: TokenizerFlags) -> Tokenizer:
    """Loads the tokenizer that Megatron's `build_tokenizer` gives for the same flags.

    Raises:
        InputError: If the model is not there or cannot be loaded.
    """
    if flags.type == BYTE_LEVEL:
        from megatron_rw.data.byte_tokenizer import ByteLevelTokenizer

        return ByteLevelTokenizer()
    if not Path(str(flags.model)).exists():
        raise InputError(
            f"--tokenizer-model {flags.model}: no such file; make one with tools/train_tokenizer.py"
        )
    try:
        core = build_core_tokenizer(flags)
    except Exception as error:  # each library raises its own
        raise InputError(
            f"--tokenizer-model {flags.model}: cannot be loaded as {flags.type} ({error})"
        ) from error
    return CoreTokenizer(core)


def build_core_tokenizer(flags: TokenizerFlags) -> Any:
    """Returns Megatron's own tokenizer, a `MegatronTokenizerText`."""
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

    return build_tokenizer(
        Namespace(
            tokenizer_type=flags.type,
            tokenizer_model=flags.model,
            vocab_size=flags.vocab_size,
            special_tokens=None if flags.special_tokens is None else list(flags.special_tokens),
            tiktoken_pattern=flags.tiktoken_pattern,
            tiktoken_num_special_tokens=flags.tiktoken_num_special_tokens,
            tokenizer_sentencepiece_ignore_extra_whitespaces=(
                flags.sentencepiece_ignore_extra_whitespaces
            ),
            tokenizer_hf_no_include_special_tokens=not flags.hf_include_special_tokens,
            # The rest changes no id, or is not offered by the tools; Megatron's defaults.
            tokenizer_sentencepiece_legacy=False,
            tokenizer_hf_no_use_fast=False,
            trust_remote_code=False,
            vocab_file=None,
            merge_file=None,
            chat_template=None,
            metadata_path=None,
            pad_vocab_size=False,
        )
    )


class CoreTokenizer:
    """Encodes text by text, whole, with Megatron's own class.

    Args:
        core: A `MegatronTokenizerText`.
    """

    def __init__(self, core: Any) -> None:
        self._core = core
        self.vocab_size: int = core.vocab_size
        self.eod: int | None = core.eod
        self._dtype = optimal_dtype(self.vocab_size)

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[Any]]:
        """See `Tokenizer`."""
        return [np.array(self._core.tokenize(text), dtype=self._dtype) for text in texts]

    def detokenize(self, ids: Sequence[int]) -> str:
        """See `Tokenizer`."""
        return str(self._core.detokenize([int(id_) for id_ in ids]))


def end_of_document_id(tokenizer: Tokenizer, model: str) -> int:
    """Returns the id of the end-of-document token.

    Args:
        tokenizer: The tokenizer.
        model: Its path, for the message.

    Raises:
        InputError: If it has none.
    """
    eod = tokenizer.eod
    if eod is None or eod < 0:
        raise InputError(
            f"--append-eod: the tokenizer {model} has no end-of-document token; leave the flag "
            "out, or use a model that has one (tools/train_tokenizer.py makes one)"
        )
    return eod


def fingerprint(model: str) -> str:
    """Returns the SHA-256 of a tokenizer model in hexadecimal.

    For a file that is what `sha256sum` prints. For a directory it is the digest of the lines
    `<sha256>  <relative path>` of its files, sorted by path.
    """
    path = Path(model)
    if path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    lines = [
        f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.relative_to(path).as_posix()}\n"
        for file in sorted(path.rglob("*"))
        if file.is_file()
    ]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def optimal_dtype(vocab_size: int) -> type[Any]:
    """Returns the NumPy type in which Megatron stores the ids of a vocabulary of this size."""
    from megatron.core.datasets.indexed_dataset import DType

    return cast(type[Any], DType.optimal_dtype(vocab_size))
