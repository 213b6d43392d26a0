"""UTF-8 bytes as tokens."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

EOD_ID = 256
VOCAB_SIZE = 257


class ByteLevelTokenizer:
    """Gives a text's UTF-8 bytes, and 256 as the end of document.

    Core's class of this name cannot be reached from the training program's flags, and its end of
    document and padding, 0 and 1, are bytes. What the training program needs to know of a
    tokenizer, it gets from `--tokenizer-type NullTokenizer --vocab-size 257`: the size, the last id
    as the end of document, and no padding id, so that the loss is taken off no byte.
    """

    vocab_size = VOCAB_SIZE
    eod: int | None = EOD_ID

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[Any]]:
        """See `tokenizer.Tokenizer`."""
        return [np.frombuffer(text.encode(), np.uint8).astype(np.uint16) for text in texts]

    def detokenize(self, ids: Sequence[int]) -> str:
        """Returns the text without ends of document; U+FFFD for what is no UTF-8."""
        return bytes(id_ for id_ in ids if id_ != EOD_ID).decode(errors="replace")
