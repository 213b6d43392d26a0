"""The tools' tokenizers give what the training program's give for the same flags."""

import argparse
import hashlib
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from megatron_rw import command_line
from megatron_rw.data.tokenizers.library_tokenizer import build_core_tokenizer
from megatron_rw.data.tokenizers.tokenizer import load_tokenizer, model_sha256
from megatron_rw.data.tokenizers.tokenizer_flags import TokenizerFlags, TokenizerType
from megatron_rw.errors import UserError
from tests.data.conftest import make_texts
from tests.data.tiny_tokenizers import (
    SENTENCEPIECE,
    huggingface_flags,
    save_huggingface,
    save_tiktoken,
    sentencepiece_flags,
    train_huggingface,
    train_sentencepiece,
)

TEXTS = [
    *make_texts(5, 3),
    "\n\n".join(make_texts(40, 4)),
    "<|x y|>b" * 200,
    *("", " ", "  leading and trailing  ", "\x01\x00\x7f", "<s> a</s><pad> <|x y|>b", "☯ 日本 ☯"),
]


def training_parser() -> argparse.ArgumentParser:
    from megatron.training.argument_utils import ArgumentGroupFactory
    from megatron.training.config import TokenizerConfig

    parser = argparse.ArgumentParser()
    ArgumentGroupFactory(TokenizerConfig).build_group(parser, "tokenizer")
    return parser


def from_training(settings: dict[str, Any]) -> Any:
    """The tokenizer that the training program builds from the same flags."""
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

    special = settings.pop("tokenizer_special_tokens", None)
    args = training_parser().parse_args([])
    vars(args).update(settings, special_tokens=special and list(special), pad_vocab_size=False)
    return build_tokenizer(args)


def encode(tokenizer: Any) -> list[list[int]]:
    encoded = tokenizer.encode_batch(TEXTS)
    assert {ids.dtype for ids in encoded} == {np.dtype(np.uint16)}
    return [ids.tolist() for ids in encoded]


def check_same(flags: TokenizerFlags) -> None:
    ours, core = load_tokenizer(flags), from_training(asdict(flags))
    encoded = encode(ours)
    assert encoded == [core.tokenize(text) for text in TEXTS]
    assert (ours.vocab_size, ours.eod) == (core.vocab_size, core.eod)
    assert ours.detokenize(encoded[0]) == core.detokenize(encoded[0])
    assert build_core_tokenizer(flags).unique_identifiers == core.unique_identifiers


@pytest.mark.parametrize("kind", SENTENCEPIECE)
def test_sentencepiece_is_megatrons(tmp_path: Path, kind: str) -> None:
    model = train_sentencepiece(tmp_path / "m.model", **SENTENCEPIECE[kind])
    flags = sentencepiece_flags(model)
    check_same(flags)
    check_same(replace(flags, tokenizer_sentencepiece_ignore_extra_whitespaces=False))
    if kind == "llama2":
        check_same(replace(flags, tokenizer_type="Llama2Tokenizer"))
        check_same(replace(flags, tokenizer_type="GPTSentencePieceTokenizer"))


def test_tiktoken_is_megatrons(tmp_path: Path) -> None:
    from megatron.core.tokenizers.text.libraries.tiktoken_tokenizer import SPECIAL_TOKENS

    flags = save_tiktoken(tmp_path / "vocab.json")
    check_same(flags)
    check_same(replace(flags, tiktoken_pattern="v1"))
    check_same(replace(flags, tokenizer_special_tokens=(*SPECIAL_TOKENS, "<|x y|>")))
    assert flags.vocab_size is not None
    check_same(replace(flags, vocab_size=flags.vocab_size - 9, tiktoken_num_special_tokens=11))


def limited_huggingface() -> Tokenizer:
    """One that cuts and pads texts, unless it is told not to, and puts special tokens around."""
    tokenizer = train_huggingface(bos=True)
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=9, pad_token="<pad>")
    return tokenizer


@pytest.mark.parametrize("include", [True, False])
def test_huggingface_is_the_library(tmp_path: Path, include: bool) -> None:
    tokenizer = limited_huggingface()
    directory = save_huggingface(tokenizer, tmp_path / "hf", eos_token="</s>")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    flags = replace(
        huggingface_flags(directory), tokenizer_hf_no_include_special_tokens=not include
    )
    ours = load_tokenizer(flags)
    whole = [tokenizer.encode(text, add_special_tokens=include).ids for text in TEXTS]
    assert encode(ours) == whole
    assert (ours.vocab_size, ours.eod) == (400, 1)
    naive = tokenizer.encode("naïve", add_special_tokens=False).ids
    assert ours.detokenize([0, *naive]) == "<s>naïve"
    more = load_tokenizer(replace(flags, tokenizer_special_tokens=("<|x y|>", "</s>")))
    assert (more.vocab_size, more.eod) == (401, 1)
    around = [0] * include, [1] * include
    assert more.encode_batch(["</s><|x y|>"])[0].tolist() == [*around[0], 1, 400, *around[1]]


def hide_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name != "transformers" or None)


ADDED = {
    "lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True,
}  # fmt: skip


@pytest.mark.parametrize("extra", [None, ("<|x y|>", "<pad>")])
@pytest.mark.parametrize("include", [True, False])
@pytest.mark.parametrize(
    ("settings", "plain"),
    [
        ({}, True),
        ({"eos_token": "</s>", "bos_token": "<s>"}, True),
        ({"sep_token": "</s>", "cls_token": "<s>", "pad_token": "<pad>"}, True),
        ({"eos_token": {"content": "</s>", **ADDED, "__type": "AddedToken"}}, False),
        ({"added_tokens_decoder": {"1": {"content": "</s>", **ADDED, "lstrip": True}}}, False),
        ({"eos_token": "<|new|>", "additional_special_tokens": ["the model"]}, False),
        ({"tokenizer_class": "GPT2Tokenizer", "eos_token": "</s>"}, False),
        ({"tokenizer_class": "LlamaTokenizer", "eos_token": "</s>"}, False),
    ],
)
def test_huggingface_is_megatrons_with_transformers_or_without(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
    plain: bool,
    include: bool,
    extra: tuple[str, ...] | None,
) -> None:
    pytest.importorskip("transformers")
    flags = replace(
        huggingface_flags(save_huggingface(limited_huggingface(), tmp_path / "hf", **settings)),
        tokenizer_special_tokens=extra,
        tokenizer_hf_no_include_special_tokens=not include,
    )
    check_same(flags)
    core = build_core_tokenizer(flags)
    hide_transformers(monkeypatch)
    if not plain:
        with pytest.raises(UserError, match="pip install transformers"):
            load_tokenizer(flags)
        return
    ours = load_tokenizer(flags)
    assert encode(ours) == list(map(core.tokenize, TEXTS))
    assert (ours.vocab_size, ours.eod) == (core.vocab_size, core.eod)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", '{"tokenizer_class": "LlamaTokenizer"}'),
        ("tokenizer_config.json", '{"eos_token": "<|new|>"}'),
        ("tokenizer_config.json", '{"add_bos_token": true}'),
        ("special_tokens_map.json", '{"additional_special_tokens": ["<|new|>"]}'),
        ("config.json", '{"model_type": "llama"}'),
        ("tokenizer.json", None),
    ],
)
def test_what_only_transformers_can_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: str | None
) -> None:
    directory = Path(save_huggingface(train_huggingface(), tmp_path / "hf"))
    flags = huggingface_flags(str(directory))
    hide_transformers(monkeypatch)
    load_tokenizer(flags)
    (directory / name).unlink() if content is None else (directory / name).write_text(content)
    with pytest.raises(UserError, match=r"^--tokenizer-model .*/hf: .*; run: pip install transfor"):
        load_tokenizer(flags)


def test_a_model_that_is_no_directory(tmp_path: Path) -> None:
    directory = save_huggingface(train_huggingface(), tmp_path / "hf")
    flags = huggingface_flags(f"{directory}/tokenizer.json")
    with pytest.raises(UserError, match=rf"give the directory .*: {directory}$"):
        load_tokenizer(flags)


@pytest.mark.parametrize("type_", ["HuggingFaceTokenizer", "TikTokenizer", "Llama2Tokenizer"])
def test_a_damaged_model(tmp_path: Path, type_: TokenizerType) -> None:
    path = tmp_path if type_ == "HuggingFaceTokenizer" else tmp_path / "vocab.json"
    for name in ("vocab.json", "tokenizer.json"):
        (tmp_path / name).write_text("[")
    with pytest.raises(UserError, match=f"^--tokenizer-model {path}: cannot be loaded as "):
        load_tokenizer(TokenizerFlags(tokenizer_type=type_, tokenizer_model=str(path)))


def test_bytes_are_what_the_training_program_is_told() -> None:
    flags = TokenizerFlags(tokenizer_type="ByteLevelTokenizer")
    ours = load_tokenizer(flags)
    core = from_training({"tokenizer_type": "NullTokenizer", "vocab_size": 257})
    assert (ours.vocab_size, ours.eod) == (core.vocab_size, core.eod) == (257, 256)
    assert core.pad < 0  # so that no byte is padding
    text = "\x00\x01 naïve 日本 \U0010ffff"
    ids = ours.encode_batch([text, ""])
    assert ids[0].tolist() == list(text.encode())
    assert ids[0].dtype == np.uint16
    assert ids[1].size == 0
    assert ours.detokenize([*ids[0].tolist(), 256]) == text
    assert model_sha256(None) == hashlib.sha256(b"").hexdigest()


def parse(*flags: str) -> TokenizerFlags:
    return command_line.parse(TokenizerFlags, flags, "")


def test_the_flags_are_megatrons() -> None:
    every = [
        "--tokenizer-type", "TikTokenizer", "--tokenizer-model", "m", "--vocab-size", "9",
        "--tokenizer-special-tokens", "a", "b", "--tiktoken-pattern", "v1",
        "--tiktoken-num-special-tokens", "7", "--tokenizer-hf-no-include-special-tokens",
        "--no-tokenizer-sentencepiece-ignore-extra-whitespaces",
    ]  # fmt: skip
    for line in (["--tokenizer-type", "Llama2Tokenizer", "--tokenizer-model", "m"], every):
        ours, theirs = asdict(parse(*line)), vars(training_parser().parse_args(line))
        special = ours.pop("tokenizer_special_tokens")
        assert theirs["special_tokens"] == (special and list(special))
        assert ours == {name: theirs[name] for name in ours}
    default = parse("--tokenizer-type", "ByteLevelTokenizer")
    assert all(value != getattr(default, name) for name, value in asdict(parse(*every)).items())


def test_flags_that_do_not_go_together() -> None:
    with pytest.raises(UserError, match="TikTokenizer needs a --tokenizer-model"):
        TokenizerFlags(tokenizer_type="TikTokenizer")
    with pytest.raises(UserError, match="has no model; leave --tokenizer-model out"):
        TokenizerFlags(tokenizer_type="ByteLevelTokenizer", tokenizer_model="m")
    flags = replace(sentencepiece_flags(__file__), tokenizer_special_tokens=("<x>",))
    with pytest.raises(UserError, match="a SentencePiece model takes none later"):
        load_tokenizer(flags)


def test_a_text_that_the_library_cannot_encode(tmp_path: Path) -> None:
    tokenizer = train_huggingface(pattern="(a+)+b")
    directory = save_huggingface(tokenizer, tmp_path / "hf")
    ours = load_tokenizer(huggingface_flags(directory))
    with pytest.raises(ValueError, match="tokenizers library failed: Onig: Regex search error"):
        ours.encode_batch(["a" * 100])


_COUNT_THREADS = """
import os, sys
from megatron_rw.data.tokenizers.tokenizer import load_tokenizer
from megatron_rw.data.tokenizers.tokenizer_flags import TokenizerFlags
flags = TokenizerFlags(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=sys.argv[1])
tokenizer = load_tokenizer(flags)
before = len(os.listdir("/proc/self/task"))
tokenizer.encode_batch(["the model reads a batch of text " * 2000] * 20)
print(before, len(os.listdir("/proc/self/task")))
"""


def test_encoding_starts_no_thread(tmp_path: Path) -> None:
    directory = save_huggingface(train_huggingface(), tmp_path / "hf")
    counts = subprocess.check_output(
        [sys.executable, "-c", _COUNT_THREADS, directory],
        env=os.environ | {"RAYON_NUM_THREADS": "4", "TOKENIZERS_PARALLELISM": "true"},
    ).split()
    assert counts[0] == counts[1]


_START = """
import sys
from megatron_rw.data import inspect_dataset, merge_datasets, preprocess_data, split_dataset
from megatron_rw.data import train_tokenizer
from megatron_rw.data.tokenizers.tokenizer import load_tokenizer
from megatron_rw.data.tokenizers.tokenizer_flags import TokenizerFlags
flags = TokenizerFlags(tokenizer_model=sys.argv[1])
print(load_tokenizer(flags).encode_batch(["the"])[0].dtype)
load_tokenizer(TokenizerFlags(tokenizer_type="ByteLevelTokenizer"))
print([name for name in ("torch", "megatron", "transformers") if name in sys.modules])
"""


def test_the_tools_and_the_common_tokenizers_import_nothing_heavy(model: str) -> None:
    started = subprocess.check_output([sys.executable, "-c", _START, model], text=True)
    assert started == "uint16\n[]\n"
