"""Splits Megatron datasets into training, validation and test sets that share no document.

A seeded hash of a document's tokens decides which set it goes to. So all copies of a document go to
the same set, whatever their domain, and neither the order of the documents nor their shards matter.
Everything is read once, and memory does not grow with the number of documents.
"""

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from tyro.conf import arg

from megatron_rw.command_line import parse, require
from megatron_rw.data.indexed.documents import DatasetReader, write_selected
from megatron_rw.data.indexed.domains import DomainRecord, InputDataset, listed_datasets, look_up
from megatron_rw.data.indexed.output import (
    check_output_dir,
    check_space,
    publish,
    table,
)
from megatron_rw.data.indexed.pair import PairWriter, is_dataset
from megatron_rw.data.progress import Progress, say
from megatron_rw.data.text.dedup import hash_documents
from megatron_rw.errors import UserError, reported

_DESCRIPTION = """\
Split Megatron .bin/.idx datasets into train, valid and test, of which no two share a document.

example:
  python tools/split_dataset.py --input data/all --output-dir data --valid-fraction 0.005 \\
      --test-fraction 0.001
  then train with --train-data-path $(cat data/train/blend.txt) \\
      --valid-data-path $(cat data/valid/blend.txt) --test-data-path $(cat data/test/blend.txt)
"""
SETS = ("train", "valid", "test")


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

    valid_fraction: Annotated[float, arg(metavar="F")] = 0.0
    """Hold out about this fraction of the documents of every domain for validation."""

    test_fraction: Annotated[float, arg(metavar="F")] = 0.0
    """Hold out about this fraction of the documents of every domain for test."""

    seed: Annotated[int, arg(metavar="N")] = 1234
    """Another seed makes another choice."""

    def __post_init__(self) -> None:
        for name in SETS[1:]:
            fraction = getattr(self, f"{name}_fraction")
            require(0 <= fraction < 1, f"--{name}-fraction", fraction, "a number between 0 and 1")
        if len(self.sets) == 1:
            raise UserError("hold something out: --valid-fraction or --test-fraction")
        if self.valid_fraction + self.test_fraction >= 1:
            raise UserError("--valid-fraction and --test-fraction leave nothing to train on")
        require(0 <= self.seed < 1 << 64, "--seed", self.seed, "a number from 0 to 2^64 - 1")

    @property
    def sets(self) -> list[str]:
        """The names of the sets to write."""
        return [SETS[0], *(name for name in SETS[1:] if getattr(self, f"{name}_fraction"))]

    def choose(self, hashes: NDArray[np.uint64]) -> NDArray[np.intp]:
        """Returns the position in `SETS` of the set of each document, [documents], by its hash."""
        valid = hashes < np.uint64(int(self.valid_fraction * 2**64))
        # From the other end of the range, so that the two have nothing in common.
        test = ~hashes < np.uint64(int(self.test_fraction * 2**64))
        return np.where(valid, 1, np.where(test, 2, 0))


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
        records = _write(inputs, config, scratch, size)
        for name, path in outputs.items():
            path.mkdir(exist_ok=True)
            publish(scratch / name, path, records[name], inputs[0].tokenizer)
    for name in config.sets:
        print(f"{name}:\n{table(records[name])}")


def _checked_size(dataset: InputDataset) -> int:
    """Checks that a dataset is whole, and returns the bytes of its tokens."""
    with DatasetReader(dataset.prefix) as reader:
        return reader.tokens * reader.dtype.itemsize


def _write(
    inputs: Sequence[InputDataset], config: SplitConfig, scratch: Path, size: int
) -> dict[str, dict[str, DomainRecord]]:
    """Writes every set's datasets into `scratch`; returns set to domain to what is in it.

    A domain of which a set has no document is left out of the set. Raises a `UserError` if a set
    has none at all.
    """
    records: dict[str, dict[str, DomainRecord]] = {name: {} for name in config.sets}
    for name in records:
        (scratch / name).mkdir()
    progress = Progress("split_dataset", size)
    key = config.seed.to_bytes(8, "little")
    for dataset in inputs:
        with ExitStack() as stack:
            reader = stack.enter_context(DatasetReader(dataset.prefix))
            writers = {
                name: stack.enter_context(
                    PairWriter(scratch / name / dataset.prefix.name, reader.dtype)
                )
                for name in records
            }
            for block in reader.blocks():
                ids = reader.read(block)
                hashes = hash_documents(ids, block.tokens, key).view(np.uint64)[:, 0]
                sets = config.choose(hashes)
                for name, writer in writers.items():
                    write_selected(ids, block, sets == SETS.index(name), writer)
                progress.advance(block.size)
            for name, writer in writers.items():
                if writer.documents:
                    records[name][dataset.domain] = writer.finalize()
                else:  # the files are removed
                    what = f"{name} has none of the {reader.documents:,} of '{dataset.domain}'"
                    say("split_dataset", f"{what}, which is left out of it")
    for name, of_set in records.items():
        if not of_set:
            raise UserError(
                f"no document would be in {name}; hold out {'less' if name == 'train' else 'more'}"
            )
    return records
