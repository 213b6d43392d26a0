"""Joins Megatron datasets by copying their bytes and writing new indices, in bounded memory.

Documents keep the order of the inputs, so that shards joined in their order are what one run would
have written.
"""

import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
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
    look_up,
)
from megatron_rw.data.indexed.output import (
    check_output_dir,
    check_space,
    publish,
    table,
)
from megatron_rw.data.indexed.pair import Index, PairWriter, bin_path, idx_path
from megatron_rw.data.progress import Progress, say
from megatron_rw.data.text.dedup import DuplicateFinder, hash_documents
from megatron_rw.errors import UserError, reported

_DESCRIPTION = """\
Join Megatron .bin/.idx datasets, in the order given.

examples:
  python tools/merge_datasets.py --input a/wiki_text_document b/wiki_text_document \\
      --output-prefix data/wiki_text_document
  python tools/merge_datasets.py --input-dir shards/*/ --output-dir data/train --dedup exact
  then train with --data-args-path data/train/blend.txt --split 98,1,1
"""


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """The flags of merge_datasets."""

    input: Annotated[tuple[Path, ...], arg(metavar="PREFIX [PREFIX ...]")] = ()
    """Datasets to join into one, as paths without .bin and .idx."""

    output_prefix: Annotated[Path | None, arg(metavar="PREFIX")] = None
    """The joined dataset of --input, as a path without .bin and .idx."""

    input_dir: Annotated[tuple[Path, ...], arg(metavar="DIR [DIR ...]")] = ()
    """Directories of preprocess_data to join domain by domain. Note that a shell sorts shard-10
    before shard-2."""

    output_dir: Annotated[Path | None, arg(metavar="DIR")] = None
    """The directory for the joined datasets of --input-dir; it is made if it is not there."""

    overwrite: bool = False
    """Replace the datasets that are there already."""

    dedup: Literal["none", "exact"] = "none"
    """With "exact", leave out documents whose tokens are exactly those of an earlier one, of any
    input and domain. That needs 24 bytes of disk per document while it runs."""

    def __post_init__(self) -> None:
        single = (bool(self.input), self.output_prefix is not None)
        listed = (bool(self.input_dir), self.output_dir is not None)
        if {single, listed} != {(True, True), (False, False)}:
            raise UserError("give --input with --output-prefix, or --input-dir with --output-dir")


@dataclass(frozen=True)
class MergeInput:
    """A dataset that becomes a part of a joined one."""

    dataset: InputDataset
    first: int  # Number of its first document among those of all inputs.
    size: int  # Bytes of its tokens.


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    with reported("joining datasets"):
        config = parse(MergeConfig, argv, _DESCRIPTION)
        if config.output_prefix is not None:
            merged = _merge_into_prefix(config, config.output_prefix)
        else:
            assert config.output_dir is not None
            merged = _merge_into_directory(config, config.output_dir)
        print(table(merged))


def _merge_into_prefix(config: MergeConfig, output: Path) -> dict[str, DomainRecord]:
    targets = (bin_path(output), idx_path(output))
    there = [path for path in targets if path.exists()]
    if there and not config.overwrite:
        raise UserError(
            f"--output-prefix {output}: {there[0]} is there already; give another, or "
            "--overwrite to replace it"
        )
    if output.resolve() in [prefix.resolve() for prefix in config.input]:
        raise UserError(f"--output-prefix {output}: is one of --input; give another")
    datasets = look_up(config.input)
    check_one_tokenizer(datasets)
    inputs = _checked([replace(dataset, domain=output.name, record=None) for dataset in datasets])
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".merge_datasets-") as scratch:
        merged = _merge(inputs, {output.name: output.name}, Path(scratch), config.dedup == "exact")
        targets[1].unlink(missing_ok=True)  # so that the old index never describes the new tokens
        for path in targets:
            Path(scratch, path.name).replace(path)
    return merged


def _merge_into_directory(config: MergeConfig, output: Path) -> dict[str, DomainRecord]:
    absolute = check_output_dir(output, config.overwrite)
    if absolute.resolve() in [directory.resolve() for directory in config.input_dir]:
        raise UserError(f"--output-dir {output}: is one of --input-dir; give another")
    datasets = [d for path in config.input_dir for d in listed_datasets(path, "--input-dir")]
    check_one_tokenizer(datasets)
    prefixes: dict[str, str] = {}
    domains: dict[str, str] = {}
    for dataset in datasets:
        name, prefix = dataset.domain, dataset.prefix.name
        if name not in prefixes and prefix in domains:
            raise UserError(
                f"{dataset.prefix}: is of the domain '{name}', and of another one in an earlier "
                f"directory; name the file and its prefix in {FILE_NAME} by the domain"
            )
        domains.setdefault(prefix, name)
        prefixes.setdefault(name, prefix)
    inputs = _checked(datasets)
    absolute.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=absolute, prefix=".merge_datasets-") as scratch:
        merged = _merge(inputs, prefixes, Path(scratch), config.dedup == "exact")
        publish(Path(scratch), absolute, merged, datasets[0].tokenizer)
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


def _merge(
    inputs: Sequence[MergeInput], prefixes: Mapping[str, str], scratch: Path, dedup: bool
) -> dict[str, DomainRecord]:
    """Writes the joined datasets into `scratch`; returns domain to what is in its dataset.

    `prefixes` maps each domain to the file name of its dataset.
    """
    size = sum(part.size for part in inputs)
    if not dedup:  # the size without copies is not known before
        indices = sum(os.path.getsize(idx_path(part.dataset.prefix)) for part in inputs)
        check_space(scratch, size + indices)
    duplicates = _duplicates(inputs, scratch, size) if dedup else None
    progress = Progress("merge_datasets: writing", size)
    merged = {}
    by_domain: dict[str, list[MergeInput]] = {domain: [] for domain in prefixes}
    for part in inputs:
        by_domain[part.dataset.domain].append(part)
    for domain, prefix in prefixes.items():
        record = _write(by_domain[domain], scratch, prefix, duplicates, progress)
        if record.documents:
            merged[domain] = record
        else:
            say("merge_datasets", f"'{domain}' has copies only and is left out")
            bin_path(scratch / prefix).unlink()
            idx_path(scratch / prefix).unlink()
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
    prefix: str,
    duplicates: NDArray[np.bool_] | None,
    progress: Progress,
) -> DomainRecord:
    """Writes one joined dataset, and takes the largest token id from the records where it can."""
    known = [part.dataset.record.max_token_id for part in inputs if part.dataset.record]
    with PairWriter(scratch / prefix, Index.open(inputs[0].dataset.prefix).dtype) as writer:
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
        return writer.finalize()
