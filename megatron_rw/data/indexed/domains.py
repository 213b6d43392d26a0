"""`domains.json`: which domain each dataset of a directory is, and what was counted in it.

`preprocess_data` writes it beside the `.bin/.idx` files that it describes::

    {"version": 1,
     "tokenizer": {"type": "SentencePieceTokenizer", "model": "<path as given>",
                   "sha256": "<of the model>", "vocab_size": 4096},
     "domains": {"wiki": {"prefix": "wiki_text_document", "documents": 185,
                          "tokens": 123456, "max_token_id": 4095}, ...}}

A directory without one is fine: the domain is then read off the file name.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from megatron_rw.platform.files import write_complete

FILE_NAME = "domains.json"
VERSION = 1
_REMEDY = "write it again with tools/preprocess_data.py, or delete it to name domains by file"


@dataclass(frozen=True)
class TokenizerRecord:
    """The tokenizer that made the token ids.

    Attributes:
        type: Megatron's `--tokenizer-type`.
        model: Its `--tokenizer-model`, as given.
        sha256: Hexadecimal digest of the model (see `tokenizer.fingerprint`).
        vocab_size: Number of token ids, before any padding.
    """

    type: str
    model: str
    sha256: str
    vocab_size: int


@dataclass(frozen=True)
class DomainRecord:
    """One domain's dataset.

    Attributes:
        prefix: File name of the dataset without `.bin` or `.idx`, in the same directory.
        documents: Number of documents.
        tokens: Number of tokens, end-of-document tokens included.
        max_token_id: The largest token id that occurs.
    """

    prefix: str
    documents: int
    tokens: int
    max_token_id: int


@dataclass(frozen=True)
class DomainsFile:
    """The content of a `domains.json`.

    Attributes:
        tokenizer: What made the token ids of every domain.
        domains: Domain name to record, in the order of the blend.
    """

    tokenizer: TokenizerRecord
    domains: Mapping[str, DomainRecord]

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Reads a `domains.json`.

        Raises:
            ValueError: If it is malformed; the message names the file and the field.
            OSError: If it cannot be read.
        """
        content = _parse_object(path)
        version = _field(content, "version", int, path)
        if version != VERSION:
            raise ValueError(f"{path}: version {version}, but only {VERSION} is known; {_REMEDY}")
        tokenizer = _field(content, "tokenizer", dict, path)
        domains = _field(content, "domains", dict, path)
        records = {
            name: _domain(_field(domains, name, dict, path, "domains"), name, path)
            for name in domains
        }
        prefixes = [record.prefix for record in records.values()]
        for prefix in prefixes:
            if prefixes.count(prefix) > 1:
                raise ValueError(f"{path}: several domains have the prefix '{prefix}'; {_REMEDY}")
        return cls(
            tokenizer=TokenizerRecord(
                type=_field(tokenizer, "type", str, path, "tokenizer"),
                model=_field(tokenizer, "model", str, path, "tokenizer"),
                sha256=_field(tokenizer, "sha256", str, path, "tokenizer"),
                vocab_size=_field(tokenizer, "vocab_size", int, path, "tokenizer"),
            ),
            domains=records,
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a `domains.json`; the file is complete whenever it exists under its name."""
        content = {
            "version": VERSION,
            "tokenizer": asdict(self.tokenizer),
            "domains": {name: asdict(record) for name, record in self.domains.items()},
        }
        write_complete(Path(path), json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def domain_names(prefixes: Sequence[str]) -> list[str]:
    """Returns the domain name of each data-path prefix.

    It is the name that `domains.json` in the prefix's directory gives to the dataset, or else the
    file name without a trailing `_text_document` or `_document`. Prefixes that get the same name
    are the same domain.

    Args:
        prefixes: Dataset paths without `.bin` or `.idx`, as in Megatron's `--data-path`.

    Raises:
        ValueError: If a `domains.json` is malformed.
    """
    return [_domain_name(prefix) for prefix in prefixes]


def domain_record(prefix: str) -> DomainRecord | None:
    """Returns what `domains.json` says about a data-path prefix, or None if it says nothing.

    Raises:
        ValueError: If the `domains.json` is malformed.
    """
    found = _lookup(prefix)
    return found[1] if found else None


def tokenizer_record(prefix: str) -> TokenizerRecord | None:
    """Returns the tokenizer that made a dataset, or None if no `domains.json` lists it.

    Raises:
        ValueError: If the `domains.json` is malformed.
    """
    if domain_record(prefix) is None:
        return None
    return DomainsFile.load(Path(prefix).with_name(FILE_NAME)).tokenizer


def _domain_name(prefix: str) -> str:
    found = _lookup(prefix)
    if found:
        return found[0]
    name = os.path.basename(prefix)
    for suffix in ("_text_document", "_document"):
        if name.endswith(suffix) and name != suffix:
            return name.removesuffix(suffix)
    return name


def _lookup(prefix: str) -> tuple[str, DomainRecord] | None:
    directory, basename = os.path.split(prefix)
    path = Path(directory) / FILE_NAME
    if not path.is_file():
        return None
    for name, record in DomainsFile.load(path).domains.items():
        if record.prefix == basename:
            return name, record
    return None


def _parse_object(path: str | os.PathLike[str]) -> dict[str, Any]:
    try:
        content = json.loads(Path(path).read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); {_REMEDY}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: not a JSON object; {_REMEDY}")
    return content


def _domain(record: dict[str, Any], name: str, path: str | os.PathLike[str]) -> DomainRecord:
    where = f"domains.{name}"
    prefix = _field(record, "prefix", str, path, where)
    if not prefix or prefix != os.path.basename(prefix):
        raise ValueError(
            f"{path}: {where}.prefix is '{prefix}', not the name of a file beside it; {_REMEDY}"
        )
    return DomainRecord(
        prefix=prefix,
        documents=_field(record, "documents", int, path, where),
        tokens=_field(record, "tokens", int, path, where),
        max_token_id=_field(record, "max_token_id", int, path, where),
    )


def _field[T](
    record: dict[str, Any], key: str, kind: type[T], path: str | os.PathLike[str], where: str = ""
) -> T:
    place = f"{where}.{key}" if where else key
    if key not in record:
        raise ValueError(f"{path}: {place} is missing; {_REMEDY}")
    value = record[key]
    if type(value) is not kind:  # not isinstance: JSON's true is an int to Python
        raise ValueError(f"{path}: {place} is {value!r}, not {_JSON_NAMES[kind]}; {_REMEDY}")
    if isinstance(value, int) and value < 0:
        raise ValueError(f"{path}: {place} is negative ({value}); {_REMEDY}")
    return value


_JSON_NAMES: dict[type, str] = {int: "an integer", str: "a string", dict: "an object"}
