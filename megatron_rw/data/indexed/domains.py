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
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from megatron_rw.errors import UserError
from megatron_rw.platform.files import write_complete

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

        Raises:
            UserError: If it is malformed; the message names the file and the field.
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
        write_complete(Path(path), json.dumps(content, indent=2, ensure_ascii=False) + "\n")


class DomainLookup:
    """Looks datasets up in the `domains.json` beside them, and reads each such file once.

    Datasets are given as paths without `.bin` and `.idx`, as in Megatron's `--data-path`. Every
    method raises `UserError` if a `domains.json` is malformed.
    """

    def __init__(self) -> None:
        self._files: dict[str, DomainsFile | None] = {}

    def name(self, prefix: str) -> str:
        """Returns the name of a dataset's domain.

        Without a `domains.json` that lists the dataset, it is the file name without a trailing
        `_text_document` or `_document`.
        """
        found, base = self._find(prefix), os.path.basename(prefix)
        if found:
            return found[1]
        for suffix in ("_text_document", "_document"):
            if base.endswith(suffix) and base != suffix:
                return base.removesuffix(suffix)
        return base

    def record(self, prefix: str) -> DomainRecord | None:
        """Returns what `domains.json` says of a dataset, or None if it is not listed."""
        found = self._find(prefix)
        return found[0].domains[found[1]] if found else None

    def tokenizer(self, prefix: str) -> TokenizerRecord | None:
        """Returns the tokenizer that made a dataset, or None if no `domains.json` lists it."""
        found = self._find(prefix)
        return found[0].tokenizer if found else None

    def _find(self, prefix: str) -> tuple[DomainsFile, str] | None:
        directory, base = os.path.split(prefix)
        if directory not in self._files:
            path = Path(directory) / FILE_NAME
            self._files[directory] = DomainsFile.load(path) if path.is_file() else None
        file = self._files[directory]
        return (file, file.names[base]) if file is not None and base in file.names else None


def domain_names(prefixes: Sequence[str]) -> list[str]:
    """Returns the domain of each dataset; datasets with the same name are of the same domain.

    Raises:
        UserError: If a `domains.json` is malformed.
    """
    lookup = DomainLookup()
    return [lookup.name(prefix) for prefix in prefixes]


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
