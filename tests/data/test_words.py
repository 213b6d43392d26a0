"""Words end where no token does otherwise, are remembered, and are left alone where none recurs."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tokenizers import Regex
from tokenizers.pre_tokenizers import Split

from megatron_rw.data.tokenizers import word_cache
from megatron_rw.data.tokenizers.safe_cuts import (
    GPT2_WORDS,
    LATER_WORDS,
    CutTextEncoder,
    cuts_between_words,
)
from megatron_rw.data.tokenizers.word_cache import (
    CachedWordEncoder,
    byte_level_words,
    sentencepiece_words,
)
from tests.data.test_segments import TEXTS

SPACE = "\u2581"
ADDED = ("<s>", "<|end_1|>", "[x]")


def byte_level(pattern: str, added: Sequence[str] = ()) -> Any:
    words = byte_level_words(pattern, added)
    assert words is not None
    return words


@pytest.mark.parametrize("pattern", [GPT2_WORDS, *LATER_WORDS])
@settings(max_examples=300)
@given(TEXTS, st.sampled_from([(), ADDED]))
@example("a\n\nb.\n\n//c \n \n/d.\n \n\n e\t\tf  g\r\nh 'll it's 1 2\n3", ())
@example("(a)b[c]d1,2)e3.4_f'g,'h\x1c i\xa0 j \xa0k\u3000l\n\xa0\n/", ())
def test_words_of_a_byte_level_tokenizer(pattern: str, text: str, added: Sequence[str]) -> None:
    words = byte_level(pattern, added).findall(text)
    assert "".join(words) == text
    theirs = Split(Regex(pattern), "isolated", False).pre_tokenize_str
    assert [word for word, _ in theirs(text)] == [
        word for part in words for word, _ in theirs(part)
    ]


@pytest.mark.parametrize("pattern", [GPT2_WORDS, *LATER_WORDS])
def test_common_words_stand_alone(pattern: str) -> None:
    """Or else nothing would be met again."""
    words = byte_level(pattern, ADDED).findall("The model, as of 2024; it reads text.")
    assert words[:5] == ["The", " model", ",", " as", " of"]
    assert words[5:10] == [" 2024", ";", " it", " reads", " text"]


@pytest.mark.parametrize("token", ADDED)
@pytest.mark.parametrize("pattern", [GPT2_WORDS, LATER_WORDS[0]])
def test_no_word_ends_inside_an_added_token(pattern: str, token: str) -> None:
    words = byte_level(pattern, ADDED).findall(f"a {token}b 1{token} ({token})")
    assert sum(token in word for word in words) == 3


def test_some_patterns_and_added_tokens_leave_no_words() -> None:
    assert byte_level_words(r"\w+", ()) is None
    assert byte_level_words(None, ()) is None
    assert byte_level_words(GPT2_WORDS, ["a b"]) is None


def test_words_of_sentencepiece() -> None:
    words = sentencepiece_words(["th", "the", " the", "))", "._", "12", "  "], SPACE)
    assert words is not None
    text = f" the  model((x_1)) 日本,12{SPACE}the \t "
    assert sentencepiece_words(["of the"], SPACE) is None
    assert words.findall(text) == [
        *(" the", "  model", "((", "x", "_", "1", "))", " 日本", ",", "12", f"{SPACE}the"),
        *(" \t", " ", ""),
    ]


@pytest.mark.parametrize(
    ("pieces", "words"),
    [
        (["v2"], ["f", "(", "v2,", "x"]),
        (["(v"], ["f(v", "2", ",", "x"]),
        (["_x"], ["f", "(", "v", "2", ",", "x"]),
        ([",x", "2,"], ["f", "(", "v", "2,x"]),
    ],
)
def test_no_word_ends_inside_a_piece(pieces: list[str], words: list[str]) -> None:
    pattern = sentencepiece_words(pieces, SPACE)
    assert pattern is not None
    assert list(filter(None, pattern.findall("f(v2,x"))) == words


class Library:
    """Gives every character of a text its code point; counts what it is asked for."""

    def __init__(self) -> None:
        self.words: list[str] = []
        self.texts = 0

    def encode_word(self, word: str) -> list[int]:
        self.words.append(word)
        return list(map(ord, word))

    def encode_texts(self, texts: Sequence[str]) -> list[NDArray[Any]]:
        self.texts += len(texts)
        return [np.array(list(map(ord, text)), np.int32) for text in texts]


def encoder(library: Library) -> CachedWordEncoder:
    segments = CutTextEncoder(library.encode_texts, cuts_between_words(GPT2_WORDS), np.int32)
    return CachedWordEncoder(byte_level(GPT2_WORDS), library.encode_word, segments)


def check(encoder: CachedWordEncoder, texts: Sequence[str]) -> None:
    encoded = encoder.encode_batch(texts)
    assert ["".join(map(chr, ids)) for ids in encoded] == list(texts)
    assert {ids.dtype for ids in encoded} == {np.dtype(np.int32)}


def test_a_word_is_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(word_cache, "_BLOCK_CHARACTERS", 10)
    library = Library()
    check(encoder(library), ["the model of the model of the model", "", " of models"])
    assert sorted(filter(None, library.words)) == [" model", " models", " of", " the", "the"]


def test_words_that_recur_stay_and_others_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(word_cache, "_CACHED_WORDS", 4)
    library = Library()
    tested = encoder(library)
    for number in range(20):
        check(tested, [f" often word{chr(97 + number)}"])
        assert len(tested._cache) <= 4
        assert len(tested._cache._before) <= 4
    assert library.words.count(" often") == 1
    check(tested, [" worda"])
    assert library.words.count(" worda") == 2


def test_long_words_are_not_remembered() -> None:
    library = Library()
    tested = encoder(library)
    for _ in range(2):
        check(tested, ["a" * 64, "b" * 65])
    assert (library.words.count("a" * 64), library.words.count("b" * 65)) == (1, 2)


def test_words_are_left_alone_where_they_cost_more_than_segments(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    library = Library()
    # A word takes ten times as long as a text, and no word occurs twice.
    monkeypatch.setattr(
        word_cache, "process_time", lambda: 10.0 * len(library.words) + library.texts
    )
    tested = encoder(library)
    for batch in range(40):
        check(tested, [f" {chr(0x4E00 + batch) * 20_000}"])
    assert len(list(filter(None, library.words))) < 5
    assert library.texts > 35
