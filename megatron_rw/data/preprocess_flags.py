"""The command line of preprocess_data."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_rw.data.text.records import MAX_LINE_BYTES
from megatron_rw.data.text.shards import Shard
from megatron_rw.data.text.sources import add_domain_flags, add_source_flags
from megatron_rw.data.tokenizers.tokenizer_flags import add_tokenizer_flags
from megatron_rw.data.workers import available_cores

_EXAMPLE = """\
example:
  python tools/preprocess_data.py --input corpus/*.jsonl.gz --domain-key domain --append-eod \\
      --tokenizer-model tokenizer/bpe8k.model --output-dir data/train
  then train with --data-args-path data/train/blend.txt

An interrupted call goes on where it was when it is repeated. docs/data.md has the whole way from
raw text to a training run.
"""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses the command line; ends the process with status 2 if it is wrong."""
    parser = argparse.ArgumentParser(
        prog="preprocess_data.py",
        description="Tokenize text into Megatron .bin/.idx datasets, one per domain.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_input(parser.add_argument_group("input"))
    add_tokenizer_flags(parser)
    _add_documents(parser.add_argument_group("documents"))
    _add_output(parser.add_argument_group("output"))
    args = parser.parse_args(argv)
    if args.split_sentences and args.max_document_tokens is not None:
        parser.error("--split-sentences and --max-document-tokens cannot be combined")
    if len(set(args.json_keys)) < len(args.json_keys):
        parser.error("--json-keys: a field is given twice")
    return args


def _add_input(group: argparse._ArgumentGroup) -> None:
    add_source_flags(group)
    group.add_argument(
        "--json-keys",
        "--json-key",
        nargs="+",
        default=["text"],
        metavar="KEY",
        help="field or column that holds the text (text); with several, each gets a directory of "
        "its own in --output-dir",
    )
    domain = group.add_mutually_exclusive_group()
    add_domain_flags(domain)
    domain.add_argument("--domain", metavar="NAME", help="one domain for all")
    group.add_argument(
        "--txt-documents",
        choices=["file", "line"],
        default="file",
        help="what of a .txt file is a document (file)",
    )
    group.add_argument(
        "--max-line-bytes",
        type=_at_least(1),
        default=MAX_LINE_BYTES,
        metavar="N",
        help="longer lines are rejected, and no more than this of one is held (%(default)s)",
    )
    group.add_argument(
        "--max-bad-fraction",
        type=_fraction,
        default=0.001,
        metavar="F",
        help="end with an error if more than this share of the lines are no documents (0.001); "
        "those that are not are left out and listed in rejects.jsonl",
    )
    group.add_argument(
        "--shard",
        type=_shard,
        metavar="I/N",
        help="take share I, from 0, of N of the input files, as one task of a job array; then "
        "tools/merge_datasets.py",
    )


def _add_documents(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--append-eod",
        action="store_true",
        help="end every document with the tokenizer's end-of-document token",
    )
    group.add_argument(
        "--max-document-tokens",
        type=_at_least(2),
        metavar="N",
        help="cut longer documents into several, of which each is ended as --append-eod says",
    )
    group.add_argument(
        "--split-sentences",
        action="store_true",
        help="make every sentence a sequence of its document",
    )
    group.add_argument(
        "--sentence-language", default="en", metavar="CODE", help="for --split-sentences (en)"
    )
    group.add_argument(
        "--dedup",
        choices=["none", "exact"],
        default="none",
        help="exact: of documents with the same text, in whatever file and domain, keep the first",
    )


def _add_output(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--output-dir", type=Path, required=True, metavar="DIR", help="made if it is not there"
    )
    group.add_argument(
        "--overwrite",
        action="store_true",
        help="replace the datasets that --output-dir holds, and drop the unfinished work of "
        "another call there",
    )
    group.add_argument(
        "--blend-by",
        choices=["tokens", "documents"],
        default="tokens",
        help="what weights of domains in blend.txt are in proportion to (tokens)",
    )
    group.add_argument(
        "--blend-temperature",
        type=_positive,
        default=1.0,
        metavar="T",
        help="raise that to the power 1/T; above 1 evens out the domains (1)",
    )
    group.add_argument(
        "--blend-weights",
        nargs="+",
        type=_weight,
        metavar="DOMAIN=W",
        help="instead, the weight of every domain",
    )
    group.add_argument(
        "--workers",
        type=_at_least(1),
        default=available_cores(),
        metavar="N",
        help="processes (one per available core: %(default)s); does not change the output",
    )


def _at_least(least: int) -> Callable[[str], int]:
    def convert(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text} is no number of at least {least}")
        return int(text)

    return convert


def _fraction(text: str) -> float:
    return _number(text, lambda value: 0 <= value <= 1, "from 0 to 1")


def _positive(text: str) -> float:
    return _number(text, lambda value: 0 < value < float("inf"), "above 0")


def _number(text: str, allowed: Callable[[float], bool], what: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not allowed(value):
        raise argparse.ArgumentTypeError(f"{text} is no number {what}")
    return value


def _weight(text: str) -> tuple[str, float]:
    domain, _, weight = text.rpartition("=")
    if not domain:
        raise argparse.ArgumentTypeError(f"{text} is not like wiki=0.3")
    return domain, _positive(weight)


def _shard(text: str) -> Shard:
    try:
        return Shard.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
