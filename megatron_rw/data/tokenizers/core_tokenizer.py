"""Megatron's own tokenizers, built from the flags of the data tools."""

import importlib.util
from argparse import Namespace
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from megatron_rw.data.tokenizers.tokenizer_flags import TokenizerFlags
from megatron_rw.errors import UserError


def build_core_tokenizer(flags: TokenizerFlags) -> Any:
    """Returns what the training program builds from the same flags, a `MegatronTokenizerText`."""
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

    special = flags.tokenizer_special_tokens
    return build_tokenizer(
        Namespace(
            tokenizer_type=flags.tokenizer_type,
            tokenizer_model=flags.tokenizer_model,
            vocab_size=flags.vocab_size,
            special_tokens=None if special is None else list(special),
            tiktoken_pattern=flags.tiktoken_pattern,
            tiktoken_num_special_tokens=flags.tiktoken_num_special_tokens,
            tokenizer_sentencepiece_ignore_extra_whitespaces=(
                flags.tokenizer_sentencepiece_ignore_extra_whitespaces
            ),
            tokenizer_hf_no_include_special_tokens=(flags.tokenizer_hf_no_include_special_tokens),
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
        """See `tokenizer.Tokenizer`."""
        return [np.array(self._core.tokenize(text), dtype=self._dtype) for text in texts]

    def detokenize(self, ids: Sequence[int]) -> str:
        """See `tokenizer.Tokenizer`."""
        return str(self._core.detokenize([int(id_) for id_ in ids]))


def require_package(name: str, needed_by: str) -> None:
    """Sees that an optional package is installed.

    Raises:
        UserError: If it is not.
    """
    if importlib.util.find_spec(name) is None:
        raise UserError(
            f"--tokenizer-type {needed_by} needs a package that is not installed; "
            f"run: pip install {name}"
        )


def optimal_dtype(vocab_size: int) -> type[Any]:
    """Returns the NumPy type in which Megatron stores the ids of a vocabulary of this size."""
    from megatron.core.datasets.indexed_dataset import DType

    return cast(type[Any], DType.optimal_dtype(vocab_size))
