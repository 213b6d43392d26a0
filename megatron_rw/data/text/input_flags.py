"""The flags that say which files a tool reads and which domains their documents belong to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro
from tyro.conf import arg

from megatron_rw.data.text.domain_names import DomainBy, check_domain
from megatron_rw.data.text.sources import Source
from megatron_rw.errors import UserError

# At most one of the flags that name domains may be given.
ONE_DOMAIN_FLAG = tyro.conf.create_mutex_group(required=False)


@dataclass(frozen=True, kw_only=True)
class InputFlags:
    """Input."""

    input: Annotated[tuple[str, ...], arg(metavar="PATH [PATH ...]")]
    """Files, directories, patterns, URLs that fsspec opens, or - for JSON lines on standard input.
    Formats: .jsonl, .json, .txt (each also with .gz or .zst) and .parquet."""

    domain_key: Annotated[str | None, ONE_DOMAIN_FLAG, arg(metavar="KEY")] = None
    """Field or column that holds the document's domain."""

    domain_by: Annotated[DomainBy, ONE_DOMAIN_FLAG] = "corpus"
    """Without --domain-key, the domain comes from the path of the file. "corpus" takes the file's
    name up to the first dot, without the number of a shard: part-00000.jsonl and its like belong
    to the domain named by their directory, train-00000-of-00128.parquet to "train", web-0001.jsonl
    to "web"; dates such as 2023 and numbers of one or two digits stay. "file" keeps every number.
    "directory" takes the name of the directory."""

    def __post_init__(self) -> None:
        if not self.input:
            raise UserError("--input: give at least one file")

    def domain_of(self, source: Source) -> str:
        """Returns the domain of a source's documents where no field holds it.

        Raises:
            UserError: If its name cannot be part of a file name.
        """
        remedy = "give --domain-by or --domain, or rename it"
        return check_domain(source.domain(self.domain_by), f"{source.path}: {remedy}")
