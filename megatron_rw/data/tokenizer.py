"""Megatron's tokenizers, as the data tools use them."""

import hashlib
import importlib.util
from pathlib import Path
from typing import Any, Protocol, cast

from megatron_rw.data.command import InputError

# --tokenizer-type to the library of core's MegatronTokenizer: the types that a model path alone
# describes.
LIBRARIES = {
    "SentencePieceTokenizer": "sentencepiece",
    "GPTSentencePieceTokenizer": "sentencepiece",
    "Llama2Tokenizer": "sentencepiece",
    "HuggingFaceTokenizer": "huggingface",
}


class Tokenizer(Protocol):
    """The part of core's `MegatronTokenizerText` that the tools call."""

    @property
    def vocab_size(self) -> int:
        """Number of token ids, before any padding."""

    @property
    def eod(self) -> int | None:
        """The id that ends a document; None or negative if the model has none."""

    def tokenize(self, text: str) -> list[int]:
        """Returns the token ids of a text."""


def load_tokenizer(tokenizer_type: str, model: str) -> Tokenizer:
    """Loads a tokenizer as Megatron's `build_tokenizer` does for the same two flags.

    Args:
        tokenizer_type: A key of `LIBRARIES`.
        model: Path of the model: a file, or for Hugging Face a directory.

    Raises:
        InputError: If the model is not there or cannot be loaded.
    """
    if not Path(model).exists():
        raise InputError(
            f"--tokenizer-model {model}: no such file; make one with tools/train_tokenizer.py"
        )
    library = LIBRARIES[tokenizer_type]
    if library == "huggingface" and importlib.util.find_spec("transformers") is None:
        raise InputError(
            f"--tokenizer-type {tokenizer_type} needs a package that is not installed; "
            "run: pip install transformers"
        )
    from megatron.core.tokenizers import MegatronTokenizer

    try:
        return cast(
            Tokenizer,
            MegatronTokenizer.from_pretrained(
                tokenizer_path=model, metadata_path={"library": library}
            ),
        )
    except Exception as error:  # each library raises its own
        raise InputError(
            f"--tokenizer-model {model}: cannot be loaded as {tokenizer_type} ({error})"
        ) from error


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
