"""Trains a SentencePiece model.

The model keeps every character, so that code decodes to itself: no normalisation, no folding of
white space, no dummy prefix, and bytes for characters outside the vocabulary. The one exception is
U+2581, SentencePiece's own mark for the space: it decodes to a space. Control characters are byte
tokens, since the model is trained line by line and SentencePiece reserves the tab.

Token ids: 0 `<unk>`, 1 `<s>`, 2 `</s>` (Megatron's end of document), 3 `<pad>`, to which no text
encodes; then the special tokens of the user, each one id wherever it occurs in a text, as Megatron
needs it of the marks of a chat template; the 256 bytes; and the learnt pieces. Padding has its own
id because core's GPTDataset masks the loss of every label that equals it: with the id of the end of
document, the model would never learn to end a document.
"""

import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import arg

from megatron_rw.errors import UserError

UNK_ID, BOS_ID, EOD_ID, PAD_ID = range(4)
CONTROL_SYMBOLS = ("<unk>", "<s>", "</s>", "<pad>")
FIXED_TOKENS = len(CONTROL_SYMBOLS) + 256  # The control symbols and the bytes.

# Characters that no piece may hold: line ends and other control characters, which would break a
# .vocab file; the tab and U+2585, for which SentencePiece drops a whole line; U+2581, its own mark.
_NOT_IN_PIECES = re.compile("[\x00-\x1f\u2581\u2585]+")
_NOT_IN_SPECIAL_TOKENS = re.compile("[\x00-\x1f\u2581\u2585\\s]")
_BYTE_PIECE = re.compile("<0x[0-9A-F]{2}>")
# SentencePiece drops lines of more than 4192 bytes; 1000 characters are never more than 4000.
_MAX_CHARACTERS = 1000
# Above this the unigram trainer counts positions with 64 bits rather than 32.
_LARGE_BYTES = 1 << 30


def check_special_tokens(tokens: Sequence[str]) -> None:
    """Checks that each of `--special-tokens` can be one id in any text; a `UserError` if not."""
    for index, token in enumerate(tokens):
        problem = None
        if not token:
            problem = "it is empty"
        elif _NOT_IN_SPECIAL_TOKENS.search(token):
            problem = "white space and control characters cannot be part of one"
        elif token in CONTROL_SYMBOLS or _BYTE_PIECE.fullmatch(token):
            problem = "every model has it already"
        elif token in tokens[:index]:
            problem = "it is given twice"
        if problem:
            raise UserError(f"--special-tokens {token!r}: {problem}; leave it out or rename it")


def sentences(text: str) -> Iterator[str]:
    """Yields the parts of a text that SentencePiece is given as lines, none of them empty."""
    for line in _NOT_IN_PIECES.split(text):
        for start in range(0, len(line), _MAX_CHARACTERS):
            yield line[start : start + _MAX_CHARACTERS]


@dataclass(frozen=True, kw_only=True)
class VocabularyFlags:
    """The flags of a SentencePiece vocabulary."""

    vocab_size: Annotated[int, arg(metavar="N")] = 32000
    """Number of token ids, special tokens and bytes included. Megatron pads it to a multiple of
    --make-vocab-size-divisible-by, 128 by default, times --tensor-model-parallel-size."""
    model_type: Literal["bpe", "unigram"] = "bpe"
    """The algorithm."""
    special_tokens: Annotated[tuple[str, ...], arg(metavar="TOKEN [...]")] = ()
    """Tokens that are one id each, from 4 on, wherever they occur in a text, as the marks of a chat
    template must be. Remove them from texts in which they should mean nothing."""
    threads: Annotated[int, arg(metavar="N")] = 8
    """Training threads. The number changes the bytes of the model, so it is not taken from the
    machine."""


def train(lines: Iterator[str], text_bytes: int, flags: VocabularyFlags) -> bytes:
    """Trains a model and returns the bytes of its `.model` file.

    The lines are those of `sentences`, and together have about `text_bytes` bytes of UTF-8. Raises
    a `UserError` if the text does not make such a vocabulary.
    """
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=model,
            vocab_size=flags.vocab_size,
            model_type=flags.model_type,
            num_threads=flags.threads,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            byte_fallback=True,
            unk_id=UNK_ID,
            bos_id=BOS_ID,
            eos_id=EOD_ID,
            pad_id=PAD_ID,
            user_defined_symbols=list(flags.special_tokens),
            train_extremely_large_corpus=text_bytes > _LARGE_BYTES,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UserError(_explain(str(error), flags)) from error
    return model.getvalue()


def _explain(message: str, flags: VocabularyFlags) -> str:
    """Turns SentencePiece's message into one that names the flag and the remedy."""
    if "!sentences_.empty()" in message:
        return "--input: no text to train on"
    if too_small := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        fixed = FIXED_TOKENS + len(flags.special_tokens)
        return (
            f"--vocab-size {flags.vocab_size} is too small: the {fixed} fixed tokens and the "
            f"characters of this text alone are {too_small[1]}; give more than that"
        )
    if too_large := re.search(r"size too high .*<= (\d+)", message):
        return (
            f"--vocab-size {flags.vocab_size} is too large for so little text: give at most "
            f"{too_large[1]}, or more text"
        )
    return f"SentencePiece could not train: {message}"
