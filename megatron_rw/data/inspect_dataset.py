"""Prints what is in Megatron datasets, whether they are whole, and what their documents say.

Reads the index of each; `--check` reads every token as well. Exit status 1 when something is wrong
with the data, 2 when the command is.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_rw.data.command import exit_status
from megatron_rw.data.indexed import domains
from megatron_rw.data.indexed.checksums import checksums, expected, read_checksums
from megatron_rw.data.indexed.documents import DatasetReader
from megatron_rw.data.indexed.inspection import Report, inspect
from megatron_rw.data.indexed.lengths import check_picture, draw
from megatron_rw.data.indexed.pair import bin_path, idx_path
from megatron_rw.data.tokenizers.decoding import decode, find, tokenizer_of
from megatron_rw.data.tokenizers.tokenizer_flags import BYTE_LEVEL, add_tokenizer_flags
from megatron_rw.errors import UserError

_EXAMPLE = """\
examples:
  python tools/inspect_dataset.py data/train --check --picture lengths.png
  python tools/inspect_dataset.py data/train/wiki_text_document --document 17
  python tools/inspect_dataset.py data/train --find 'lorem ipsum'
  python tools/inspect_dataset.py data/train --checksum > data/train.sha256
  python tools/inspect_dataset.py /elsewhere/train --verify data/train.sha256
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    args = _parse(argv)
    wrong = False

    def body() -> None:
        nonlocal wrong
        try:
            wrong = _run(args)
            sys.stdout.flush()
        except BrokenPipeError:  # `| head` has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    return exit_status(body) or int(wrong)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="inspect_dataset.py",
        description="Print what is in Megatron .bin/.idx datasets, and whether they are whole.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "paths",
        nargs="+",
        type=Path,
        metavar="PATH",
        help="directories of datasets, or datasets: paths without .bin and .idx",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="read every token: is it below the vocabulary, and does each document end in the "
        "end-of-document token",
    )
    parser.add_argument(
        "--picture", type=Path, metavar="FILE", help="draw the lengths of documents; .png or other"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    actions = parser.add_mutually_exclusive_group()
    actions.add_argument(
        "--document", type=int, metavar="K", help="print the text of document K, from 0"
    )
    actions.add_argument(
        "--find", metavar="TEXT", help="list documents whose text contains TEXT, a line each"
    )
    actions.add_argument(
        "--checksum", action="store_true", help="print the SHA-256 of all files, as sha256sum does"
    )
    actions.add_argument(
        "--verify", type=Path, metavar="FILE", help="compare with what --checksum printed"
    )
    parser.add_argument(
        "--ids", action="store_true", help="with --document: print its token ids instead"
    )
    add_tokenizer_flags(parser)
    # Without a type and a model they are those that domains.json names.
    parser.set_defaults(tokenizer_type=None)
    args = parser.parse_args(argv)
    report = args.document is None and args.find is None and not args.checksum and not args.verify
    if (args.check or args.picture) and not report:
        parser.error("--check and --picture go with the report only")
    if args.ids and args.document is None:
        parser.error("--ids goes with --document")
    if args.json and (args.checksum or args.verify):
        parser.error("--json goes with the report, --document and --find")
    if args.find == "":
        parser.error("--find needs a text")
    return args


def _run(args: argparse.Namespace) -> bool:
    """Returns whether something is wrong with the data."""
    prefixes = [prefix for path in args.paths for prefix in _prefixes(path)]
    if args.document is not None:
        _print_document(prefixes, args)
    elif args.find is not None:
        _print_found(prefixes, args)
    elif args.checksum:
        for path, digest in checksums(_files(prefixes)):
            print(f"{digest}  {path}")
    elif args.verify:
        return _verify(prefixes, args.verify)
    else:
        return _print_reports(prefixes, args)
    return False


def _prefixes(path: Path) -> list[Path]:
    if not path.is_dir():
        if not idx_path(path).exists() and not bin_path(path).exists():
            raise UserError(
                f"{path}: neither a directory nor a dataset's path without .bin and .idx"
            )
        return [path]
    if (path / domains.FILE_NAME).is_file():
        try:
            listed = domains.DomainsFile.load(path / domains.FILE_NAME).domains.values()
        except ValueError as error:
            raise UserError(str(error)) from error
        return [path / record.prefix for record in listed]
    prefixes = [index.with_suffix("") for index in sorted(path.glob("*.idx"))]
    if not prefixes:
        raise UserError(f"{path}: has no datasets; give a directory of .bin and .idx files")
    return prefixes


def _record(prefix: Path) -> domains.TokenizerRecord | None:
    try:
        return domains.tokenizer_record(str(prefix))
    except ValueError as error:
        raise UserError(str(error)) from error


def _print_reports(prefixes: Sequence[Path], args: argparse.Namespace) -> bool:
    if args.picture:
        check_picture(args.picture)
    reports = [_inspect(prefix, args) for prefix in prefixes]
    if args.json:
        print(json.dumps({"datasets": [report.summary() for report in reports]}, indent=2))
    else:
        print("\n\n".join(_text(report) for report in reports))
    drawn = {str(r.prefix): r.lengths for r in reports if r.lengths.documents}
    if args.picture and drawn:
        draw(drawn, args.picture)
    return any(report.problems for report in reports)


def _inspect(prefix: Path, args: argparse.Namespace) -> Report:
    record = _record(prefix)
    vocab_size = eod = None
    if args.check:
        here = record is not None and (record.type == BYTE_LEVEL or Path(record.model).exists())
        if args.tokenizer_model or args.tokenizer_type == BYTE_LEVEL or here:
            tokenizer = tokenizer_of(args, record)
            vocab_size = tokenizer.vocab_size
            eod = tokenizer.eod if tokenizer.eod is not None and tokenizer.eod >= 0 else None
    return inspect(prefix, args.check, vocab_size, eod)


def _text(report: Report) -> str:
    lines = [f"{report.prefix}: domain '{report.domain}'"]
    if report.facts:
        facts = dict(report.facts)
        record, tokenizer = facts.pop("record"), facts.pop("tokenizer")
        for name, value in facts.items():
            lines.append(
                f"  {name:<13}{value:,}" if isinstance(value, int) else f"  {name:<13}{value}"
            )
        listed = "nothing" if record is None else ", ".join(f"{k} {v}" for k, v in record.items())
        lines.append(f"  {domains.FILE_NAME} {listed}")
        if tokenizer:
            model = f"{tokenizer['type']} {tokenizer['model']}"
            lines.append(f"  tokenizer    {model}, vocabulary {tokenizer['vocab_size']:,}")
            lines.append(f"  its sha256   {tokenizer['sha256']}")
        if report.tokens_read:
            lines.append(f"  largest id   {report.max_token_id:,}")
            without = "not known: give --tokenizer-model"
            if report.without_eod is not None:
                without = f"{report.without_eod:,} (token {report.eod})"
            lines.append(f"  without EOD  {without}")
        counted = report.lengths.summary()
        lines.append(
            f"  a document   {counted['shortest']:,} to {counted['longest']:,} tokens, "
            f"{counted['mean']:,.1f} on average"
        )
        lines.append(f"{'tokens':>27} {'documents':>15}")
        lines += report.lengths.text()
    lines += [f"  PROBLEM: {problem}" for problem in report.problems]
    return "\n".join(lines)


def _print_document(prefixes: Sequence[Path], args: argparse.Namespace) -> None:
    if len(prefixes) > 1:
        raise UserError(
            f"--document: there are {len(prefixes)} datasets; give one of "
            f"{', '.join(map(str, prefixes[:8]))}"
        )
    prefix = prefixes[0]
    with DatasetReader(prefix) as reader:
        if not 0 <= args.document < reader.documents:
            raise UserError(
                f"--document {args.document}: {prefix} has documents 0 to {reader.documents - 1}"
            )
        ids = reader.document(args.document)
    text = None
    if not args.ids:
        tokenizer = tokenizer_of(args, _record(prefix))
        text = decode(tokenizer, ids)
    if args.json:
        content = {"prefix": str(prefix), "document": args.document, "ids": ids.tolist()}
        print(json.dumps(content if text is None else {**content, "text": text}))
    else:
        print(" ".join(map(str, ids.tolist())) if text is None else text)


def _print_found(prefixes: Sequence[Path], args: argparse.Namespace) -> None:
    for prefix in prefixes:
        tokenizer = tokenizer_of(args, _record(prefix))
        with DatasetReader(prefix) as reader:
            for number, count, context in find(reader, args.find, tokenizer):
                if args.json:
                    found = {"document": number, "count": count, "context": context}
                    print(json.dumps({"prefix": str(prefix), **found}))
                else:
                    print(f"{prefix} --document {number}: {count} times: {context!r}")


def _files(prefixes: Sequence[Path]) -> list[Path]:
    paths = [path(prefix) for prefix in prefixes for path in (bin_path, idx_path)]
    for path in paths:
        if not path.is_file():
            raise UserError(f"{path}: no such file")
        if "\n" in str(path) or "\\" in str(path):
            raise UserError(f"{str(path)!r}: sha256sum would quote this path; rename it")
    return paths


def _verify(prefixes: Sequence[Path], listing: Path) -> bool:
    listed = read_checksums(listing)
    wanted = {path: expected(path, listed) for path in _files(prefixes)}
    failed = 0
    for path, digest in checksums(wanted):
        failed += digest != wanted[path]
        print(f"{path}: {'OK' if digest == wanted[path] else 'FAILED'}")
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
