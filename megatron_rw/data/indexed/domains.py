"""`domains.json`: which domain each dataset of a directory is, and what was counted in it.

`preprocess_data` writes it beside the `.bin/.idx` files that it describes::

    {"version": 1,
     "tokenizer": {"type": "SentencePieceTokenizer", "model": "<path as given>",
                   "sha256": "<of the model>", "vocab_size": 4096},
     "domains": {"wiki": {"prefix": "wiki_text_document", "documents": 185,
                          "tokens": 123456, "max_token_id": 4095}, ...}}

A directory may lack it; then the file names of its datasets name the domains.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from megatron_rw.errors import UserError
from megatron_rw.platform.files import write_json

FILE_NAME = "domains.json"
VERSION = 1
_REMEDY = "write it again with tools/preprocess_data.py, or delete it to name domains by file"
_JSON_NAMES: dict[Any, str] = {int: "an integer", str: "a string", dict: "an object"}


@dataclass(frozen=True)
class TokenizerRecord:
    """The tokenizer that made the token ids; `sha256` is that of `tokenizer.model_sha256`."""

    type: str
    model: str
    sha256: str
    vocab_size: int


@dataclass(frozen=True)
class DomainRecord:
    """The dataset of one domain; `prefix` is a file name without `.bin` and `.idx`."""

    prefix: str
    documents: int
    tokens: int
    max_token_id: int


@dataclass(frozen=True)
class DomainsFile:
    """The content of a `domains.json`: domain name to record, in the order of the blend."""

    tokenizer: TokenizerRecord
    domains: Mapping[str, DomainRecord]

    @cached_property
    def names(self) -> Mapping[str, str]:
        """Prefix to domain name."""
        return {record.prefix: name for name, record in self.domains.items()}

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Reads a `domains.json`.

        Raises a `UserError` if it is malformed; the message names the file and the field.
        """
        try:
            content = json.loads(Path(path).read_text("utf-8"))
        except ValueError as error:
            raise UserError(f"{path}: not JSON ({error}); {_REMEDY}") from error
        if not isinstance(content, dict):
            raise UserError(f"{path}: not a JSON object; {_REMEDY}")
        version = _field(content, "version", int, path)
        if version != VERSION:
            raise UserError(f"{path}: version {version}, but only {VERSION} is known; {_REMEDY}")
        tokenizer = _record(TokenizerRecord, content, "tokenizer", path)
        entries = _field(content, "domains", dict, path)
        domains = {name: _record(DomainRecord, entries, name, path, "domains.") for name in entries}
        for name, record in domains.items():
            if not record.prefix or record.prefix != os.path.basename(record.prefix):
                raise UserError(
                    f"{path}: domains.{name}.prefix is '{record.prefix}', not the name of a file "
                    f"beside it; {_REMEDY}"
                )
        for prefix, count in Counter(record.prefix for record in domains.values()).items():
            if count > 1:
                raise UserError(f"{path}: several domains have the prefix '{prefix}'; {_REMEDY}")
        return cls(tokenizer, domains)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a `domains.json`; the file is complete whenever it exists under its name."""
        content = {
            "version": VERSION,
            "tokenizer": asdict(self.tokenizer),
            "domains": {name: asdict(record) for name, record in self.domains.items()},
        }
        write_json(Path(path), content)


@dataclass(frozen=True)
class InputDataset:
    """A dataset that is read, and what the `domains.json` beside it says if it is listed there.

    `prefix` is the path without `.bin` and `.idx`, as in Megatron's `--data-path`.
    """

    prefix: Path
    domain: str
    record: DomainRecord | None
    tokenizer: TokenizerRecord | None


def look_up(prefixes: Iterable[str | Path]) -> list[InputDataset]:
    """Looks datasets up in the `domains.json` beside them, each of which is read once.

    A dataset that no `domains.json` lists is of the domain that its file name says, without a
    trailing `_text_document` or `_document`. Raises a `UserError` if a `domains.json` is malformed.
    """
    files: dict[Path, DomainsFile | None] = {}
    found = []
    for prefix in map(Path, prefixes):
        if prefix.parent not in files:
            path = prefix.parent / FILE_NAME
            files[prefix.parent] = DomainsFile.load(path) if path.is_file() else None
        file = files[prefix.parent]
        if file is not None and prefix.name in file.names:
            domain = file.names[prefix.name]
            found.append(InputDataset(prefix, domain, file.domains[domain], file.tokenizer))
        else:
            domain = re.sub("(?<=.)(_text)?_document$", "", prefix.name)
            found.append(InputDataset(prefix, domain, None, None))
    return found


def domain_names(prefixes: Iterable[str]) -> list[str]:
    """Returns the domain of each dataset; datasets with the same name are of the same domain.

    Raises a `UserError` if a `domains.json` is malformed.
    """
    return [dataset.domain for dataset in look_up(prefixes)]


def listed_datasets(directory: Path, flag: str) -> list[InputDataset]:
    """Returns the datasets that the `domains.json` of a directory lists.

    Raises a `UserError` if it has no such file, or a malformed one; the message names the flag.
    """
    path = directory / FILE_NAME
    if not path.is_file():
        raise UserError(
            f"{flag} {directory}: has no {FILE_NAME}; give a complete directory of preprocess_data"
        )
    content = DomainsFile.load(path)
    if not content.domains:
        raise UserError(f"{path}: lists no domains; give a directory that has some")
    return look_up(directory / record.prefix for record in content.domains.values())


def check_one_tokenizer(datasets: Sequence[InputDataset]) -> None:
    """Checks that one tokenizer made all datasets for which the tokenizer is known.

    Raises a `UserError` if two tokenizers differ in more than the path of their model, which
    differs for shards that were made on several machines.
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


def _record[Record: (TokenizerRecord, DomainRecord)](
    kind: type[Record],
    parent: dict[str, Any],
    key: str,
    path: str | os.PathLike[str],
    where: str = "",
) -> Record:
    entry = _field(parent, key, dict, path, where)
    place = f"{where}{key}."
    return kind(*(_field(entry, field.name, field.type, path, place) for field in fields(kind)))


def _field(
    record: dict[str, Any], key: str, kind: Any, path: str | os.PathLike[str], where: str = ""
) -> Any:
    if key not in record:
        raise UserError(f"{path}: {where}{key} is missing; {_REMEDY}")
    value = record[key]
    if type(value) is not kind:  # not isinstance: JSON's true is an int to Python
        raise UserError(f"{path}: {where}{key} is {value!r}, not {_JSON_NAMES[kind]}; {_REMEDY}")
    if isinstance(value, int) and value < 0:
        raise UserError(f"{path}: {where}{key} is negative ({value}); {_REMEDY}")
    return value
