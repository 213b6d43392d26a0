"""From token ids back to text, with the tokenizer that made them."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from megatron_rw.data.indexed.documents import DatasetReader
from megatron_rw.data.indexed.domains import TokenizerRecord
from megatron_rw.data.tokenizers.tokenizer import Tokenizer, fingerprint, load_tokenizer
from megatron_rw.data.tokenizers.tokenizer_flags import BYTE_LEVEL, TokenizerFlags, tokenizer_flags
from megatron_rw.errors import UserError
from megatron_rw.platform.quiet import silence

_CONTEXT = 40


def tokenizer_of(args: Namespace, record: TokenizerRecord | None) -> Tokenizer:
    """Loads the tokenizer that flags name, or else the one that made the dataset.

    Says so on stderr if it is not the one that made the dataset.

    Args:
        args: of a command line that `add_tokenizer_flags` prepared; without a type and a model
            they are those of the record.
        record: What `domains.json` says of the dataset's tokenizer, if there is one.

    Raises:
        UserError: None is named, or it is not there.
    """
    named = args.tokenizer_model is not None or args.tokenizer_type == BYTE_LEVEL
    if not named and record is None:
        raise UserError(
            "no domains.json tells which tokenizer made this dataset; give --tokenizer-model"
        )
    kind = args.tokenizer_type or (record.type if record else None) or "SentencePieceTokenizer"
    model = args.tokenizer_model
    if not named and record is not None and kind != BYTE_LEVEL:
        model = record.model
        if not Path(model).exists():
            raise UserError(
                f"{model}, the tokenizer that domains.json names, is not there; give "
                "--tokenizer-model"
            )
    chosen = {**vars(args), "tokenizer_type": kind, "tokenizer_model": model}
    return _load(tokenizer_flags(Namespace(**chosen)), record)


@cache  # of the many domains of a directory, which one tokenizer made
def _load(flags: TokenizerFlags, record: TokenizerRecord | None) -> Tokenizer:
    silence("cpu")  # what megatron.core says at import about GPU packages; none is used here
    tokenizer = load_tokenizer(flags)
    if record is not None and (digest := fingerprint(flags.tokenizer_model)) != record.sha256:
        print(
            f"warning: {flags.tokenizer_model} is not the tokenizer that made this dataset: its "
            f"sha256 is {digest}, and domains.json says {record.sha256}",
            file=sys.stderr,
        )
    return tokenizer


def decode(tokenizer: Tokenizer, ids: NDArray[Any]) -> str:
    """Returns the text of token ids, [tokens].

    Raises:
        UserError: An id is beyond the tokenizer's vocabulary.
    """
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < tokenizer.vocab_size:
        raise UserError(
            f"a token id is {int(ids.max())}, and the tokenizer has {tokenizer.vocab_size}; give "
            "the --tokenizer-model that made this dataset"
        )
    return tokenizer.detokenize(ids.tolist())


def find(reader: DatasetReader, text: str, tokenizer: Tokenizer) -> Iterator[tuple[int, int, str]]:
    """Yields the documents of a dataset that contain a text.

    Every document is decoded, since a text may be other tokens within other words.

    Yields:
        Number of the document, how often it contains the text, and the first place with some 40
        characters on either side.
    """
    for block in reader.blocks():
        ids = reader.read(block)
        start = 0
        for number, count in enumerate(block.tokens.tolist(), start=block.first):
            document = decode(tokenizer, ids[start : start + count])
            start += count
            if (place := document.find(text)) >= 0:
                begin, end = max(0, place - _CONTEXT), place + len(text) + _CONTEXT
                yield number, document.count(text), document[begin:end]
