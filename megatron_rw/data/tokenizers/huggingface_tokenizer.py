"""Hugging Face tokenizers, encoded by their Rust library.

`transformers` loads a directory through core's class, as in the training program. Where it is not
installed, a tokenizer.json is read as it stands, if no other file of the directory could make
`transformers` change it.
"""

import importlib.util
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_rw.data.tokenizers.library_tokenizer import (
    LibraryTokenizer,
    build_core_tokenizer,
    library_errors,
    optimal_dtype,
    require_package,
    whole_text_tokenizer,
)
from megatron_rw.data.tokenizers.safe_cuts import (
    GPT2_WORDS,
    SEGMENT_CHARACTERS,
    CutTextEncoder,
    cuts_between_words,
)
from megatron_rw.data.tokenizers.tokenizer_flags import TokenizerFlags
from megatron_rw.data.tokenizers.word_cache import byte_level_words, encoder_in_words
from megatron_rw.errors import UserError

# The settings of a tokenizer_config.json with which `transformers` uses tokenizer.json unchanged.
_PLAIN_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")
_SPECIAL_TOKENS = tuple(f"{name}_token" for name in "bos eos unk sep pad cls mask".split())
_HARMLESS_SETTINGS = (
    *("tokenizer_class", "model_max_length", "chat_template", "clean_up_tokenization_spaces"),
    *_SPECIAL_TOKENS,
)
_PLAIN_FILES = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
# Files of a model that no tokenizer reads.
_OTHER_FILES = ("README.md", "LICENSE", ".gitattributes", "generation_config.json")
_WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json")


def huggingface_tokenizer(
    tokenizer: Any,
    eod: int | None,
    include_special_tokens: bool = True,
    segment_characters: int = SEGMENT_CHARACTERS,
) -> LibraryTokenizer:
    """Returns a tokenizer over a `tokenizers.Tokenizer`.

    Texts are cut into words or segments where that is safe (see `known_word_pattern`). Other
    tokenizers are given every text whole, which takes 90 to 170 bytes of memory per character. The
    tokenizer's truncation and padding are switched off; `include_special_tokens` says whether to
    add the special tokens around a text, such as `<s>`, that its post-processor adds.
    """
    # A process per core tokenizes already; the library reads this at every call.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer.no_truncation()
    tokenizer.no_padding()
    vocab_size = tokenizer.get_vocab_size(with_added_tokens=True)
    dtype = optimal_dtype(vocab_size)
    definition = json.loads(tokenizer.to_str())
    added = definition["added_tokens"]
    pattern = known_word_pattern(definition)
    next_cut = cuts_between_words(pattern)
    # Where texts are cut, the special tokens around a text are added afterwards.
    special_to_whole = include_special_tokens and next_cut is None
    special_to_cut = include_special_tokens and next_cut is not None

    def encode(texts: list[str]) -> list[NDArray[Any]]:
        with _panics_as_errors():
            encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=special_to_whole)
        return [np.array(encoding.ids, dtype) for encoding in encodings]

    def encode_word(word: str) -> list[int]:
        with _panics_as_errors():
            ids: list[int] = tokenizer.encode(word, add_special_tokens=False).ids
        return ids

    words = byte_level_words(pattern, [token["content"] for token in added])
    # Whether a token of the kind single_word is one depends on the character before it.
    if any(token["single_word"] for token in added):
        words = None
    segments = CutTextEncoder(encode, next_cut, dtype, segment_characters)
    return LibraryTokenizer(
        vocab_size,
        eod,
        encoder_in_words(segments, words, encode_word),
        partial(tokenizer.decode, skip_special_tokens=False),
        around=_special_tokens_around(tokenizer) if special_to_cut else ((), ()),
    )


@contextmanager
def _panics_as_errors() -> Iterator[None]:
    """Turns a panic in Rust into a ValueError; its class has no public name and is no Exception."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"the tokenizers library failed: {error}") from error


def _special_tokens_around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Returns the ids that the post-processor puts before and after every text."""
    text = tokenizer.encode("a", add_special_tokens=False)
    with_special = tokenizer.post_process(text)
    inner = [place for place, mark in enumerate(with_special.special_tokens_mask) if not mark]
    return with_special.ids[: inner[0]], with_special.ids[inner[-1] + 1 :]


def load_huggingface(flags: TokenizerFlags) -> LibraryTokenizer:
    """Loads the tokenizer of a directory.

    Raises a `UserError` if it is a file, or needs a package that is not installed.
    """
    directory = Path(str(flags.tokenizer_model))
    if directory.is_file():
        raise UserError(
            f"--tokenizer-model {directory}: give the directory that holds the file, as the "
            f"training program needs it: {directory.parent}"
        )
    if importlib.util.find_spec("transformers") is None:
        require_package("tokenizers", f"--tokenizer-type {flags.tokenizer_type}")
        tokenizer, eod = _load_plain(directory, flags)
    else:
        core = build_core_tokenizer(flags)
        tokenizer, eod = getattr(core._tokenizer.tokenizer, "backend_tokenizer", None), core.eod
        if tokenizer is None:  # a tokenizer written in Python
            return whole_text_tokenizer(core)
    include_special_tokens = not flags.tokenizer_hf_no_include_special_tokens
    return huggingface_tokenizer(tokenizer, eod, include_special_tokens)


def _load_plain(directory: Path, flags: TokenizerFlags) -> tuple[Any, int | None]:
    """Returns the tokenizer of a tokenizer.json, and the id that ends a document.

    Raises a `UserError` if `transformers` could load another tokenizer from the directory.
    """
    from tokenizers import AddedToken, Tokenizer

    more = f"--tokenizer-model {directory}: reading more than a plain tokenizer.json"
    path, config = directory / "tokenizer.json", directory / "tokenizer_config.json"
    if not path.exists():
        require_package("transformers", more)
    with library_errors(flags):
        tokenizer = Tokenizer.from_file(str(path))
        settings = json.loads(config.read_text("utf-8")) if config.exists() else {}
    if not _is_plain(directory, settings, json.loads(tokenizer.to_str())["added_tokens"]):
        require_package("transformers", more)
    extra = flags.tokenizer_special_tokens or ()
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in extra])
    eod = settings.get("eos_token") or settings.get("sep_token")
    return tokenizer, None if eod is None else tokenizer.token_to_id(eod)


def _is_plain(directory: Path, settings: dict[str, Any], added: list[dict[str, Any]]) -> bool:
    """Whether nothing beside tokenizer.json can change ids: no other file, and known settings."""
    names = {path.name for path in directory.iterdir() if path.is_file()}
    others = names - _PLAIN_FILES - set(_OTHER_FILES)
    if not all(name.endswith(_WEIGHTS) for name in others):
        return False
    if settings.get("tokenizer_class", _PLAIN_CLASSES[0]) not in _PLAIN_CLASSES:
        return False
    plain = [
        token["content"]
        for token in added
        if token["special"]
        and not any(token[name] for name in ("single_word", "lstrip", "rstrip", "normalized"))
    ]
    special = [settings[name] for name in _SPECIAL_TOKENS if settings.get(name) is not None]
    return set(settings) <= set(_HARMLESS_SETTINGS) and all(token in plain for token in special)


def known_word_pattern(definition: dict[str, Any]) -> str | None:
    """Returns the pattern of a tokenizer's words if its texts may be cut between words, else None.

    They may be cut if the tokenizer is a byte-level BPE, which encodes each word by itself, over a
    known pattern of words, if no added token reaches over white space, and if the normalization is
    at most NFC, which joins nothing to white space.
    """
    normalizer, words, model = (definition[key] for key in ("normalizer", "pre_tokenizer", "model"))
    if normalizer is not None and normalizer["type"] != "NFC":
        return None
    if model.get("type") != "BPE" or model.get("dropout") or words is None:
        return None
    for token in definition["added_tokens"]:
        if token["lstrip"] or token["rstrip"] or any(map(str.isspace, token["content"])):
            return None
    *first, last = words["pretokenizers"] if words["type"] == "Sequence" else [words]
    # Digits only cuts words further.
    first = [step for step in first if step["type"] != "Digits"]
    if last["type"] != "ByteLevel" or last["add_prefix_space"] or len(first) > 1:
        return None
    if not first:
        return GPT2_WORDS if last["use_regex"] else None
    if first[0]["type"] != "Split" or first[0]["behavior"] != "Isolated" or first[0]["invert"]:
        return None
    pattern: str | None = first[0]["pattern"].get("Regex")
    return pattern if cuts_between_words(pattern) else None
