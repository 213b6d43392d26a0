"""Megatron's own tokenizers, built from the flags of the data tools."""

import importlib.util
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_rw.data.tokenizers.library_tokenizer import LibraryTokenizer
from megatron_rw.data.tokenizers.safe_cuts import CutTextEncoder
from megatron_rw.data.tokenizers.tokenizer_flags import TokenizerFlags
from megatron_rw.errors import UserError
from megatron_rw.platform.quiet import silence


def build_core_tokenizer(flags: TokenizerFlags) -> Any:
    """Returns what the training program builds from the same flags, a `MegatronTokenizerText`.

    The import takes seconds, as it imports torch.

    Raises:
        UserError: If the model cannot be loaded.
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

    Raises:
        UserError: If the body, a call of the library, raises any exception; each library has its
            own.
    """
    try:
        yield
    except Exception as error:
        raise UserError(
            f"--tokenizer-model {flags.tokenizer_model}: cannot be loaded as "
            f"{flags.tokenizer_type} ({error})"
        ) from error


def whole_text_tokenizer(core: Any) -> LibraryTokenizer:
    """Returns a tokenizer that encodes one whole text after the other with Megatron's own class.

    Args:
        core: A `MegatronTokenizerText`.
    """
    dtype = optimal_dtype(core.vocab_size)

    def encode(texts: list[str]) -> list[NDArray[Any]]:
        return [np.array(core.tokenize(text), dtype) for text in texts]

    encoder = CutTextEncoder(encode, None, dtype)
    return LibraryTokenizer(core.vocab_size, core.eod, encoder, core.detokenize)


def load_core_tiktoken(flags: TokenizerFlags) -> LibraryTokenizer:
    """Loads core's kind of tiktoken vocabulary, whose own encoding of a whole text is fast.

    Raises:
        UserError: If tiktoken is not installed, or the vocabulary cannot be loaded.
    """
    require_package("tiktoken", f"--tokenizer-type {flags.tokenizer_type}")
    return whole_text_tokenizer(build_core_tokenizer(flags))


def require_package(name: str, needed_for: str) -> None:
    """Checks that an optional package is installed.

    Raises:
        UserError: If it is not.
    """
    if importlib.util.find_spec(name) is None:
        raise UserError(
            f"{needed_for} needs a package that is not installed; run: pip install {name}"
        )


def optimal_dtype(vocab_size: int) -> type[Any]:
    """Returns the NumPy type in which Megatron stores the ids of a vocabulary of this size.

    The rule is that of core's `DType.optimal_dtype`, whose import takes seconds.
    """
    return np.uint16 if vocab_size < 65500 else np.int32
