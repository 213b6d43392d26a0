"""Tokenizers of libraries, Megatron's own among them, as the data tools call them."""

import importlib.util
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_rw.data.tokenizers.safe_cuts import CutTextEncoder
from megatron_rw.data.tokenizers.tokenizer_flags import TokenizerFlags
from megatron_rw.data.tokenizers.word_cache import CachedWordEncoder
from megatron_rw.errors import UserError
from megatron_rw.platform.quiet import silence


@dataclass(frozen=True)
class LibraryTokenizer:
    """Encodes with the tokenizer of a library, into arrays; see `tokenizer.Tokenizer`."""

    vocab_size: int
    eod: int | None
    encoder: CutTextEncoder | CachedWordEncoder  # Encodes texts, without `prefix` and `around`.
    decode: Callable[[list[int]], str]  # Returns the text of ids.
    prefix: str = ""  # Text to put before every text that is not empty.
    # Ids to put before and after the ids of every text.
    around: tuple[Sequence[int], Sequence[int]] = ((), ())

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[Any]]:
        """Returns the ids of each text, `[tokens]`."""
        if self.prefix:
            texts = [text and self.prefix + text for text in texts]
        encoded = self.encoder.encode_batch(texts)
        if not any(self.around):
            return encoded
        before, after = (np.array(ids, self.encoder.dtype) for ids in self.around)
        return [np.concatenate((before, ids, after)) for ids in encoded]

    def detokenize(self, ids: Sequence[int]) -> str:
        """Returns the text of ids, for people to read."""
        return self.decode([int(id_) for id_ in ids])


def build_core_tokenizer(flags: TokenizerFlags) -> Any:
    """Returns what the training program builds from the same flags, a `MegatronTokenizerText`.

    The import takes seconds, as it imports torch. Raises a `UserError` if the model cannot be
    loaded.
    """
    silence("cpu")
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

    settings = {field.name: getattr(flags, field.name) for field in fields(TokenizerFlags)}
    special = settings.pop("tokenizer_special_tokens")
    arguments = Namespace(
        **settings,
        special_tokens=None if special is None else list(special),
        # These change no id, or the tools do not offer them; the values are Megatron's defaults.
        tokenizer_sentencepiece_legacy=False,
        tokenizer_hf_no_use_fast=False,
        trust_remote_code=False,
        vocab_file=None,
        merge_file=None,
        chat_template=None,
        metadata_path=None,
        pad_vocab_size=False,
    )
    with library_errors(flags):
        return build_tokenizer(arguments)


@contextmanager
def library_errors(flags: TokenizerFlags) -> Iterator[None]:
    """Reports a model that a library cannot load as the user's mistake.

    Raises a `UserError` if the body, a call of the library, raises any exception; each library has
    its own.
    """
    try:
        yield
    except Exception as error:
        raise UserError(
            f"--tokenizer-model {flags.tokenizer_model}: cannot be loaded as "
            f"{flags.tokenizer_type} ({error}); give one of that type, or another --tokenizer-type"
        ) from error


def whole_text_tokenizer(core: Any) -> LibraryTokenizer:
    """Returns a tokenizer that encodes whole texts with Megatron's `MegatronTokenizerText`."""
    dtype = optimal_dtype(core.vocab_size)

    def encode(texts: list[str]) -> list[NDArray[Any]]:
        return [np.array(core.tokenize(text), dtype) for text in texts]

    encoder = CutTextEncoder(encode, None, dtype)
    return LibraryTokenizer(core.vocab_size, core.eod, encoder, core.detokenize)


def load_core_tiktoken(flags: TokenizerFlags) -> LibraryTokenizer:
    """Loads core's kind of tiktoken vocabulary, whose own encoding of a whole text is fast.

    Raises a `UserError` if tiktoken is not installed, or the vocabulary cannot be loaded.
    """
    require_package("tiktoken", f"--tokenizer-type {flags.tokenizer_type}")
    return whole_text_tokenizer(build_core_tokenizer(flags))


def require_package(name: str, needed_for: str) -> None:
    """Checks that an optional package is installed; a `UserError` if not."""
    if importlib.util.find_spec(name) is None:
        raise UserError(
            f"{needed_for} needs a package that is not installed; run: pip install {name}"
        )


def optimal_dtype(vocab_size: int) -> type[Any]:
    """Returns the type of a stored id, as core's `DType.optimal_dtype`, whose import is slow."""
    return np.uint16 if vocab_size < 65500 else np.int32
