"""Sets held out of Megatron datasets, of which no two share a document.

Which set a document goes to is read off a seeded hash of its tokens. So all copies of a document
go to the same set, of whatever domain they are, and neither the order of the documents nor how
they were sharded matters. Memory does not grow with the number of documents.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from megatron_rw.data.command import exit_status
from megatron_rw.data.indexed import domains
from megatron_rw.data.indexed.blend import blend_weights
from megatron_rw.data.indexed.documents import DatasetReader, write_selected
from megatron_rw.data.indexed.held_out import SETS, HeldOut, Share, choose
from megatron_rw.data.indexed.output import check_output_dir, check_space, publish, table
from megatron_rw.data.indexed.pair import PairWriter
from megatron_rw.data.progress import Progress
from megatron_rw.data.text.dedup import hash_documents
from megatron_rw.errors import UserError

_EXAMPLE = """\
example:
  python tools/split_dataset.py --input data/all --output-dir data --valid-fraction 0.005 \\
      --test-documents 1000
  then train with --train-data-path $(cat data/train/blend.txt) \\
      --valid-data-path $(cat data/valid/blend.txt) --test-data-path $(cat data/test/blend.txt)
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    args = _parse(argv)
    return exit_status(lambda: _run(args))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="split_dataset.py",
        description="Split Megatron .bin/.idx datasets into train, valid and test, of which no two "
        "share a document.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--input",
        type=Path,
        required=True,
        metavar="PATH",
        help="a directory of preprocess_data, or a dataset's path without .bin and .idx",
    )
    parser.add_argument(
        "--output-dir",
        type=Path,
        required=True,
        metavar="DIR",
        help="gets the directories train, valid and test, each with datasets, domains.json and "
        "blend.txt",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the datasets that are there already"
    )
    for name in SETS[1:]:
        group = parser.add_mutually_exclusive_group()
        group.add_argument(
            f"--{name}-fraction", type=float, metavar="F", help="about this part of the documents"
        )
        group.add_argument(
            f"--{name}-documents",
            type=int,
            metavar="N",
            help="N documents of each domain, and the copies of them",
        )
    parser.add_argument(
        "--seed", type=int, default=1234, metavar="N", help="another one, another choice (1234)"
    )
    args = parser.parse_args(argv)
    args.shares = [_share(parser, args, name) for name in SETS[1:]]
    if not any(args.shares):
        parser.error("hold something out: --valid-fraction, --valid-documents, --test-...")
    if sum(share.fraction for share in args.shares if share) >= 1:
        parser.error("--valid-fraction and --test-fraction leave nothing to train on")
    if not 0 <= args.seed < 1 << 64:
        parser.error("--seed must be from 0 to 2^64 - 1")
    return args


def _share(parser: argparse.ArgumentParser, args: argparse.Namespace, name: str) -> Share | None:
    fraction = getattr(args, f"{name}_fraction")
    documents = getattr(args, f"{name}_documents")
    if fraction is not None and not 0 < fraction < 1:
        parser.error(f"--{name}-fraction must be between 0 and 1")
    if documents is not None and documents < 1:
        parser.error(f"--{name}-documents must be at least 1")
    if fraction is None and documents is None:
        return None
    return Share(fraction or 0.0, documents or 0)


def _run(args: argparse.Namespace) -> None:
    inputs, tokenizer = _inputs(args.input)
    names = [name for name, share in zip(SETS, [True, *args.shares], strict=True) if share]
    outputs = {name: check_output_dir(args.output_dir / name, args.overwrite) for name in names}
    if args.input.resolve() in [path.resolve() for path in outputs.values()]:
        raise UserError(f"--output-dir {args.output_dir}: --input would be replaced")
    size = sum(map(_size, inputs.values()))
    root = args.output_dir.absolute()
    root.mkdir(parents=True, exist_ok=True)
    check_space(root, size)
    with tempfile.TemporaryDirectory(dir=root, prefix=".split_dataset-") as directory:
        scratch = Path(directory)
        hashes = _hash(inputs, scratch, args.seed, size)
        held_out = choose(hashes, *args.shares)
        records = _write(inputs, hashes, held_out, scratch, names)
        for name, path in outputs.items():
            path.mkdir(exist_ok=True)
            publish(scratch / name, path, records[name], blend_weights(records[name]), tokenizer)
    for name in names:
        print(f"{name}:\n{table(records[name])}")


def _inputs(path: Path) -> tuple[dict[str, Path], domains.TokenizerRecord | None]:
    """Returns domain to dataset, and the tokenizer if a `domains.json` tells it."""
    try:
        if not path.is_dir():
            name = domains.domain_names([str(path)])[0]
            return {name: path}, domains.tokenizer_record(str(path))
        if not (path / domains.FILE_NAME).is_file():
            raise UserError(
                f"--input {path}: has no {domains.FILE_NAME}; give a directory of preprocess_data, "
                "or a dataset's path without .bin and .idx"
            )
        content = domains.DomainsFile.load(path / domains.FILE_NAME)
    except ValueError as error:
        raise UserError(str(error)) from error
    inputs = {name: path / record.prefix for name, record in content.domains.items()}
    return inputs, content.tokenizer


def _size(prefix: Path) -> int:
    """Returns the bytes of a dataset's tokens, which are seen to be whole."""
    with DatasetReader(prefix) as reader:
        return reader.tokens * reader.dtype.itemsize


def _hash(inputs: Mapping[str, Path], scratch: Path, seed: int, size: int) -> dict[str, Path]:
    """Writes the hash of every document down, so that the tokens are hashed only once."""
    progress = Progress("split_dataset: hashing", size)
    key = seed.to_bytes(8, "little")
    paths = {name: scratch / f"hashes-{number}" for number, name in enumerate(inputs)}
    for name, prefix in inputs.items():
        with DatasetReader(prefix) as reader, paths[name].open("wb") as file:
            for block in reader.blocks():
                digests = hash_documents(reader.read(block), block.tokens, key)
                file.write(digests.view(np.uint64)[:, 0].tobytes())
                progress.advance(block.size)
    return paths


def _write(
    inputs: Mapping[str, Path],
    hashes: Mapping[str, Path],
    held_out: HeldOut,
    scratch: Path,
    names: Sequence[str],
) -> dict[str, dict[str, domains.DomainRecord]]:
    """Writes every set's datasets into `scratch`; returns set to domain to what is in it."""
    records: dict[str, dict[str, domains.DomainRecord]] = {name: {} for name in names}
    for name in names:
        (scratch / name).mkdir()
    progress = Progress("split_dataset: writing", sum(map(_size, inputs.values())))
    for domain, prefix in inputs.items():
        largest = dict.fromkeys(names, 0)
        with ExitStack() as stack:
            reader = stack.enter_context(DatasetReader(prefix))
            file = stack.enter_context(hashes[domain].open("rb"))
            writers = {
                name: stack.enter_context(PairWriter(scratch / name / prefix.name, reader.dtype))
                for name in names
            }
            for block in reader.blocks():
                sets = held_out.sets(np.fromfile(file, np.uint64, len(block.tokens)))
                ids = reader.read(block)
                for name, writer in writers.items():
                    found = write_selected(ids, block, sets == SETS.index(name), writer)
                    largest[name] = max(largest[name], found)
                progress.advance(block.size)
            for name, writer in writers.items():
                writer.finalize()
                records[name][domain] = domains.DomainRecord(
                    prefix.name, writer.documents, writer.tokens, largest[name]
                )
    return records


if __name__ == "__main__":
    sys.exit(main())
