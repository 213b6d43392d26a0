"""The tokenizers of the data tools: Megatron's, encoding batches of texts into NumPy arrays.

`load_tokenizer` gives what `megatron.core.tokenizers.utils.build_tokenizer` gives the training
program for the same flags, id by id; only the way to the ids is faster. One type has another name
there: see `TokenizerFlags.training_flags`.

A tokenizer works in one thread, so that the tools can run one process per core.
"""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

from megatron_rw.data.tokenizers.byte_tokenizer import ByteLevelTokenizer
from megatron_rw.data.tokenizers.core_tokenizer import optimal_dtype
from megatron_rw.data.tokenizers.huggingface_tokenizer import load_huggingface
from megatron_rw.data.tokenizers.sentencepiece_tokenizer import load_sentencepiece
from megatron_rw.data.tokenizers.tiktoken_tokenizer import load_tiktoken
from megatron_rw.data.tokenizers.tokenizer_flags import (
    BYTE_LEVEL,
    SENTENCEPIECE_TYPES,
    TokenizerFlags,
    add_tokenizer_flags,
    tokenizer_flags,
)
from megatron_rw.errors import UserError

__all__ = [
    "Tokenizer",
    "TokenizerFlags",
    "add_tokenizer_flags",
    "end_of_document_id",
    "fingerprint",
    "load_tokenizer",
    "optimal_dtype",
    "tokenizer_flags",
]

_LOADERS: dict[str, Callable[[TokenizerFlags], "Tokenizer"]] = {
    **dict.fromkeys(SENTENCEPIECE_TYPES, load_sentencepiece),
    "HuggingFaceTokenizer": load_huggingface,
    "TikTokenizer": load_tiktoken,
}


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

        Raises:
            ValueError: If the library cannot encode one of them, as ten million spaces in a row
                for which its regular expressions need too many steps.
        """

    def detokenize(self, ids: Sequence[int]) -> str:
        """Returns the text of ids, for people to read.

        It is the text that was encoded where the tokenizer loses nothing. Special tokens are shown
        or left out as the tokenizer's library does.
        """


def load_tokenizer(flags: TokenizerFlags) -> Tokenizer:
    """Loads the tokenizer that Megatron's `build_tokenizer` gives for the same flags.

    Raises:
        UserError: If the model is not there or cannot be loaded.
    """
    if flags.type == BYTE_LEVEL:
        return ByteLevelTokenizer()
    if not Path(str(flags.model)).exists():
        raise UserError(
            f"--tokenizer-model {flags.model}: no such file; make one with tools/train_tokenizer.py"
        )
    try:
        return _LOADERS[flags.type](flags)
    except UserError:
        raise
    except Exception as error:  # each library raises its own
        raise UserError(
            f"--tokenizer-model {flags.model}: cannot be loaded as {flags.type} ({error})"
        ) from error


def end_of_document_id(tokenizer: Tokenizer, model: str) -> int:
    """Returns the id of the end-of-document token.

    Args:
        tokenizer: The tokenizer.
        model: Its path, for the message.

    Raises:
        UserError: If it has none.
    """
    eod = tokenizer.eod
    if eod is None or eod < 0:
        raise UserError(
            f"--append-eod: the tokenizer {model} has no end-of-document token; leave the flag "
            "out, or use a model that has one (tools/train_tokenizer.py makes one)"
        )
    return eod


def fingerprint(model: str | None) -> str:
    """Returns the SHA-256 of a tokenizer model in hexadecimal.

    For a file that is what `sha256sum` prints. For a directory it is the digest of the lines
    `<sha256>  <relative path>` of its files, sorted by path. Bytes, which have no model, have the
    digest of nothing.
    """
    if model is None:
        return hashlib.sha256().hexdigest()
    path = Path(model)
    if path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    lines = [
        f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.relative_to(path).as_posix()}\n"
        for file in sorted(path.rglob("*"))
        if file.is_file()
    ]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


model_sha256 = fingerprint
