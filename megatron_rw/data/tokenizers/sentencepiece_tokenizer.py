"""SentencePiece models, encoded in words or segments where that changes no id."""

from dataclasses import dataclass
from functools import partial
from itertools import pairwise, product
from re import Pattern

from megatron_rw.data.tokenizers.library_tokenizer import (
    LibraryTokenizer,
    build_core_tokenizer,
    library_errors,
    optimal_dtype,
    whole_text_tokenizer,
)
from megatron_rw.data.tokenizers.safe_cuts import SEGMENT_CHARACTERS, CutTextEncoder, NextCut
from megatron_rw.data.tokenizers.tokenizer_flags import TokenizerFlags
from megatron_rw.data.tokenizers.word_cache import encoder_in_words, sentencepiece_words
from megatron_rw.errors import UserError

_SPACE = "\u2581"  # what SentencePiece turns spaces into


def load_sentencepiece(
    flags: TokenizerFlags, segment_characters: int = SEGMENT_CHARACTERS
) -> LibraryTokenizer:
    """Loads a SentencePiece model, which encodes as core's class does without `legacy`.

    Texts are cut where `safe_cuts_of` allows it. A model for which it allows nothing is given every
    text whole, which takes about 45 bytes of memory per character. Raises a `UserError` if the
    model cannot be loaded, or has special tokens beside its own.
    """
    from sentencepiece import SentencePieceProcessor

    if flags.tokenizer_special_tokens:
        raise UserError(
            "--tokenizer-special-tokens: a SentencePiece model takes none later; give them to "
            "tools/train_tokenizer.py as --special-tokens"
        )
    with library_errors(flags):
        processor = SentencePieceProcessor(model_file=str(flags.tokenizer_model))
    if not flags.tokenizer_sentencepiece_ignore_extra_whitespaces:
        one, two = (processor.encode(text, out_type=str) for text in ("x y", "x  y"))
        if one == two:  # core's class puts a mark between the spaces and takes it out again
            return whole_text_tokenizer(build_core_tokenizer(flags))
    cuts = safe_cuts_of(processor.serialized_model_proto())
    encode, prefix = processor.encode, ""
    if cuts and cuts.unprefixed is not None:
        encode, prefix = SentencePieceProcessor(model_proto=cuts.unprefixed).encode, " "
    vocab_size = processor.get_piece_size()
    segments = CutTextEncoder(
        partial(encode, return_type="numpy", num_threads=1),
        cuts.next_cut if cuts else None,
        optimal_dtype(vocab_size),
        segment_characters,
    )
    encoder = encoder_in_words(segments, cuts.words if cuts else None, encode)
    return LibraryTokenizer(vocab_size, processor.eos_id(), encoder, processor.decode, prefix)


@dataclass(frozen=True)
class SafeCuts:
    """How texts may be cut for a model."""

    next_cut: NextCut  # Where they may be cut.
    # Matches words between which they may be cut; None if that would not be faster.
    words: Pattern[str] | None
    # Only for a model that puts a space before every text: the bytes of a model that does not and
    # is the same otherwise. The caller then puts the space.
    unprefixed: bytes | None


def safe_cuts_of(model: bytes) -> SafeCuts | None:
    """Returns how texts may be cut for a model; None if they may not.

    Byte-pair encoding only ever joins neighbours into a piece of the vocabulary. So a place between
    two characters that are neighbours in no piece stays a border of tokens, and what is joined on
    one side of it has no influence on the other. Before a space after a word that holds for nearly
    every model; with bytes for unknown characters, for most pairs of rare characters as well.

    Texts may not be cut for these:

    - Unigram models add up scores in single precision from the start of the text, so what was
      before can change how a tie is rounded.
    - A normalization rule may join characters across the cut, and a model that removes spaces
      does so at the ends of each segment.
    """
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    normalizer, trainer = proto.normalizer_spec, proto.trainer_spec
    kind = sentencepiece_model_pb2.ModelProto.SentencePiece
    if (
        trainer.model_type != sentencepiece_model_pb2.TrainerSpec.BPE
        or normalizer.precompiled_charsmap
        or normalizer.remove_extra_whitespaces
        or not normalizer.escape_whitespaces
        or trainer.treat_whitespace_as_suffix
    ):
        return None
    pieces = [
        piece.piece
        for piece in proto.pieces
        if piece.type in (kind.NORMAL, kind.USER_DEFINED, kind.UNUSED)
    ]
    inside = frozenset(
        before + after
        for piece in pieces
        for pair in pairwise(piece)
        for before, after in product(*map(_spellings, pair))
    )
    # Without bytes, unknown characters in a row are one unknown token, which a cut would double.
    known = words = None
    if trainer.byte_fallback:
        words = sentencepiece_words([piece.replace(_SPACE, " ") for piece in pieces], _SPACE)
    else:
        known = frozenset(
            spelling for piece in pieces if len(piece) == 1 for spelling in _spellings(piece)
        )
    unprefixed = None
    if normalizer.add_dummy_prefix:
        normalizer.add_dummy_prefix = False
        unprefixed = proto.SerializeToString()
    return SafeCuts(partial(_next_cut, inside, known), words, unprefixed)


def _spellings(character: str) -> str:
    """Returns the characters of a text that the model sees as this one."""
    return f" {_SPACE}" if character in (" ", _SPACE) else character


def _next_cut(inside: frozenset[str], known: frozenset[str] | None, text: str, start: int) -> int:
    for cut in range(start, len(text)):
        if text[cut - 1 : cut + 1] not in inside and (known is None or text[cut] in known):
            return cut
    return len(text)
