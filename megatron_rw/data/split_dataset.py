"""Splits Megatron datasets into training, validation and test sets that share no document.

A seeded hash of a document's tokens decides which set it goes to. So all copies of a document go to
the same set, whatever their domain, and neither the order of the documents nor their shards matter.
Memory does not grow with the number of documents.
"""

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from tyro.conf import arg

from megatron_rw.command_line import parse
from megatron_rw.data.indexed.documents import DatasetReader, write_selected
from megatron_rw.data.indexed.domains import DomainRecord, InputDataset, listed_datasets, look_up
from megatron_rw.data.indexed.held_out import SETS, HeldOut, Share, choose
from megatron_rw.data.indexed.output import (
    check_output_dir,
    check_space,
    publish,
    table,
)
from megatron_rw.data.indexed.pair import PairWriter, is_dataset
from megatron_rw.data.progress import Progress
from megatron_rw.data.text.dedup import hash_documents
from megatron_rw.errors import UserError, reported

_DESCRIPTION = """\
Split Megatron .bin/.idx datasets into train, valid and test, of which no two share a document.

example:
  python tools/split_dataset.py --input data/all --output-dir data --valid-fraction 0.005 \\
      --test-documents 1000
  then train with --train-data-path $(cat data/train/blend.txt) \\
      --valid-data-path $(cat data/valid/blend.txt) --test-data-path $(cat data/test/blend.txt)
"""
_VALID = tyro.conf.create_mutex_group(required=False)
_TEST = tyro.conf.create_mutex_group(required=False)


@dataclass(frozen=True, kw_only=True)
class SplitConfig:
    """The flags of split_dataset."""

    input: Annotated[Path, arg(metavar="PATH")]
    """A directory of preprocess_data, or a dataset's path without .bin and .idx."""

    output_dir: Annotated[Path, arg(metavar="DIR")]
    """The directory for the directories train, valid and test, each with datasets, domains.json and
    blend.txt."""

    overwrite: bool = False
    """Replace the datasets that are there already."""

    valid_fraction: Annotated[float | None, _VALID, arg(metavar="F")] = None
    """Hold out about this fraction of the documents for validation."""

    valid_documents: Annotated[int | None, _VALID, arg(metavar="N")] = None
    """Hold out N documents of each domain, and the copies of them, for validation."""

    test_fraction: Annotated[float | None, _TEST, arg(metavar="F")] = None
    """Hold out about this fraction of the documents for test."""

    test_documents: Annotated[int | None, _TEST, arg(metavar="N")] = None
    """Hold out N documents of each domain, and the copies of them, for test."""

    seed: Annotated[int, arg(metavar="N")] = 1234
    """Another seed makes another choice."""

    def __post_init__(self) -> None:
        for name in SETS[1:]:
            fraction, documents = (
                getattr(self, f"{name}_{of}") for of in ("fraction", "documents")
            )
            if fraction is not None and not 0 < fraction < 1:
                raise UserError(f"--{name}-fraction {fraction}: give a number between 0 and 1")
            if documents is not None and documents < 1:
                raise UserError(f"--{name}-documents {documents}: give a number of at least 1")
        if self.valid == self.test == Share():
            raise UserError("hold something out: --valid-fraction, --valid-documents, --test-...")
        if self.valid.fraction + self.test.fraction >= 1:
            raise UserError("--valid-fraction and --test-fraction leave nothing to train on")
        if not 0 <= self.seed < 1 << 64:
            raise UserError(f"--seed {self.seed}: give a number from 0 to 2^64 - 1")

    @property
    def valid(self) -> Share:
        """How much to hold out for validation."""
        return Share(self.valid_fraction or 0.0, self.valid_documents or 0)

    @property
    def test(self) -> Share:
        """How much to hold out for test."""
        return Share(self.test_fraction or 0.0, self.test_documents or 0)

    @property
    def sets(self) -> list[str]:
        """The names of the sets to write."""
        shares = zip(SETS[1:], (self.valid, self.test), strict=True)
        return [SETS[0], *(name for name, share in shares if share != Share())]


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    with reported("splitting datasets"):
        _run(parse(SplitConfig, argv, _DESCRIPTION))


def _run(config: SplitConfig) -> None:
    source = config.input
    inputs = look_up([source]) if is_dataset(source) else listed_datasets(source, "--input")
    outputs = {
        name: check_output_dir(config.output_dir / name, config.overwrite) for name in config.sets
    }
    if source.resolve() in [path.resolve() for path in outputs.values()]:
        raise UserError(f"--output-dir {config.output_dir}: --input would be replaced")
    size = sum(_checked_size(dataset) for dataset in inputs)
    root = config.output_dir.absolute()
    root.mkdir(parents=True, exist_ok=True)
    check_space(root, size)
    with tempfile.TemporaryDirectory(dir=root, prefix=".split_dataset-") as directory:
        scratch = Path(directory)
        hashes = _hash(inputs, scratch, config.seed, size)
        held_out = choose(hashes, config.valid, config.test)
        records = _write(inputs, hashes, held_out, scratch, config.sets, size)
        for name, path in outputs.items():
            path.mkdir(exist_ok=True)
            publish(scratch / name, path, records[name], inputs[0].tokenizer)
    for name in config.sets:
        print(f"{name}:\n{table(records[name])}")


def _checked_size(dataset: InputDataset) -> int:
    """Checks that a dataset is whole, and returns the bytes of its tokens."""
    with DatasetReader(dataset.prefix) as reader:
        return reader.tokens * reader.dtype.itemsize


def _hash(inputs: Sequence[InputDataset], scratch: Path, seed: int, size: int) -> dict[str, Path]:
    """Writes the hash of every document to files, so that tokens are hashed only once."""
    progress = Progress("split_dataset: hashing", size)
    key = seed.to_bytes(8, "little")
    paths: dict[str, Path] = {}
    for dataset in inputs:
        path = paths[dataset.domain] = scratch / f"hashes-{len(paths)}"
        with DatasetReader(dataset.prefix) as reader, path.open("wb") as file:
            for block in reader.blocks():
                digests = hash_documents(reader.read(block), block.tokens, key)
                file.write(digests.view(np.uint64)[:, 0].tobytes())
                progress.advance(block.size)
    return paths


def _write(
    inputs: Sequence[InputDataset],
    hashes: Mapping[str, Path],
    held_out: HeldOut,
    scratch: Path,
    names: Sequence[str],
    size: int,
) -> dict[str, dict[str, DomainRecord]]:
    """Writes every set's datasets into `scratch`; returns set to domain to what is in it."""
    records: dict[str, dict[str, DomainRecord]] = {name: {} for name in names}
    for name in names:
        (scratch / name).mkdir()
    progress = Progress("split_dataset: writing", size)
    for dataset in inputs:
        file_name = dataset.prefix.name
        with ExitStack() as stack:
            reader = stack.enter_context(DatasetReader(dataset.prefix))
            file = stack.enter_context(hashes[dataset.domain].open("rb"))
            writers = {
                name: stack.enter_context(PairWriter(scratch / name / file_name, reader.dtype))
                for name in names
            }
            for block in reader.blocks():
                sets = held_out.sets(np.fromfile(file, np.uint64, len(block.tokens)))
                ids = reader.read(block)
                for name, writer in writers.items():
                    write_selected(ids, block, sets == SETS.index(name), writer)
                progress.advance(block.size)
            for name, writer in writers.items():
                records[name][dataset.domain] = writer.finalize()
    return records
