"""The tokenizers of the data tools, which encode batches of texts into NumPy arrays.

For the same flags, `load_tokenizer` returns a tokenizer that makes the same ids as the one that
`megatron.core.tokenizers.utils.build_tokenizer` returns to the training program, and makes them
faster. The training program has another name for one type: see `ByteLevelTokenizer`.

A tokenizer works in one thread, so that the tools can run one process per core.
"""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_rw.data.tokenizers.huggingface_tokenizer import load_huggingface
from megatron_rw.data.tokenizers.library_tokenizer import load_core_tiktoken
from megatron_rw.data.tokenizers.sentencepiece_tokenizer import load_sentencepiece
from megatron_rw.data.tokenizers.tokenizer_flags import BYTE_LEVEL, TokenizerFlags
from megatron_rw.errors import UserError


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

        An array is empty if its text has no token. Raises a `ValueError` if the library cannot
        encode one of them, such as ten million spaces in a row, for which its regular expressions
        need too many steps.
        """

    def detokenize(self, ids: Sequence[int]) -> str:
        """Returns the text of ids, for people to read.

        Special tokens are shown or left out as the tokenizer's library does.
        """


class ByteLevelTokenizer:
    """Gives a text's UTF-8 bytes, and 256 as the end of document.

    Core's class of this name cannot be reached from the training program's flags, and its end of
    document and padding, 0 and 1, are bytes. What the training program needs to know of a
    tokenizer, it gets from `--tokenizer-type NullTokenizer --vocab-size 257`: the size, the last id
    as the end of document, and no padding id, so that the loss is taken off no byte.
    """

    vocab_size = 257
    eod: int | None = 256

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[Any]]:
        """See `Tokenizer`."""
        return [np.frombuffer(text.encode(), np.uint8).astype(np.uint16) for text in texts]

    def detokenize(self, ids: Sequence[int]) -> str:
        """Returns the text without ends of document; U+FFFD for what is no UTF-8."""
        return bytes(id_ for id_ in ids if id_ != 256).decode(errors="replace")


_LOADERS: dict[str, Callable[[TokenizerFlags], "Tokenizer"]] = {
    "SentencePieceTokenizer": load_sentencepiece,
    "GPTSentencePieceTokenizer": load_sentencepiece,
    "Llama2Tokenizer": load_sentencepiece,
    "HuggingFaceTokenizer": load_huggingface,
    "TikTokenizer": load_core_tiktoken,
}


def load_tokenizer(flags: TokenizerFlags) -> Tokenizer:
    """Loads the tokenizer that Megatron's `build_tokenizer` gives for the same flags.

    Raises a `UserError` if the model is not there or cannot be loaded.
    """
    if flags.tokenizer_type == BYTE_LEVEL:
        return ByteLevelTokenizer()
    if not Path(str(flags.tokenizer_model)).exists():
        raise UserError(
            f"--tokenizer-model {flags.tokenizer_model}: no such file; make one with "
            "tools/train_tokenizer.py"
        )
    return _LOADERS[flags.tokenizer_type](flags)


def model_sha256(model: str | None) -> str:
    """Returns the SHA-256 of a tokenizer model in hexadecimal.

    For a file it is what `sha256sum` prints. For a directory it is the digest of the lines
    `<sha256>  <relative path>` of its files, sorted by path. For ByteLevelTokenizer, which has no
    model, it is the digest of no bytes.
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
