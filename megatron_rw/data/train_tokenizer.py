"""Trains a SentencePiece tokenizer on text, sampled evenly or by weight over domains.

The same inputs and flags give the same bytes. Memory is bounded by `--max-bytes`, and so is what
is read (`spread_reading`). What the model keeps of a text, and its fixed token ids, stand in
`sentencepiece_training`.
"""

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_rw.data.command import exit_status
from megatron_rw.data.text.domain_sampling import (
    READ_PER_KEPT,
    draw_sample,
    parse_weights,
    plan_reading,
)
from megatron_rw.data.text.sources import find_sources
from megatron_rw.data.text.spread_reading import DocumentReader, how_to_read
from megatron_rw.data.tokenizers.sentencepiece_training import (
    check_special_tokens,
    sentences,
    train,
    vocabulary_listing,
)
from megatron_rw.platform.files import complete_file, write_complete

_LEAST_BYTES = 10_000
_DIVISIBLE_BY = 128  # Megatron's default

_EXAMPLE = """\
example:
  python tools/train_tokenizer.py --input corpus/*.jsonl.gz --output-prefix tokenizer/bpe8k \\
      --vocab-size 8192 --domain-key domain --domain-weights wiki=0.5 code=0.3 math=0.2 \\
      --special-tokens '<|im_start|>' '<|im_end|>'
  writes tokenizer/bpe8k.model, for --tokenizer-type SentencePieceTokenizer
  --tokenizer-model tokenizer/bpe8k.model, and tokenizer/bpe8k.vocab, which lists the pieces.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    args = _parse(argv)
    return exit_status(lambda: _run(args))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="train_tokenizer.py",
        description="Train a SentencePiece tokenizer on text. The same inputs and "
        "flags give the same bytes.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--input", nargs="+", required=True, metavar="PATH")
    parser.add_argument(
        "--json-key",
        default="text",
        metavar="KEY",
        help="field or column that holds the text (text)",
    )
    parser.add_argument(
        "--max-bad-fraction",
        type=float,
        default=0.001,
        metavar="F",
        help="end with an error if more than this share of the lines read are no documents "
        "(0.001); those that are not are left out",
    )
    parser.add_argument(
        "--output-prefix",
        required=True,
        metavar="PREFIX",
        help="writes PREFIX.model and PREFIX.vocab, replacing what is there",
    )
    _add_sample_flags(parser)
    _add_vocabulary_flags(parser)
    parser.add_argument(
        "--threads",
        type=int,
        default=8,
        metavar="N",
        help="training threads (8); part of what makes the bytes the same, so not taken from "
        "the machine",
    )
    args = parser.parse_args(argv)
    for flag, least in {
        "vocab_size": 1,
        "max_bytes": _LEAST_BYTES,
        "threads": 1,
        "make_vocab_size_divisible_by": 1,
        "tensor_model_parallel_size": 1,
    }.items():
        value = getattr(args, flag)
        if value is not None and value < least:
            parser.error(f"--{flag.replace('_', '-')} must be at least {least}")
    if not 0 <= args.max_bad_fraction <= 1:
        parser.error("--max-bad-fraction must be from 0 to 1")
    return args


def _add_sample_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sample")
    group.add_argument(
        "--max-bytes",
        type=int,
        default=500_000_000,
        metavar="N",
        help="UTF-8 bytes of text to train on (500000000), spread over the whole of the inputs; "
        f"about {READ_PER_KEPT} times as much is read at most, except of a compressed file, "
        "which is read to its end",
    )
    domain = group.add_mutually_exclusive_group()
    domain.add_argument("--domain-key", metavar="KEY")
    domain.add_argument("--domain-by", choices=["corpus", "file", "directory"], default="corpus")
    shares = group.add_mutually_exclusive_group()
    shares.add_argument(
        "--sample",
        choices=["even", "proportional"],
        default="even",
        help="the same amount of each domain (even), or of each its share of the inputs",
    )
    shares.add_argument(
        "--domain-weights",
        nargs="+",
        metavar="DOMAIN=WEIGHT",
        help="or by weight; they need not add up to one, every domain must have one, and 0 leaves "
        "it out. Of a domain with less than its share all is taken, and the others share the rest",
    )


def _add_vocabulary_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("vocabulary")
    group.add_argument(
        "--vocab-size", type=int, default=32000, metavar="N", help="number of token ids (32000)"
    )
    group.add_argument(
        "--model-type", choices=["bpe", "unigram"], default="bpe", help="algorithm (bpe)"
    )
    group.add_argument(
        "--special-tokens",
        nargs="+",
        default=[],
        metavar="TOKEN",
        help="each is one id, from 4 on, wherever it stands in a text, as the marks of a chat "
        "template must be; clean them out of text in which they should mean nothing",
    )
    group.add_argument(
        "--tensor-model-parallel-size",
        type=int,
        metavar="N",
        help="round --vocab-size up to what Megatron pads it to for this anyway, so that pieces "
        "take the place of padding",
    )
    group.add_argument(
        "--make-vocab-size-divisible-by",
        type=int,
        metavar="N",
        help=f"the same, with Megatron's flag of this name (its default: {_DIVISIBLE_BY})",
    )


def _run(args: argparse.Namespace) -> None:
    started = time.monotonic()
    check_special_tokens(args.special_tokens)
    weights = None if args.sample == "proportional" else parse_weights(args.domain_weights or [])
    vocab_size = _vocab_size(args)
    sources = find_sources(args.input)
    columns = [args.json_key, *([args.domain_key] if args.domain_key else [])]
    reading = how_to_read(columns, READ_PER_KEPT * args.max_bytes)
    domain_of = None if args.domain_key else lambda source: source.domain(args.domain_by)
    parts = plan_reading(sources, reading, domain_of, weights, args.max_bytes)
    prefix = Path(args.output_prefix)
    prefix.parent.mkdir(parents=True, exist_ok=True)

    reader = DocumentReader(reading, args.json_key, args.domain_key, args.max_bad_fraction)
    sample = draw_sample(parts, reader, domain_of, weights, args.max_bytes, sentences)
    kept = sample.kept()
    _report_sample(sample.seen, kept, all(part.fraction == 1 for part in parts))
    if reader.bad:
        _say(f"left out {reader.bad:,} bad lines; the first is {reader.first_bad}")
    text_bytes = sum(kept.values())
    _say(f"training {args.model_type}, {vocab_size} pieces, on {text_bytes / 1e6:.1f} MB of text")
    model = train(
        sample.take(), text_bytes, vocab_size, args.model_type, args.special_tokens, args.threads
    )

    write_complete(Path(f"{prefix}.vocab"), vocabulary_listing(model))
    with complete_file(Path(f"{prefix}.model")) as file:
        file.write(model)
    _say(f"wrote {prefix}.model and {prefix}.vocab in {time.monotonic() - started:.1f} s")
    _say(_padding(vocab_size, args))


def _vocab_size(args: argparse.Namespace) -> int:
    if args.tensor_model_parallel_size is None and args.make_vocab_size_divisible_by is None:
        return int(args.vocab_size)
    return padded_vocab_size(args.vocab_size, *_multiples(args))


def _multiples(args: argparse.Namespace) -> tuple[int, int]:
    return (
        args.make_vocab_size_divisible_by or _DIVISIBLE_BY,
        args.tensor_model_parallel_size or 1,
    )


def padded_vocab_size(vocab_size: int, divisible_by: int, tensor_parallel: int) -> int:
    """Returns the rows that Megatron gives the embedding of a vocabulary of this size."""
    multiple = divisible_by * tensor_parallel
    return -(-vocab_size // multiple) * multiple


def _padding(vocab_size: int, args: argparse.Namespace) -> str:
    divisible_by, tensor_parallel = _multiples(args)
    padded = padded_vocab_size(vocab_size, divisible_by, tensor_parallel)
    return (
        f"Megatron pads {vocab_size} token ids to {padded} at --make-vocab-size-divisible-by "
        f"{divisible_by} --tensor-model-parallel-size {tensor_parallel}: "
        f"{padded - vocab_size} rows unused"
    )


def _report_sample(seen: Mapping[str, int], kept: Mapping[str, int], everything: bool) -> None:
    total = sum(kept.values())
    scope = "all there is" if everything else "a part of the inputs"
    _say(f"read {sum(seen.values()) / 1e6:.1f} MB of text, {scope}; of it are trained on")
    for domain, size in kept.items():
        every = ", all that was read" if size == seen[domain] else ""
        _say(f"  {domain}: {size / 1e6:.1f} MB, {size / total:.1%}{every}")


def _say(message: str) -> None:
    print(f"train_tokenizer: {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
