"""Tiny tokenizers of every kind, trained on made-up text."""

import base64
import io
import json
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from megatron_rw.data.tokenizers.tokenizer_flags import TokenizerFlags
from tests.data.conftest import make_texts

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
NUM_SPECIAL_TOKENS = 20

# As Llama 2, but for the size; each model below differs in the settings that it names.
LLAMA2: dict[str, Any] = {
    "model_type": "bpe",
    "vocab_size": 420,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "add_dummy_prefix": True,
    "byte_fallback": True,
}
SENTENCEPIECE: dict[str, dict[str, Any]] = {
    "llama2": {},
    "gemma": {"add_dummy_prefix": False, "allow_whitespace_only_pieces": True},
    "no bytes": {"byte_fallback": False, "add_dummy_prefix": False, "vocab_size": 300},
    "symbols": {"user_defined_symbols": ["a b", "x\u2581", "<tool>"], "add_dummy_prefix": False},
    "phrases": {"split_by_whitespace": False, "vocab_size": 1000},
    "marks": {"split_by_unicode_script": False, "user_defined_symbols": ["<|tool_1|>"]},
    # These must not be cut.
    "unigram": {"model_type": "unigram", "vocab_size": 340},
    "nfkc": {"normalization_rule_name": "nmt_nfkc"},
    "folds spaces": {"remove_extra_whitespaces": True},
    "suffix": {"treat_whitespace_as_suffix": True},
}
UNCUT = ("unigram", "nfkc", "folds spaces", "suffix")
# Where a piece has a space in it, or unknown characters are one token, there are no words.
IN_WORDS = ("llama2", "gemma", "marks")


def train_sentencepiece(path: Path, **settings: Any) -> str:
    """Returns the path of a model that is `LLAMA2` but for these settings."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in make_texts(100, 0) for line in text.split("\n")),
        model_writer=model,
        minloglevel=2,
        **LLAMA2 | settings,
    )
    path.write_bytes(model.getvalue())
    return str(path)


def sentencepiece_flags(model: str) -> TokenizerFlags:
    return TokenizerFlags(tokenizer_type="SentencePieceTokenizer", tokenizer_model=model)


def huggingface_flags(directory: str) -> TokenizerFlags:
    return TokenizerFlags(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=directory)


def train_huggingface(*, pattern: str | None = LLAMA3, bos: bool = False) -> Tokenizer:
    """A byte-level BPE; without a pattern it cuts words as GPT-2."""
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    tokenizer.pre_tokenizer = byte_level
    if pattern is not None:
        words = pre_tokenizers.Split(Regex(pattern), "isolated", False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(make_texts(100, 0), trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    return tokenizer


def save_huggingface(tokenizer: Tokenizer, directory: Path, **settings: Any) -> str:
    """Writes a Hugging Face directory and returns its path."""
    directory.mkdir()
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"} | settings
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return str(directory)


def save_tiktoken(path: Path) -> TokenizerFlags:
    """Writes a vocabulary in core's format and returns the flags that load it."""
    words = {f" {word}".encode() for text in make_texts(5, 0) for word in text.split()}
    tokens = [bytes([value]) for value in range(256)]
    tokens += sorted({word[:end] for word in words for end in range(2, len(word) + 1)}, key=len)
    content = [
        {
            "rank": rank,
            "token_bytes": base64.b64encode(token).decode(),
            "token_str": token.decode(errors="replace"),
        }
        for rank, token in enumerate(tokens)
    ]
    path.write_text(json.dumps(content))
    return TokenizerFlags(
        tokenizer_type="TikTokenizer",
        tokenizer_model=str(path),
        vocab_size=NUM_SPECIAL_TOKENS + len(tokens),
        tiktoken_num_special_tokens=NUM_SPECIAL_TOKENS,
    )
