"""SentencePiece models, encoded in words or segments where that changes nothing."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise, product
from re import Pattern
from typing import Any

from numpy.typing import NDArray

from megatron_rw.data.tokenizers.core_tokenizer import (
    CoreTokenizer,
    build_core_tokenizer,
    optimal_dtype,
)
from megatron_rw.data.tokenizers.safe_cuts import SEGMENT_CHARACTERS, NextCut, SegmentEncoder
from megatron_rw.data.tokenizers.tokenizer_flags import TokenizerFlags
from megatron_rw.data.tokenizers.word_cache import WordEncoder, sentencepiece_words

_SPACE = "\u2581"  # what SentencePiece turns spaces into


class SentencePieceTokenizer:
    """Encodes with the processor of core's class, into arrays.

    Texts are cut where `cutting_of` says; a model for which it says None sees every text whole,
    whose working memory is then about 45 bytes per character.

    Args:
        core: A `MegatronTokenizerText` over core's SentencePieceTokenizer, without `legacy`.
        segment_characters: The least length of a segment.
    """

    def __init__(self, core: Any, segment_characters: int = SEGMENT_CHARACTERS) -> None:
        from sentencepiece import SentencePieceProcessor

        self.vocab_size: int = core.vocab_size
        self.eod: int | None = core.eod
        self._processor = core._tokenizer.tokenizer
        cutting = cutting_of(self._processor.serialized_model_proto())
        encode, self._prefix = self._processor.encode, ""
        if cutting and cutting.unprefixed is not None:
            encode = SentencePieceProcessor(model_proto=cutting.unprefixed).encode
            self._prefix = " "
        segments = SegmentEncoder(
            partial(encode, return_type="numpy", num_threads=1),
            cutting.next_cut if cutting else None,
            optimal_dtype(self.vocab_size),
            segment_characters,
        )
        self._encoder: SegmentEncoder | WordEncoder = segments
        if cutting and cutting.words:
            self._encoder = WordEncoder(cutting.words, encode, segments)

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[Any]]:
        """See `tokenizer.Tokenizer`."""
        if self._prefix:
            texts = [text and self._prefix + text for text in texts]
        return self._encoder.encode_batch(texts)

    def detokenize(self, ids: Sequence[int]) -> str:
        """See `tokenizer.Tokenizer`; control tokens, as the end of document, are left out."""
        return str(self._processor.decode([int(id_) for id_ in ids]))


def load_sentencepiece(flags: TokenizerFlags) -> SentencePieceTokenizer | CoreTokenizer:
    """Loads a SentencePiece model."""
    core = build_core_tokenizer(flags)
    wrapper = core._tokenizer
    if wrapper.removed_extra_spaces and not wrapper.ignore_extra_whitespaces:
        return CoreTokenizer(core)  # puts a mark between the spaces and takes it out again
    return SentencePieceTokenizer(core)


@dataclass(frozen=True)
class Cutting:
    """How texts may be cut for a model.

    Attributes:
        next_cut: Where they may be cut.
        words: Matches words between which they may be cut; None if that is not worth it.
        unprefixed: For a model that puts a space of its own before every text: the bytes of a model
            that does not and is the same otherwise. The spaces are then the caller's to put.
    """

    next_cut: NextCut
    words: Pattern[str] | None
    unprefixed: bytes | None


def cutting_of(model: bytes) -> Cutting | None:
    """Returns how texts may be cut for a model; None for not at all.

    Byte-pair encoding only ever joins neighbours into a piece of the vocabulary. So a place between
    two characters that are neighbours in no piece stays a border of tokens, and what is joined on
    one side of it has no influence on the other. Before a space after a word that holds for nearly
    every model; with bytes for unknown characters, for most pairs of rare characters as well.

    Not to be cut:

    - Unigram models add up scores in single precision from the start of the text, so what was
      before can change how a tie is rounded.
    - A normalization rule may join characters across the cut, and a model that removes spaces
      does so at the ends of each segment.

    Args:
        model: The bytes of a SentencePiece model.
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
    return Cutting(partial(_next_cut, inside, known), words, unprefixed)


def _spellings(character: str) -> str:
    """Returns the characters of a text that the model sees as this one."""
    return f" {_SPACE}" if character in (" ", _SPACE) else character


def _next_cut(inside: frozenset[str], known: frozenset[str] | None, text: str, start: int) -> int:
    for cut in range(start, len(text)):
        if text[cut - 1 : cut + 1] not in inside and (known is None or text[cut] in known):
            return cut
    return len(text)
