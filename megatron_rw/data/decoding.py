"""From token ids back to text, with the tokenizer that made them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, cast

from numpy.typing import NDArray

from megatron_rw.data.command import InputError
from megatron_rw.data.documents import DatasetReader
from megatron_rw.data.domains import TokenizerRecord
from megatron_rw.data.tokenizer import Tokenizer, fingerprint, load_tokenizer
from megatron_rw.platform.quiet import silence

_CONTEXT = 40


@cache  # of the many domains of a directory, which one tokenizer made
def tokenizer_of(
    tokenizer_type: str | None, model: str | None, record: TokenizerRecord | None
) -> Tokenizer:
    """Loads the tokenizer that flags name, or else the one that made the dataset.

    Says so on stderr if it is not the one that made the dataset.

    Args:
        tokenizer_type: `--tokenizer-type`, if given.
        model: `--tokenizer-model`, if given.
        record: What `domains.json` says of the dataset's tokenizer, if there is one.

    Raises:
        InputError: None is named, or it is not there.
    """
    if model is None and record is None:
        raise InputError(
            "no domains.json tells which tokenizer made this dataset; give --tokenizer-model"
        )
    if record is not None:
        if model is None and not Path(record.model).exists():
            raise InputError(
                f"{record.model}, the tokenizer that domains.json names, is not there; give "
                "--tokenizer-model"
            )
        model = model or record.model
        tokenizer_type = tokenizer_type or record.type
    assert model is not None
    silence("cpu")  # what megatron.core says at import about GPU packages; none is used here
    tokenizer = load_tokenizer(tokenizer_type or "SentencePieceTokenizer", model)
    if record is not None and (digest := fingerprint(model)) != record.sha256:
        print(
            f"warning: {model} is not the tokenizer that made this dataset: its sha256 is "
            f"{digest}, and domains.json says {record.sha256}",
            file=sys.stderr,
        )
    return tokenizer


def decode(tokenizer: Tokenizer, ids: NDArray[Any]) -> str:
    """Returns the text of token ids, [tokens].

    Raises:
        InputError: An id is beyond the tokenizer's vocabulary.
    """
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < tokenizer.vocab_size:
        raise InputError(
            f"a token id is {int(ids.max())}, and the tokenizer has {tokenizer.vocab_size}; give "
            "the --tokenizer-model that made this dataset"
        )
    return str(cast(Any, tokenizer).detokenize(ids.tolist()))


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
