"""Hugging Face tokenizers, by their Rust library alone where `transformers` would change nothing.

Core's class leaves the reading of a directory to the `AutoTokenizer` of `transformers`, which for
some models builds the tokenizer anew by rules of its own and adds tokens that other files name.
Where the files rule that out, `tokenizer.json` is all there is to read; for the other directories
core's class is asked, and what it made is used in the same way.
"""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_rw.data.tokenizers.core_tokenizer import (
    CoreTokenizer,
    build_core_tokenizer,
    optimal_dtype,
    require_package,
)
from megatron_rw.data.tokenizers.safe_cuts import (
    GPT2_WORDS,
    SEGMENT_CHARACTERS,
    SegmentEncoder,
    cuts_between_words,
)
from megatron_rw.data.tokenizers.tokenizer_flags import TokenizerFlags
from megatron_rw.data.tokenizers.word_cache import WordEncoder, byte_level_words
from megatron_rw.errors import UserError

# What `transformers` loads from tokenizer.json as it stands.
_PLAIN_CLASSES = (None, "PreTrainedTokenizerFast", "TokenizersBackend")
# Settings that change ids, and files that change the class or its tokens.
_OTHER_SETTINGS = (
    "auto_map",
    "init_inputs",
    "add_bos_token",
    "add_eos_token",
    "add_prefix_space",
    "split_special_tokens",
    "fix_mistral_regex",
)
_OTHER_FILES = ("config.json", "added_tokens.json")


class HuggingFaceTokenizer:
    """Encodes with a `tokenizers.Tokenizer`, into arrays.

    Texts are cut into words or segments where that is safe (see `known_words`); other tokenizers
    see every text whole, whose working memory is then 90 to 170 bytes per character.

    Args:
        tokenizer: The Rust tokenizer; its truncation and padding are switched off.
        eod: The id that ends a document.
        include_special_tokens: Whether to encode with the special tokens around a text, as `<s>`,
            that the tokenizer's post-processor adds.
        segment_characters: The least length of a segment.
    """

    def __init__(
        self,
        tokenizer: Any,
        eod: int | None,
        include_special_tokens: bool = True,
        segment_characters: int = SEGMENT_CHARACTERS,
    ) -> None:
        # A process per core tokenizes already; the library reads this at every call.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self.vocab_size: int = tokenizer.get_vocab_size(with_added_tokens=True)
        self.eod = eod
        self._dtype = optimal_dtype(self.vocab_size)
        definition = json.loads(tokenizer.to_str())
        pattern = known_words(definition)
        next_cut = cuts_between_words(pattern)
        segments = SegmentEncoder(
            # The special tokens around a text are none of its segments'.
            partial(self._encode, next_cut is None and include_special_tokens),
            next_cut,
            self._dtype,
            segment_characters,
        )
        self._encoder: SegmentEncoder | WordEncoder = segments
        added = definition["added_tokens"]
        words = byte_level_words(pattern, [token["content"] for token in added])
        # Whether a token of the kind single_word is one depends on the character before it.
        if next_cut and words and not any(token["single_word"] for token in added):
            self._encoder = WordEncoder(words, self._encode_word, segments)
        around: tuple[list[int], list[int]] = ([], [])
        if next_cut and include_special_tokens:
            around = _special_tokens_around(tokenizer)
        self._before, self._after = (np.array(ids, self._dtype) for ids in around)

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[Any]]:
        """See `tokenizer.Tokenizer`."""
        encoded = self._encoder.encode_batch(texts)
        if not self._before.size and not self._after.size:
            return encoded
        return [np.concatenate((self._before, ids, self._after)) for ids in encoded]

    def _encode(self, include_special_tokens: bool, texts: list[str]) -> list[NDArray[Any]]:
        with _panics_as_errors():
            encodings = self._tokenizer.encode_batch_fast(
                texts, add_special_tokens=include_special_tokens
            )
        return [np.array(encoding.ids, self._dtype) for encoding in encodings]

    def _encode_word(self, word: str) -> list[int]:
        with _panics_as_errors():
            ids: list[int] = self._tokenizer.encode(word, add_special_tokens=False).ids
        return ids

    def detokenize(self, ids: Sequence[int]) -> str:
        """See `tokenizer.Tokenizer`; special tokens are shown."""
        return str(self._tokenizer.decode([int(id_) for id_ in ids], skip_special_tokens=False))


@contextmanager
def _panics_as_errors() -> Iterator[None]:
    """Turns a panic in Rust into a ValueError; its class has no public name and is no Exception."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"the tokenizers library failed: {error}") from error


def load_huggingface(flags: TokenizerFlags) -> HuggingFaceTokenizer | CoreTokenizer:
    """Loads the tokenizer of a directory.

    Raises:
        UserError: If it is a file, or needs a package that is not installed.
    """
    directory = Path(str(flags.tokenizer_model))
    if directory.is_file():
        raise UserError(
            f"--tokenizer-model {directory}: give the directory that holds the file, as the "
            f"training program needs it: {directory.parent}"
        )
    require_package("tokenizers", flags.tokenizer_type)
    if is_self_contained(directory):
        tokenizer, eod = _read(directory, flags.tokenizer_special_tokens or ())
    else:
        require_package("transformers", f"{flags.tokenizer_type}, to read {directory},")
        core = build_core_tokenizer(flags)
        tokenizer, eod = getattr(core._tokenizer.tokenizer, "backend_tokenizer", None), core.eod
        if tokenizer is None:  # a tokenizer in Python
            return CoreTokenizer(core)
    return HuggingFaceTokenizer(tokenizer, eod, not flags.tokenizer_hf_no_include_special_tokens)


def is_self_contained(directory: Path) -> bool:
    """Whether `transformers` would load the directory's tokenizer.json as it stands."""
    if not (directory / "tokenizer.json").is_file():
        return False
    if any((directory / name).exists() for name in _OTHER_FILES):
        return False
    settings = _settings(directory)
    if settings.get("tokenizer_class") not in _PLAIN_CLASSES:
        return False
    if any(settings.get(name) for name in _OTHER_SETTINGS):
        return False
    definition = json.loads((directory / "tokenizer.json").read_text("utf-8"))
    added = {token["id"]: token for token in definition["added_tokens"]}
    contents = {token["content"] for token in added.values()}
    named = {content for key in settings for content in _contents(key, settings[key])}
    listed = settings.get("added_tokens_decoder", {})
    return named <= contents and all(
        added.get(int(id_)) == {"id": int(id_), **token} for id_, token in listed.items()
    )


def _settings(directory: Path) -> dict[str, Any]:
    """Returns tokenizer_config.json, with special_tokens_map.json where `transformers` reads it."""
    settings: dict[str, Any] = {}
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = directory / name
        if path.exists() and "added_tokens_decoder" not in settings:
            settings |= json.loads(path.read_text("utf-8"))
    return settings


def _contents(key: str, value: Any) -> list[str]:
    """Returns the texts of the special tokens that a setting names."""
    if key in ("additional_special_tokens", "extra_special_tokens"):
        tokens = list(value.values()) if isinstance(value, dict) else value or []
    else:
        tokens = [value] if key.endswith("_token") else []
    texts = [token["content"] if isinstance(token, dict) else token for token in tokens]
    return [text for text in texts if isinstance(text, str)]


def _read(directory: Path, extra: Sequence[str]) -> tuple[Any, int | None]:
    """Returns the tokenizer with the special tokens that core's class adds, and the eod."""
    from tokenizers import AddedToken, Tokenizer

    settings = _settings(directory)

    def named(key: str) -> str | None:
        return next(iter(_contents(key, settings.get(key))), None)

    eos, sep, bos, cls = (named(f"{name}_token") for name in ("eos", "sep", "bos", "cls"))
    added = [*extra]
    if bos is None or cls is None:
        added.insert(0, bos or cls or "")
    if eos is None or sep is None:
        added.insert(0, eos or sep or "")
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.add_special_tokens(
        [AddedToken(text, normalized=False, special=True) for text in added if text]
    )
    eod = eos or sep
    return tokenizer, None if eod is None else tokenizer.token_to_id(eod)


def _special_tokens_around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Returns the ids that the post-processor puts before and after every text."""
    text = tokenizer.encode("a", add_special_tokens=False)
    with_special = tokenizer.post_process(text)
    inner = [place for place, mark in enumerate(with_special.special_tokens_mask) if not mark]
    return with_special.ids[: inner[0]], with_special.ids[inner[-1] + 1 :]


def known_words(definition: dict[str, Any]) -> str | None:
    """Returns the pattern of a tokenizer's words if its texts may be cut between them.

    It looks for tokens in one word at a time if it is byte-level BPE over a known pattern of words;
    no added token may reach over white space, and normalization, NFC at most, joins nothing to it.

    Args:
        definition: The content of its tokenizer.json.
    """
    normalizer, words, model = (definition[key] for key in ("normalizer", "pre_tokenizer", "model"))
    if normalizer is not None and normalizer["type"] != "NFC":
        return None
    if model.get("type") != "BPE" or model.get("dropout") or words is None:
        return None
    if any(map(_reaches_over_white_space, definition["added_tokens"])):
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


def _reaches_over_white_space(token: dict[str, Any]) -> bool:
    return token["lstrip"] or token["rstrip"] or any(map(str.isspace, token["content"]))
