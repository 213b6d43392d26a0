"""Joins directories of Megatron datasets, domain by domain, in bounded memory.

Tokens are copied, and indices written anew. Documents keep the order of the inputs, so that shards
joined in their order are what one run would have written.
"""

import os
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from tyro.conf import arg

from megatron_rw.command_line import parse
from megatron_rw.data.indexed.documents import DatasetReader, write_selected
from megatron_rw.data.indexed.domains import (
    FILE_NAME,
    DomainRecord,
    InputDataset,
    check_one_tokenizer,
    listed_datasets,
)
from megatron_rw.data.indexed.output import (
    check_output_dir,
    check_space,
    publish,
    table,
)
from megatron_rw.data.indexed.pair import Index, PairWriter, idx_path
from megatron_rw.data.progress import Progress, say
from megatron_rw.data.text.dedup import DuplicateFinder, hash_documents
from megatron_rw.errors import UserError, reported

_DESCRIPTION = """\
Join directories of Megatron .bin/.idx datasets domain by domain, in the order given.

example:
  python tools/merge_datasets.py --input-dir shards/*/ --output-dir data/train --dedup exact
  then train with --data-args-path data/train/blend.txt --split 98,1,1
"""


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """The flags of merge_datasets."""

    input_dir: Annotated[tuple[Path, ...], arg(metavar="DIR [DIR ...]")]
    """Directories of preprocess_data. Note that a shell sorts shard-10 before shard-2."""

    output_dir: Annotated[Path, arg(metavar="DIR")]
    """The directory for the joined datasets; it is made if it is not there."""

    overwrite: bool = False
    """Replace the datasets that are there already."""

    dedup: Literal["none", "exact"] = "none"
    """With "exact", leave out documents whose tokens are exactly those of an earlier one, of any
    input and domain. That needs 24 bytes of disk per document while it runs."""


@dataclass(frozen=True)
class MergeInput:
    """A dataset that becomes a part of a joined one."""

    dataset: InputDataset
    first: int  # Number of its first document among those of all inputs.
    size: int  # Bytes of its tokens.


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    with reported("joining datasets"):
        print(table(_run(parse(MergeConfig, argv, _DESCRIPTION))))


def _run(config: MergeConfig) -> dict[str, DomainRecord]:
    """Returns domain to what is in its joined dataset."""
    output = check_output_dir(config.output_dir, config.overwrite)
    if output.resolve() in [directory.resolve() for directory in config.input_dir]:
        raise UserError(f"--output-dir {config.output_dir}: is one of --input-dir; give another")
    datasets = [d for path in config.input_dir for d in listed_datasets(path, "--input-dir")]
    check_one_tokenizer(datasets)
    domains: dict[str, str] = {}
    for dataset in datasets:
        if domains.setdefault(dataset.prefix.name, dataset.domain) != dataset.domain:
            raise UserError(
                f"{dataset.prefix}: is of the domain '{dataset.domain}', and of another one in an "
                f"earlier directory; name the file and its prefix in {FILE_NAME} by the domain"
            )
    inputs = _checked(datasets)
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output, prefix=".merge_datasets-") as scratch:
        merged = _merge(inputs, Path(scratch), config.dedup == "exact")
        publish(Path(scratch), output, merged, datasets[0].tokenizer)
    return merged


def _checked(datasets: Iterable[InputDataset]) -> list[MergeInput]:
    """Checks that every input is whole, and that all have one type of token id."""
    inputs: list[MergeInput] = []
    first = 0
    for dataset in datasets:
        with DatasetReader(dataset.prefix) as reader:
            if not inputs:
                dtype = reader.dtype
            elif reader.dtype != dtype:
                raise UserError(
                    f"{dataset.prefix}: its token ids are {reader.dtype}, and those of "
                    f"{inputs[0].dataset.prefix} {dtype}; make both with one tokenizer"
                )
            record, documents, tokens = dataset.record, reader.documents, reader.tokens
        if record is not None and (documents, tokens) != (record.documents, record.tokens):
            raise UserError(
                f"{dataset.prefix}: has {documents:,} documents of {tokens:,} tokens, and "
                f"{FILE_NAME} beside it tells of {record.documents:,} and {record.tokens:,}; make "
                "the directory again"
            )
        inputs.append(MergeInput(dataset, first, tokens * dtype.itemsize))
        first += documents
    return inputs


def _merge(inputs: Sequence[MergeInput], scratch: Path, dedup: bool) -> dict[str, DomainRecord]:
    """Writes the joined datasets into `scratch`; returns domain to what is in its dataset."""
    size = sum(part.size for part in inputs)
    if not dedup:  # the size without copies is not known before
        indices = sum(os.path.getsize(idx_path(part.dataset.prefix)) for part in inputs)
        check_space(scratch, size + indices)
    duplicates = _duplicates(inputs, scratch, size) if dedup else None
    progress = Progress("merge_datasets: writing", size)
    merged = {}
    by_domain: dict[str, list[MergeInput]] = {}
    for part in inputs:
        by_domain.setdefault(part.dataset.domain, []).append(part)
    for domain, parts in by_domain.items():
        if record := _write(parts, scratch, duplicates, progress):
            merged[domain] = record
        else:
            say("merge_datasets", f"'{domain}' has copies only and is left out")
    if duplicates is not None:
        print(f"left out as copies: {duplicates.sum():,} of {len(duplicates):,} documents")
    return merged


def _duplicates(inputs: Sequence[MergeInput], scratch: Path, size: int) -> NDArray[np.bool_]:
    progress = Progress("merge_datasets: looking for copies", size)
    with DuplicateFinder(scratch) as finder:
        for part in inputs:
            with DatasetReader(part.dataset.prefix) as reader:
                for block in reader.blocks():
                    finder.add(hash_documents(reader.read(block), block.tokens))
                    progress.advance(block.size)
        return finder.duplicates()


def _write(
    inputs: Sequence[MergeInput],
    scratch: Path,
    duplicates: NDArray[np.bool_] | None,
    progress: Progress,
) -> DomainRecord | None:
    """Writes one joined dataset, unless it has copies only, which is None.

    It takes the largest token id from the records where it can.
    """
    known = [part.dataset.record.max_token_id for part in inputs if part.dataset.record]
    prefix = inputs[0].dataset.prefix
    with PairWriter(scratch / prefix.name, Index.open(prefix).dtype) as writer:
        for part in inputs:
            with DatasetReader(part.dataset.prefix) as reader:
                for block in reader.blocks():
                    if duplicates is None:
                        reader.copy(block, writer)
                    else:
                        first = part.first + block.first
                        keep = ~duplicates[first : first + len(block.tokens)]
                        write_selected(reader.read(block), block, keep, writer)
                    progress.advance(block.size)
        if duplicates is None:
            writer.largest_id = max(known, default=0)
        return writer.finalize() if writer.documents else None  # which removes the files
