"""However a text is cut, its ids are those of the whole."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, Regex
from tokenizers.pre_tokenizers import Split

from megatron_rw.data.tokenizers.huggingface_tokenizer import (
    huggingface_tokenizer,
    known_word_pattern,
)
from megatron_rw.data.tokenizers.safe_cuts import (
    GPT2_WORDS,
    LATER_WORDS,
    CutTextEncoder,
    cut_text,
    cuts_between_words,
)
from megatron_rw.data.tokenizers.sentencepiece_tokenizer import load_sentencepiece
from megatron_rw.data.tokenizers.word_cache import CachedWordEncoder
from tests.data.conftest import make_texts
from tests.data.tiny_tokenizers import (
    IN_WORDS,
    LLAMA3,
    SENTENCEPIECE,
    UNCUT,
    sentencepiece_flags,
    train_huggingface,
    train_sentencepiece,
)

NASTY = [
    *(" ", "  ", "\t", "\n", "\r\n", "\n\n ", "\u2581", " \u2581 ", "\u3000", "\xa0", "\u2028"),
    *("the", " model", "a b", "x", "I'll", "'s", " 'LL ", "1234567", " 12 ", "_", "://", "f(x):"),
    *("日本", "é", "e\u0301", " \u0301", "\ufb01", "😀", "👩\u200d💻", "\U0001d400", "ŉ", "\u200b"),
    *("<s>", "</s>", " <tool> ", "<unk>", "☯", "z" * 30, "ab" * 20, "\x00"),
]
TEXTS = st.lists(
    st.one_of(
        st.sampled_from(NASTY),
        st.sampled_from(make_texts(1, 5)[0].split(" ")),
        st.text(st.characters(codec="utf-8"), max_size=4),
    ),
    max_size=25,
).map("".join)
SIZES = st.integers(1, 40)


@dataclass(frozen=True)
class Cut:
    """A tokenizer for every size of segments, and its library's ids of a whole text."""

    of_size: dict[int, Any]
    whole: Callable[[str], list[int]]


def segments_of(tokenizer: Any) -> CutTextEncoder:
    """The encoder that the tokenizer uses where it does not encode in words."""
    encoder: CutTextEncoder | CachedWordEncoder = tokenizer.encoder
    return encoder.segments if isinstance(encoder, CachedWordEncoder) else encoder


def check_cutting(cut: Cut, text: str, size: int) -> None:
    whole = cut.whole(text)
    tokenizer = cut.of_size[size]
    for encoder in (tokenizer, segments_of(tokenizer)):
        encoded = encoder.encode_batch([text, "b", text])
        assert encoded[0].tolist() == whole == encoded[2].tolist()
        assert encoded[0].dtype == np.uint16


@pytest.mark.parametrize("pattern", [GPT2_WORDS, *LATER_WORDS])
@settings(max_examples=200)
@given(TEXTS, SIZES)
@example("a\n\nb.\n\n//c \n \n/d.\n \n\n e\t\tf  g\r\nh 'll it's 1 2\n3", 1)
def test_words(pattern: str, text: str, size: int) -> None:
    """Whatever the vocabulary: a cut leaves every word whole and makes no other words."""
    words = Split(Regex(pattern), "isolated", False).pre_tokenize_str
    segments = cut_text(text, cuts_between_words(pattern), size)
    assert [word for word, _ in words(text)] == [
        word for segment in segments for word, _ in words(segment)
    ]
    assert all(len(segment) >= size for segment in segments[:-1])


@pytest.fixture(scope="module", params=SENTENCEPIECE)
def cut_sentencepiece(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Cut:
    path = tmp_path_factory.mktemp("sentencepiece") / "m.model"
    model = train_sentencepiece(path, **SENTENCEPIECE[request.param])
    of_size = {size: load_sentencepiece(sentencepiece_flags(model), size) for size in range(1, 41)}
    assert (segments_of(of_size[1]).next_cut is None) == (request.param in UNCUT)
    assert isinstance(of_size[1].encoder, CachedWordEncoder) == (request.param in IN_WORDS)
    return Cut(of_size, SentencePieceProcessor(model_file=model).encode)


@given(TEXTS, SIZES)
@example("the  model \u2581 reads \u2581the a b x the ", 1)
@example("日本日本 日本", 1)
@example("ends in a space ", 1)
@example("<|tool_1|>x<|tool_1|>_1|>2|tool_1|", 1)
def test_sentencepiece(cut_sentencepiece: Cut, text: str, size: int) -> None:
    cut = cut_sentencepiece
    tokenizer = cut.of_size[size]
    whole = cut.whole(text)
    assert tokenizer.encode_batch(["b", text])[1].tolist() == whole
    # Spaces that the model puts before texts are put before they are cut.
    prefixed = text and tokenizer.prefix + text
    assert segments_of(tokenizer).encode_batch([prefixed, "b"])[0].tolist() == whole


@pytest.fixture(scope="module", params=[None, *LATER_WORDS])
def cut_huggingface(request: pytest.FixtureRequest) -> Cut:
    tokenizer = train_huggingface(pattern=request.param)
    of_size = {size: huggingface_tokenizer(tokenizer, 1, True, size) for size in range(1, 41)}
    assert isinstance(of_size[1].encoder, CachedWordEncoder)
    return Cut(of_size, lambda text: tokenizer.encode(text).ids)


@given(TEXTS, SIZES)
@example("it's a  model\n\n of 12 \t34 <s> x</s> y'll ", 1)
@example("x<s>y</s>z<pad>1<pad", 1)
def test_huggingface(cut_huggingface: Cut, text: str, size: int) -> None:
    check_cutting(cut_huggingface, text, size)


def test_a_token_that_must_be_a_word_of_its_own_keeps_texts_from_being_cut_in_words() -> None:
    tokenizer = train_huggingface()
    tokenizer.add_tokens([AddedToken("tool", single_word=True)])
    ours = huggingface_tokenizer(tokenizer, 1, True, 5)
    assert isinstance(ours.encoder, CutTextEncoder)
    for text in ("1tool", "tool", "a tool is", "tool1"):
        assert ours.encode_batch([text])[0].tolist() == tokenizer.encode(text).ids


@pytest.mark.parametrize("pattern", [GPT2_WORDS, LLAMA3, None])
def test_a_text_without_a_cut_stays_whole(pattern: str | None) -> None:
    assert cut_text("z" * 100, cuts_between_words(pattern), 10) == ["z" * 100]


PLAIN_TOKEN = {"content": "<x>", "lstrip": False, "rstrip": False}
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
SPLIT = {"type": "Split", "pattern": {"Regex": LLAMA3}, "behavior": "Isolated", "invert": False}


def steps(*first: dict[str, Any], use_regex: bool = False) -> dict[str, Any]:
    last = BYTE_LEVEL | {"use_regex": use_regex}
    return {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [*first, last]}}


@pytest.mark.parametrize(
    ("change", "safe"),
    [
        ({}, True),
        (steps(SPLIT), True),
        (steps({"type": "Digits", "individual_digits": True}, use_regex=True), True),
        ({"normalizer": {"type": "NFC"}}, True),
        (steps(), False),
        (steps(SPLIT | {"pattern": {"Regex": r"\w+ \w+"}}), False),
        (steps(SPLIT | {"pattern": {"String": " "}}), False),
        (steps(SPLIT | {"behavior": "MergedWithNext"}), False),
        (steps(SPLIT, {"type": "Metaspace"}), False),
        ({"pre_tokenizer": BYTE_LEVEL | {"add_prefix_space": True}}, False),
        ({"pre_tokenizer": {"type": "Metaspace"}}, False),
        ({"pre_tokenizer": None}, False),
        ({"normalizer": {"type": "Lowercase"}}, False),
        ({"model": {"type": "Unigram"}}, False),
        ({"model": {"type": "BPE", "dropout": 0.1}}, False),
        ({"added_tokens": [PLAIN_TOKEN | {"content": "a b"}]}, False),
        ({"added_tokens": [PLAIN_TOKEN | {"lstrip": True}]}, False),
        ({"added_tokens": [PLAIN_TOKEN | {"rstrip": True}]}, False),
    ],
)
def test_only_safe_tokenizers_are_cut(change: dict[str, Any], safe: bool) -> None:
    definition = {
        "normalizer": None,
        "pre_tokenizer": BYTE_LEVEL,
        "model": {"type": "BPE", "dropout": None},
        "added_tokens": [PLAIN_TOKEN],
    }
    assert (known_word_pattern(definition | change) is not None) is safe
