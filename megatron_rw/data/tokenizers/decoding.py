"""From token ids back to text, with the tokenizer that made them."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, cast

from numpy.typing import NDArray

from megatron_rw.data.indexed.documents import DatasetReader
from megatron_rw.data.indexed.domains import TokenizerRecord
from megatron_rw.data.tokenizers.tokenizer import Tokenizer, load_tokenizer, model_sha256
from megatron_rw.data.tokenizers.tokenizer_flags import (
    BYTE_LEVEL,
    TokenizerFlags,
    TokenizerOptions,
    TokenizerType,
)
from megatron_rw.errors import UserError

_CONTEXT_CHARACTERS = 40


@dataclass(frozen=True, kw_only=True)
class DecodingFlags(TokenizerOptions):
    """The flags that choose the tokenizer of a dataset, which may leave that to domains.json."""

    tokenizer_type: TokenizerType | None = None
    """The kind of tokenizer; by default the one that domains.json names."""

    def is_named(self, record: TokenizerRecord | None) -> bool:
        """Whether the flags, or a record whose model is still there, name a tokenizer."""
        if self.tokenizer_model is not None or self.tokenizer_type == BYTE_LEVEL:
            return True
        return record is not None and (record.type == BYTE_LEVEL or Path(record.model).exists())

    def load(self, record: TokenizerRecord | None) -> Tokenizer:
        """Loads the tokenizer that the flags name, or else the one that made the dataset.

        Warns on standard error if it is not the one that made the dataset. Raises a `UserError` if
        no tokenizer is named, or its model is not there.
        """
        if not self.is_named(record):
            raise UserError(
                "no domains.json tells which tokenizer made this dataset; give --tokenizer-model"
                if record is None
                else f"{record.model}, the tokenizer that domains.json names, is not there; give "
                "--tokenizer-model"
            )
        settings = {field.name: getattr(self, field.name) for field in fields(DecodingFlags)}
        recorded = record.type if record is not None else "SentencePieceTokenizer"
        settings["tokenizer_type"] = self.tokenizer_type or cast(TokenizerType, recorded)
        if self.tokenizer_model is None and settings["tokenizer_type"] != BYTE_LEVEL and record:
            settings["tokenizer_model"] = record.model
        return _load(TokenizerFlags(**settings), record)


@cache  # the domains of a directory have one tokenizer, and a large one takes seconds to load
def _load(flags: TokenizerFlags, record: TokenizerRecord | None) -> Tokenizer:
    tokenizer = load_tokenizer(flags)
    if record is not None and (digest := model_sha256(flags.tokenizer_model)) != record.sha256:
        print(
            f"warning: {flags.tokenizer_model} is not the tokenizer that made this dataset: its "
            f"sha256 is {digest}, and domains.json says {record.sha256}",
            file=sys.stderr,
        )
    return tokenizer


def decode(tokenizer: Tokenizer, ids: NDArray[Any]) -> str:
    """Returns the text of token ids, [tokens].

    Raises a `UserError` if an id is beyond the tokenizer's vocabulary.
    """
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < tokenizer.vocab_size:
        raise UserError(
            f"a token id is {int(ids.max())}, and the tokenizer has {tokenizer.vocab_size}; give "
            "the --tokenizer-model that made this dataset"
        )
    return tokenizer.detokenize(ids.tolist())


def find(reader: DatasetReader, text: str, tokenizer: Tokenizer) -> Iterator[tuple[int, int, str]]:
    """Finds the documents of a dataset that contain a text.

    Every document is decoded, since other words around a text can change its tokens. Yields the
    number of the document, how often it contains the text, and the first occurrence with up to 40
    characters on either side.
    """
    for block in reader.blocks():
        ids = reader.read(block)
        start = 0
        for number, count in enumerate(block.tokens.tolist(), start=block.first):
            document = decode(tokenizer, ids[start : start + count])
            start += count
            if (place := document.find(text)) >= 0:
                begin = max(0, place - _CONTEXT_CHARACTERS)
                end = place + len(text) + _CONTEXT_CHARACTERS
                yield number, document.count(text), document[begin:end]
