"""A library's tokenizer, which encodes texts in words or segments where that changes no id."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_rw.data.tokenizers.safe_cuts import CutTextEncoder
from megatron_rw.data.tokenizers.word_cache import CachedWordEncoder


@dataclass(frozen=True)
class LibraryTokenizer:
    """Encodes with the tokenizer of a library, into arrays; see `tokenizer.Tokenizer`.

    Attributes:
        encoder: Encodes texts, apart from what the next two add.
        prefix: Text to put before every text that is not empty.
        around: Ids to put before and after the ids of every text.
        decode: Returns the text of ids.
    """

    vocab_size: int
    eod: int | None
    encoder: CutTextEncoder | CachedWordEncoder
    decode: Callable[[list[int]], str]
    prefix: str = ""
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
