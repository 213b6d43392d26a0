"""Joins Megatron datasets by copying their bytes and writing their indices anew.

Either single datasets into one, as Megatron's own tool does, or directories of preprocess_data,
such as those of a job array, domain by domain. Documents keep the order of the inputs, so that
shards joined in their order are what one run would have written. The memory does not grow with the
number of documents.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from megatron_rw.data.command import exit_status
from megatron_rw.data.indexed import domains
from megatron_rw.data.indexed.blend import blend_weights
from megatron_rw.data.indexed.documents import DatasetReader, write_selected
from megatron_rw.data.indexed.output import check_output_dir, check_space, publish, table
from megatron_rw.data.indexed.pair import PairWriter, bin_path, idx_path
from megatron_rw.data.progress import Progress
from megatron_rw.data.text.dedup import Bitmap, DuplicateFinder, hash_documents
from megatron_rw.errors import UserError

_EXAMPLE = """\
examples:
  python tools/merge_datasets.py --input a/wiki_text_document b/wiki_text_document \\
      --output-prefix data/wiki_text_document
  python tools/merge_datasets.py --input-dir shards/*/ --output-dir data/train --dedup exact
  then train with --data-args-path data/train/blend.txt
"""


@dataclass(frozen=True)
class Part:
    """A dataset that becomes a piece of a merged one.

    Attributes:
        prefix: Path without `.bin` and `.idx`.
        first: Number of its first document among those of all inputs.
        documents: How many it has.
        size: Bytes of its tokens.
        record: What `domains.json` says of it, if there is one.
    """

    prefix: Path
    first: int
    documents: int
    size: int
    record: domains.DomainRecord | None


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    args = _parse(argv)
    return exit_status(lambda: _run(args))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="merge_datasets.py",
        description="Join Megatron .bin/.idx datasets, in the order given.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    inputs = parser.add_mutually_exclusive_group(required=True)
    inputs.add_argument(
        "--input",
        nargs="+",
        type=Path,
        metavar="PREFIX",
        help="datasets to join into one: paths without .bin and .idx",
    )
    inputs.add_argument(
        "--input-dir",
        nargs="+",
        type=Path,
        metavar="DIR",
        help="directories of preprocess_data to join domain by domain; mind that a shell sorts "
        "shard-10 before shard-2",
    )
    parser.add_argument("--output-prefix", type=Path, metavar="PREFIX", help="with --input")
    parser.add_argument(
        "--output-dir", type=Path, metavar="DIR", help="with --input-dir; made if it is not there"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the datasets that are there already"
    )
    parser.add_argument(
        "--dedup",
        choices=["exact"],
        help="leave out documents whose tokens are exactly those of an earlier one, of any input "
        "and domain; needs 24 bytes of disk per document while it runs",
    )
    args = parser.parse_args(argv)
    if (args.input is None) == (args.output_dir is None) or (args.input_dir is None) == (
        args.output_prefix is None
    ):
        parser.error("give --input with --output-prefix, or --input-dir with --output-dir")
    return args


def _run(args: argparse.Namespace) -> None:
    if args.input is not None:
        _merge_prefixes(args.input, args.output_prefix, args.overwrite, args.dedup == "exact")
    else:
        _merge_directories(args.input_dir, args.output_dir, args.overwrite, args.dedup == "exact")


def _merge_prefixes(
    prefixes: Sequence[Path], output_prefix: Path, overwrite: bool, dedup: bool
) -> None:
    name = output_prefix.name
    targets = (bin_path(output_prefix), idx_path(output_prefix))
    there = [path for path in targets if path.exists()]
    if there and not overwrite:
        raise UserError(
            f"--output-prefix {output_prefix}: {there[0]} is there already; give another, or "
            "--overwrite to replace it"
        )
    if output_prefix.resolve() in [prefix.resolve() for prefix in prefixes]:
        raise UserError(f"--output-prefix {output_prefix}: is one of --input; give another")
    _check_tokenizers({prefix: _tokenizer(prefix) for prefix in prefixes})
    parts = _parts((prefix, None) for prefix in prefixes)
    output_prefix.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        dir=output_prefix.parent, prefix=".merge_datasets-"
    ) as directory:
        scratch = Path(directory)
        merged = _merge({name: parts}, {name: name}, scratch, dedup)
        targets[1].unlink(missing_ok=True)  # an old index never tells of the new tokens
        for path in targets:
            (scratch / path.name).replace(path)
    print(table(merged))


def _merge_directories(
    directories: Sequence[Path], output_dir: Path, overwrite: bool, dedup: bool
) -> None:
    absolute = check_output_dir(output_dir, overwrite)
    if absolute.resolve() in [directory.resolve() for directory in directories]:
        raise UserError(f"--output-dir {output_dir}: is one of --input-dir; give another")
    contents = {directory: _load(directory) for directory in directories}
    _check_tokenizers({path: content.tokenizer for path, content in contents.items()})
    listed = [
        (name, directory / record.prefix, record)
        for directory in directories
        for name, record in contents[directory].domains.items()
    ]
    parts = _parts((prefix, record) for _, prefix, record in listed)
    by_domain: dict[str, list[Part]] = {}
    prefixes: dict[str, str] = {}
    for (name, _, record), part in zip(listed, parts, strict=True):
        by_domain.setdefault(name, []).append(part)
        if name not in prefixes and record.prefix in prefixes.values():
            raise UserError(
                f"{part.prefix}: is of the domain '{name}', and of another one in an earlier "
                "directory; name the file and its prefix in domains.json by the domain"
            )
        prefixes.setdefault(name, record.prefix)
    absolute.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=absolute, prefix=".merge_datasets-") as directory:
        merged = _merge(by_domain, prefixes, Path(directory), dedup)
        tokenizer = contents[directories[0]].tokenizer
        publish(Path(directory), absolute, merged, blend_weights(merged), tokenizer)
    print(table(merged))


def _load(directory: Path) -> domains.DomainsFile:
    path = directory / domains.FILE_NAME
    if not path.is_file():
        raise UserError(
            f"--input-dir {directory}: has no {domains.FILE_NAME}; give directories of "
            "preprocess_data that are complete, or single datasets with --input"
        )
    try:
        return domains.DomainsFile.load(path)
    except ValueError as error:
        raise UserError(str(error)) from error


def _tokenizer(prefix: Path) -> domains.TokenizerRecord | None:
    try:
        return domains.tokenizer_record(str(prefix))
    except ValueError as error:
        raise UserError(str(error)) from error


def _check_tokenizers(tokenizers: Mapping[Path, domains.TokenizerRecord | None]) -> None:
    """See that one tokenizer made all inputs, as far as that is known of them."""
    known = [(path, record) for path, record in tokenizers.items() if record is not None]
    for path, record in known[1:]:
        first, expected = known[0]
        for field in fields(record):
            # The model's path may differ: shards are made on other machines.
            mine, other = getattr(record, field.name), getattr(expected, field.name)
            if field.name != "model" and mine != other:
                raise UserError(
                    f"{path}: its tokenizer is {record.model} ({field.name} {mine}), and that of "
                    f"{first} is {expected.model} ({field.name} {other}); make both with one"
                )


def _parts(listed: Iterable[tuple[Path, domains.DomainRecord | None]]) -> list[Part]:
    """Sees that every input is whole, and that all have one type of token id."""
    parts: list[Part] = []
    first = 0
    for prefix, record in listed:
        with DatasetReader(prefix) as reader:
            if not parts:
                dtype = reader.dtype
            elif reader.dtype != dtype:
                raise UserError(
                    f"{prefix}: its token ids are {reader.dtype}, and those of {parts[0].prefix} "
                    f"{dtype}; make both with one tokenizer"
                )
            counts = (reader.documents, reader.tokens)
            if record is not None and counts != (record.documents, record.tokens):
                raise UserError(
                    f"{prefix}: has {counts[0]:,} documents of {counts[1]:,} tokens, and "
                    f"{domains.FILE_NAME} beside it tells of {record.documents:,} and "
                    f"{record.tokens:,}; make the directory again"
                )
            size = reader.tokens * reader.dtype.itemsize
            parts.append(Part(prefix, first, reader.documents, size, record))
            first += reader.documents
    return parts


def _merge(
    parts: Mapping[str, Sequence[Part]],
    prefixes: Mapping[str, str],
    scratch: Path,
    dedup: bool,
) -> dict[str, domains.DomainRecord]:
    """Writes the merged datasets into `scratch`; returns what is in them."""
    ordered = sorted((part for some in parts.values() for part in some), key=lambda p: p.first)
    size = sum(part.size for part in ordered)
    if not dedup:  # how much a dataset without its copies takes is not known before
        check_space(scratch, size + sum(os.path.getsize(idx_path(p.prefix)) for p in ordered))
    duplicates = _duplicates(ordered, scratch, size) if dedup else None
    progress = Progress("merge_datasets: writing", size)
    merged = {}
    for name, some in parts.items():
        record = _write(some, scratch, prefixes[name], duplicates, progress)
        if record.documents:
            merged[name] = record
        else:
            print(f"merge_datasets: '{name}' has copies only and is left out", file=sys.stderr)
            bin_path(scratch / prefixes[name]).unlink()
            idx_path(scratch / prefixes[name]).unlink()
    if duplicates is not None:
        print(f"left out as copies: {duplicates.count():,} of {len(duplicates):,} documents")
    return merged


def _duplicates(parts: Sequence[Part], scratch: Path, size: int) -> Bitmap:
    progress = Progress("merge_datasets: looking for copies", size)
    with DuplicateFinder(scratch) as finder:
        for part in parts:
            with DatasetReader(part.prefix) as reader:
                for block in reader.blocks():
                    finder.add(hash_documents(reader.read(block), block.tokens))
                    progress.advance(block.size)
        return finder.duplicates()


def _write(
    parts: Sequence[Part],
    scratch: Path,
    prefix: str,
    duplicates: Bitmap | None,
    progress: Progress,
) -> domains.DomainRecord:
    """Writes one merged dataset. Without duplicates, the largest id is that of the records."""
    largest = max((part.record.max_token_id for part in parts if part.record), default=0)
    found = -1
    with DatasetReader(parts[0].prefix) as reader:
        dtype = reader.dtype
    with PairWriter(scratch / prefix, dtype) as writer:
        for part in parts:
            with DatasetReader(part.prefix) as reader:
                for block in reader.blocks():
                    if duplicates is None:
                        reader.copy(block, writer)
                    else:
                        first = part.first + block.first
                        keep = ~duplicates.slice(first, first + len(block.tokens))
                        ids = reader.read(block)
                        found = max(found, write_selected(ids, block, keep, writer))
                    progress.advance(block.size)
        writer.finalize()
    return domains.DomainRecord(
        prefix=prefix,
        documents=writer.documents,
        tokens=writer.tokens,
        max_token_id=largest if duplicates is None else max(0, found),
    )


if __name__ == "__main__":
    sys.exit(main())
