"""Trains a SentencePiece tokenizer on text, of which it takes as much of every domain.

The same inputs and flags give the same bytes. `--max-bytes` bounds the memory and how much is read
(see `domain_sampling`). `sentencepiece_training` says what the model keeps of a text, and which
token ids are fixed.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from megatron_rw.command_line import parse, require
from megatron_rw.data.progress import say
from megatron_rw.data.text.domain_sampling import TextSample, draw
from megatron_rw.data.text.sources import InputFlags
from megatron_rw.data.tokenizers.sentencepiece_training import (
    VocabularyFlags,
    check_special_tokens,
    sentences,
    train,
)
from megatron_rw.errors import UserError, reported
from megatron_rw.platform.files import complete_file

_TOOL = "train_tokenizer"
_DESCRIPTION = """\
Train a SentencePiece tokenizer on text. The same inputs and flags give the same bytes.

example:
  python tools/train_tokenizer.py --input corpus/*.jsonl.gz --output-prefix tokenizer/bpe8k \\
      --vocab-size 8192 --domain-key domain --special-tokens '<|im_start|>' '<|im_end|>'
  writes tokenizer/bpe8k.model, for --tokenizer-type SentencePieceTokenizer
  --tokenizer-model tokenizer/bpe8k.model
"""
_LEAST_BYTES = 10_000


@dataclass(frozen=True, kw_only=True)
class TrainTokenizerConfig:
    """The flags of train_tokenizer."""

    inputs: InputFlags
    """Input."""

    vocabulary: VocabularyFlags
    """Vocabulary."""

    output_prefix: Annotated[str, arg(metavar="PREFIX")]
    """The tool writes PREFIX.model."""

    overwrite: bool = False
    """Replace the tokenizer that is there already."""

    json_key: Annotated[str, arg(metavar="KEY")] = "text"
    """Field or column that holds the text."""

    max_bad_fraction: Annotated[float, arg(metavar="F")] = 0.001
    """End with an error if more than this share of the lines read are no documents. Fewer are left
    out."""

    max_bytes: Annotated[int, arg(metavar="N")] = 500_000_000
    """UTF-8 bytes of text to train on, as much of every domain, and spread over all of
    the domain. At most about 16 times as much is read, except of compressed files, which are read
    to their end."""

    def __post_init__(self) -> None:
        for flag, value, least in (
            ("--vocab-size", self.vocabulary.vocab_size, 1),
            ("--threads", self.vocabulary.threads, 1),
            ("--max-bytes", self.max_bytes, _LEAST_BYTES),
        ):
            require(value >= least, flag, value, f"a number of at least {least}")
        share = self.max_bad_fraction
        require(0 <= share <= 1, "--max-bad-fraction", share, "a number from 0 to 1")
        check_special_tokens(self.vocabulary.special_tokens)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    with reported("training a tokenizer"):
        _run(parse(TrainTokenizerConfig, argv, _DESCRIPTION))


def _run(config: TrainTokenizerConfig) -> None:
    started = time.monotonic()
    vocabulary, prefix = config.vocabulary, config.output_prefix
    if Path(f"{prefix}.model").exists() and not config.overwrite:
        raise UserError(
            f"--output-prefix {prefix}: {prefix}.model is there already, and datasets made with it "
            "need it; give another prefix, or --overwrite to replace it"
        )
    Path(prefix).parent.mkdir(parents=True, exist_ok=True)
    sample = _draw(config)
    size, kind = vocabulary.vocab_size, vocabulary.model_type
    say(_TOOL, f"training {kind}, {size} pieces, on {sample.kept / 1e6:.1f} MB of text")
    model = train(sample.take(), sample.kept, vocabulary)
    with complete_file(Path(f"{prefix}.model")) as file:
        file.write(model)
    say(_TOOL, f"wrote {prefix}.model in {time.monotonic() - started:.1f} s")


def _draw(config: TrainTokenizerConfig) -> TextSample:
    """Reads the inputs, keeps a sample of their text, and says what it is made of."""
    sample, bad = draw(
        config.inputs, config.json_key, config.max_bytes, config.max_bad_fraction, sentences
    )
    seen = sum(domain.seen for domain in sample.domains.values())
    say(_TOOL, f"read {seen / 1e6:.1f} MB of text, of which are trained on")
    for name, domain in sample.domains.items():
        every = ", all that was read" if domain.kept == domain.seen else ""
        share = domain.kept / max(1, sample.kept)
        say(_TOOL, f"  {name}: {domain.kept / 1e6:.1f} MB, {share:.1%}{every}")
    if bad:
        say(_TOOL, f"left out {bad:,} bad lines")
    return sample
