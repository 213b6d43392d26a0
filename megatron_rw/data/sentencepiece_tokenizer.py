"""SentencePiece models, encoded in segments where that changes nothing."""

from collections.abc import Sequence
from functools import partial
from itertools import pairwise, product
from typing import Any

from numpy.typing import NDArray

from megatron_rw.data.core_tokenizer import CoreTokenizer, build_core_tokenizer, optimal_dtype
from megatron_rw.data.segments import SEGMENT_CHARACTERS, NextCut, encode_segments, split
from megatron_rw.data.tokenizer_flags import TokenizerFlags

_SPACE = "\u2581"  # what SentencePiece turns spaces into


class SentencePieceTokenizer:
    """Encodes with the processor of core's class, into arrays.

    Long texts are cut where `safe_cuts` says; a model for which it says None sees every text whole,
    whose working memory is then about 45 bytes per character.

    Args:
        core: A `MegatronTokenizerText` over core's SentencePieceTokenizer, without `legacy`.
        segment_characters: The least length of a segment.
    """

    def __init__(self, core: Any, segment_characters: int = SEGMENT_CHARACTERS) -> None:
        self.vocab_size: int = core.vocab_size
        self.eod: int | None = core.eod
        self._dtype = optimal_dtype(self.vocab_size)
        self._processor = core._tokenizer.tokenizer
        self._segment_characters = segment_characters
        self._next_cut, self._dropped = safe_cuts(self._processor.serialized_model_proto())

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[Any]]:
        """See `tokenizer.Tokenizer`."""
        segments = [
            split(text, self._next_cut, self._segment_characters, self._dropped) for text in texts
        ]
        encode = partial(self._processor.encode, return_type="numpy", num_threads=1)
        return encode_segments(segments, encode, self._dtype)

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


def safe_cuts(model: bytes) -> tuple[NextCut | None, int]:
    """Returns where texts may be cut for a model, and how many characters to drop after a cut.

    Byte-pair encoding only ever joins neighbours into a piece of the vocabulary. So a place between
    two characters that are neighbours in no piece stays a border of tokens, and what is joined on
    one side of it has no influence on the other. Before a space after a word that holds for nearly
    every model; with bytes for unknown characters, for most pairs of rare characters as well. A
    model that starts every text with a space of its own does so for every segment, so there the
    space after the cut is dropped.

    None, for no cut at all:

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
        return None, 0
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
    known = None
    if not trainer.byte_fallback:
        known = frozenset(
            spelling for piece in pieces if len(piece) == 1 for spelling in _spellings(piece)
        )
    if normalizer.add_dummy_prefix:
        return partial(_before_a_space, inside, known), 1
    return partial(_between, inside, known), 0


def _spellings(character: str) -> str:
    """Returns the characters of a text that the model sees as this one."""
    return f" {_SPACE}" if character in (" ", _SPACE) else character


def _between(inside: frozenset[str], known: frozenset[str] | None, text: str, start: int) -> int:
    for cut in range(start, len(text)):
        if text[cut - 1 : cut + 1] not in inside and (known is None or text[cut] in known):
            return cut
    return len(text)


def _before_a_space(
    inside: frozenset[str], known: frozenset[str] | None, text: str, start: int
) -> int:
    last = len(text) - 1  # an empty segment would not get the model's own space
    cut = text.find(" ", start, last)
    while cut >= 0:
        if text[cut - 1 : cut + 1] not in inside and (known is None or " " in known):
            return cut
        cut = text.find(" ", cut + 1, last)
    return len(text)
