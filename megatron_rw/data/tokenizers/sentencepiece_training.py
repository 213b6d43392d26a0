"""Trains a SentencePiece model, and says in our words why it could not.

The model keeps every character: no Unicode normalisation, no folding of white space, no dummy
prefix, and bytes for characters outside the vocabulary, so that code decodes to itself. The one
exception is U+2581, SentencePiece's own mark for the space: it decodes to a space.

Newlines, tabs and other control characters are byte tokens and never part of a longer piece: the
text is trained line by line, and SentencePiece reserves the tab.

Token ids: 0 `<unk>`, 1 `<s>`, 2 `</s>` (Megatron's end of document), 3 `<pad>`, then the special
tokens of one's own, the 256 bytes and the learnt pieces. Padding has an id of its own because
core's GPTDataset takes the loss off every label that equals it; were it the end of document,
documents would never learn to end.

The four are control symbols: no text encodes to them. Special tokens of one's own are what
SentencePiece calls user-defined symbols: wherever one stands in a text it is that one id, and
never part of a longer piece. That is what Megatron needs of the marks of a chat template, since it
fills in the template and tokenizes the text that comes out.
"""

import io
import re
from collections.abc import Iterator, Sequence

from megatron_rw.errors import UserError

UNK_ID, BOS_ID, EOD_ID, PAD_ID = range(4)
CONTROL_SYMBOLS = ("<unk>", "<s>", "</s>", "<pad>")
# The control symbols and the bytes.
FIXED_TOKENS = len(CONTROL_SYMBOLS) + 256

# Characters that no piece may hold: line ends and other control characters, which the .vocab file
# could not show; the tab and U+2585, for which SentencePiece would drop the whole line; U+2581, its
# mark for the space.
_NOT_IN_PIECES = re.compile("[\x00-\x1f\u2581\u2585]+")
_NOT_IN_SPECIAL_TOKENS = re.compile("[\x00-\x1f\u2581\u2585\\s]")
_BYTE_PIECE = re.compile("<0x[0-9A-F]{2}>")
# SentencePiece drops lines of more than 4192 bytes; 1000 characters are never more than 4000.
_MAX_CHARACTERS = 1000
# Above this the unigram trainer counts positions with 64 bits rather than 32.
_LARGE_BYTES = 1 << 30


def check_special_tokens(tokens: Sequence[str]) -> None:
    """Checks that each of `--special-tokens` can be one id in any text.

    Raises:
        UserError: For the first that cannot.
    """
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
    """Yields the pieces of a text that SentencePiece is to see as lines, none of them empty."""
    for line in _NOT_IN_PIECES.split(text):
        for start in range(0, len(line), _MAX_CHARACTERS):
            yield line[start : start + _MAX_CHARACTERS]


def train(
    lines: Iterator[str],
    text_bytes: int,
    vocab_size: int,
    model_type: str,
    special_tokens: Sequence[str],
    threads: int,
) -> bytes:
    """Trains a model.

    Args:
        lines: Text as `sentences` gives it.
        text_bytes: About how many UTF-8 bytes that is.
        vocab_size: Number of token ids, fixed and special ones included.
        model_type: `bpe` or `unigram`.
        special_tokens: Ids 4 and up, in this order.
        threads: Part of what makes the bytes the same.

    Returns:
        The bytes of the `.model` file.

    Raises:
        UserError: If the text does not make such a vocabulary.
    """
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=model,
            vocab_size=vocab_size,
            model_type=model_type,
            num_threads=threads,
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
            user_defined_symbols=list(special_tokens),
            train_extremely_large_corpus=text_bytes > _LARGE_BYTES,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UserError(_explain(str(error), vocab_size, len(special_tokens))) from error
    return model.getvalue()


def _explain(message: str, vocab_size: int, special_tokens: int) -> str:
    """Turns SentencePiece's message into one that names our flag and the remedy."""
    if "!sentences_.empty()" in message:
        return "--input: no text to train on"
    if too_small := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return (
            f"--vocab-size {vocab_size} is too small: the {FIXED_TOKENS + special_tokens} fixed "
            f"tokens and the characters of this text alone are {too_small[1]}; give more than that"
        )
    if too_large := re.search(r"size too high .*<= (\d+)", message):
        return (
            f"--vocab-size {vocab_size} is too large for so little text: give at most "
            f"{too_large[1]}, or more text"
        )
    return f"SentencePiece could not train: {message}"


def vocabulary_listing(model: bytes) -> str:
    """Returns SentencePiece's `.vocab` format: a line of piece, tab and score for each id."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    return "".join(
        f"{processor.id_to_piece(id_)}\t{processor.get_score(id_):g}\n"
        for id_ in range(processor.get_piece_size())
    )
