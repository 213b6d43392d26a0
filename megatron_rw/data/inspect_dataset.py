"""Prints what is in Megatron datasets, whether they are whole, and what their documents say.

It reads the index of each dataset, and with `--check` every token as well. The exit status is 1
when something is wrong with the data, and 2 when the command line is wrong.
"""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional, arg

from megatron_rw.command_line import parse
from megatron_rw.data.indexed.documents import DatasetReader
from megatron_rw.data.indexed.domains import FILE_NAME, InputDataset, listed_datasets, look_up
from megatron_rw.data.indexed.inspection import Report, inspect
from megatron_rw.data.indexed.pair import bin_path, idx_path, is_dataset
from megatron_rw.data.tokenizers.decoding import DecodingFlags, decode, find
from megatron_rw.errors import UserError, reported

_DESCRIPTION = """\
Print what is in Megatron .bin/.idx datasets, and whether they are whole.

examples:
  python tools/inspect_dataset.py data/train --check
  python tools/inspect_dataset.py data/train/wiki_text_document --document 17
  python tools/inspect_dataset.py data/train --find 'lorem ipsum'
  python tools/inspect_dataset.py --samples runs/a/samples.jsonl
"""
# Before a single token that is shown.
_CONTEXT_TOKENS = 32
_ACTION = tyro.conf.create_mutex_group(required=False)


@dataclass(frozen=True, kw_only=True)
class InspectConfig(DecodingFlags):
    """The flags of inspect_dataset."""

    paths: Annotated[Positional[tuple[Path, ...]], arg(metavar="PATH [PATH ...]")]
    """Directories of datasets, or datasets as paths without .bin and .idx."""

    check: bool = False
    """Read every token, and check that it is below the vocabulary's size and that each document
    ends in the end-of-document token."""

    json: bool = False
    """Print JSON."""

    document: Annotated[int | None, _ACTION, arg(metavar="K")] = None
    """Print the text of document K, counted from 0."""

    find: Annotated[str | None, _ACTION, arg(metavar="TEXT")] = None
    """List the documents whose text contains TEXT, a line each."""

    samples: Annotated[Path | None, _ACTION, arg(metavar="FILE")] = None
    """Print the text of the samples in a samples.jsonl, which training with --reweight-dump-samples
    has written. It names the datasets."""

    ids: bool = False
    """With --document, print its token ids instead of its text."""

    def __post_init__(self) -> None:
        if bool(self.paths) == (self.samples is not None):
            raise UserError(
                "give the PATH of a dataset or of a directory of datasets, or --samples alone"
            )
        shown = self.document is not None or self.find is not None or self.samples is not None
        if self.check and shown:
            raise UserError("--check goes with the report only")
        if self.ids and self.document is None:
            raise UserError("--ids goes with --document")
        if self.find == "":
            raise UserError("--find needs a text")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line, and returns 1 if something is wrong with the data."""
    with reported("inspecting datasets"):
        config = parse(InspectConfig, argv, _DESCRIPTION)
        try:
            wrong = _run(config)
            sys.stdout.flush()
        except BrokenPipeError:  # the reader, such as `| head`, needs no more
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
    return int(wrong)


def _run(config: InspectConfig) -> bool:
    """Returns whether something is wrong with the data."""
    datasets = [dataset for path in config.paths for dataset in _datasets(path)]
    if config.samples is not None:
        _print_samples(config.samples, config)
    elif config.document is not None:
        _print_document(datasets, config, config.document)
    elif config.find is not None:
        _print_found(datasets, config, config.find)
    else:
        return _print_reports(datasets, config)
    return False


def _datasets(path: Path) -> list[InputDataset]:
    if is_dataset(path):
        if not idx_path(path).exists() and not bin_path(path).exists():
            raise UserError(
                f"{path}: neither a directory nor a dataset's path without .bin and .idx"
            )
        return look_up([path])
    if (path / FILE_NAME).is_file():
        return listed_datasets(path, "PATH")
    prefixes = [index.with_suffix("") for index in sorted(path.glob("*.idx"))]
    if not prefixes:
        raise UserError(f"{path}: has no datasets; give a directory of .bin and .idx files")
    return look_up(prefixes)


def _print_reports(datasets: Sequence[InputDataset], config: InspectConfig) -> bool:
    reports = [_inspect(dataset, config) for dataset in datasets]
    if config.json:
        print(json.dumps({"datasets": [report.summary() for report in reports]}, indent=2))
    else:
        print("\n\n".join(report.text() for report in reports))
    return any(report.problems for report in reports)


def _inspect(dataset: InputDataset, config: InspectConfig) -> Report:
    if not config.check or not config.is_named(dataset.tokenizer):
        return inspect(dataset, config.check)
    tokenizer = config.load(dataset.tokenizer)
    eod = tokenizer.eod if tokenizer.eod is not None and tokenizer.eod >= 0 else None
    return inspect(dataset, config.check, tokenizer.vocab_size, eod)


def _print_document(datasets: Sequence[InputDataset], config: InspectConfig, number: int) -> None:
    if len(datasets) > 1:
        raise UserError(
            f"--document: there are {len(datasets)} datasets; give one of "
            f"{', '.join(str(dataset.prefix) for dataset in datasets[:8])}"
        )
    prefix = datasets[0].prefix
    with DatasetReader(prefix) as reader:
        if not 0 <= number < reader.documents:
            raise UserError(
                f"--document {number}: {prefix} has documents 0 to {reader.documents - 1}"
            )
        ids = reader.document(number)
    text = None if config.ids else decode(config.load(datasets[0].tokenizer), ids)
    if config.json:
        content = {"prefix": str(prefix), "document": number, "ids": ids.tolist()}
        print(json.dumps(content if text is None else {**content, "text": text}))
    else:
        print(" ".join(map(str, ids.tolist())) if text is None else text)


def _print_found(datasets: Sequence[InputDataset], config: InspectConfig, text: str) -> None:
    for dataset in datasets:
        tokenizer = config.load(dataset.tokenizer)
        with DatasetReader(dataset.prefix) as reader:
            for number, count, context in find(reader, text, tokenizer):
                if config.json:
                    found = {"document": number, "count": count, "context": context}
                    print(json.dumps({"prefix": str(dataset.prefix), **found}))
                else:
                    print(f"{dataset.prefix} --document {number}: {count} times: {context!r}")


def _print_samples(path: Path, config: InspectConfig) -> None:
    for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1):
        try:
            sample = json.loads(line)
            dataset, first = look_up([sample["dataset"]])[0], sample["offset"]
            end = first + sample["tokens"]
            title = (
                f"iteration {sample['iteration']}, {sample['which']} weight "
                f"{sample['weight']:.4g}, loss {sample['loss']:.4g}: {dataset.prefix} --document "
                f"{sample['document']}, tokens {first} to {end - 1}"
            )
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}:{number}: not a line that training has written") from error
        with DatasetReader(dataset.prefix) as reader:
            ids = reader.document(sample["document"])
        tokenizer = config.load(dataset.tokenizer)
        # A token alone says little, and pieces decoded by themselves lose their spaces.
        begin = max(0, first - _CONTEXT_TOKENS) if sample["tokens"] == 1 else first
        before, text = (decode(tokenizer, ids[begin:stop]) for stop in (first, end))
        if config.json:
            print(json.dumps({**sample, "before": before, "text": text[len(before) :]}))
        else:
            print(f"{title}\n{before}{'>>> ' * (begin < first)}{text[len(before) :]}\n")
