"""The datasets that a tool is given to read, and what `domains.json` says of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from megatron_rw.data.indexed.domains import (
    FILE_NAME,
    DomainLookup,
    DomainRecord,
    DomainsFile,
    TokenizerRecord,
)
from megatron_rw.errors import UserError


@dataclass(frozen=True)
class InputDataset:
    """A dataset that a tool reads, with what `domains.json` says of it, if it is listed there."""

    prefix: Path
    domain: str
    record: DomainRecord | None
    tokenizer: TokenizerRecord | None


def single_datasets(prefixes: Iterable[Path]) -> list[InputDataset]:
    """Returns the datasets with these paths, which are without `.bin` and `.idx`.

    Raises:
        UserError: If a `domains.json` beside them is malformed.
    """
    lookup = DomainLookup()
    return [
        InputDataset(
            prefix,
            lookup.name(str(prefix)),
            lookup.record(str(prefix)),
            lookup.tokenizer(str(prefix)),
        )
        for prefix in prefixes
    ]


def listed_datasets(directory: Path, flag: str) -> list[InputDataset]:
    """Returns the datasets that the `domains.json` of a directory lists.

    Raises:
        UserError: If it has no such file, or a malformed one; the message names the flag.
    """
    path = directory / FILE_NAME
    if not path.is_file():
        raise UserError(
            f"{flag} {directory}: has no {FILE_NAME}; give a complete directory of "
            "preprocess_data, or a dataset's path without .bin and .idx as --input"
        )
    content = DomainsFile.load(path)
    if not content.domains:
        raise UserError(f"{path}: lists no domains; give a directory that has some")
    return [
        InputDataset(directory / record.prefix, name, record, content.tokenizer)
        for name, record in content.domains.items()
    ]


def check_one_tokenizer(datasets: Sequence[InputDataset]) -> None:
    """Checks that one tokenizer made all datasets for which the tokenizer is known.

    Raises:
        UserError: If two tokenizers differ in more than the path of their model, which differs for
            shards that were made on several machines.
    """
    known = [(dataset.prefix, dataset.tokenizer) for dataset in datasets if dataset.tokenizer]
    for prefix, tokenizer in known[1:]:
        first, expected = known[0]
        for name in (field.name for field in fields(tokenizer) if field.name != "model"):
            mine, other = getattr(tokenizer, name), getattr(expected, name)
            if mine != other:
                raise UserError(
                    f"{prefix}: its tokenizer is {tokenizer.model} ({name} {mine}), and that of "
                    f"{first} is {expected.model} ({name} {other}); make both with one"
                )
