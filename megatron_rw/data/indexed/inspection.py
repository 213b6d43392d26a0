"""What is in a dataset, and what is wrong with it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_rw.data.indexed import domains
from megatron_rw.data.indexed.documents import DatasetReader
from megatron_rw.data.indexed.integrity import fingerprint
from megatron_rw.data.indexed.lengths import Lengths
from megatron_rw.data.indexed.pair import bin_path, idx_path
from megatron_rw.data.progress import Progress
from megatron_rw.errors import UserError


@dataclass
class Report:
    """What was found in a dataset.

    Attributes:
        prefix: Its path without `.bin` and `.idx`.
        domain: Its name in `domains.json`, or by its file.
        problems: What is wrong with it, a sentence each.
        facts: What its files say, by name; empty if they cannot be read.
        lengths: Of its documents, up to the first problem.
        tokens_read: Whether every token was looked at; the three that follow are None if not.
        max_token_id: The largest id, -1 without tokens.
        eod: The id that ends a document; None if no tokenizer tells.
        without_eod: Documents that do not end in it.
    """

    prefix: Path
    domain: str
    problems: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    lengths: Lengths = field(default_factory=Lengths)
    tokens_read: bool = False
    max_token_id: int | None = None
    eod: int | None = None
    without_eod: int | None = None

    def summary(self) -> dict[str, Any]:
        """Returns all of it, for `json`."""
        return {
            "prefix": str(self.prefix),
            "domain": self.domain,
            **self.facts,
            "lengths": self.lengths.summary(),
            "tokens_read": self.tokens_read,
            "max_token_id": self.max_token_id,
            "eod": self.eod,
            "without_eod": self.without_eod,
            "problems": self.problems,
        }


def inspect(
    prefix: Path, read_tokens: bool = False, vocab_size: int | None = None, eod: int | None = None
) -> Report:
    """Looks at the whole index of a dataset, and at its tokens on request.

    Args:
        prefix: Path without `.bin` and `.idx`.
        read_tokens: Whether to read every token.
        vocab_size: Which token ids must be below; None takes it from `domains.json`.
        eod: The id that ends a document, if it is known.

    Returns:
        What was found; a damaged dataset is no exception but a problem in it.

    Raises:
        UserError: The `domains.json` beside it is malformed.
    """
    try:
        report = Report(prefix, domains.domain_names([str(prefix)])[0])
        record = domains.domain_record(str(prefix))
        tokenizer = domains.tokenizer_record(str(prefix))
    except ValueError as error:
        raise UserError(str(error)) from error
    if vocab_size is None and tokenizer is not None:
        vocab_size = tokenizer.vocab_size
    try:
        with DatasetReader(prefix) as reader:
            report.facts = {
                "dtype": str(reader.dtype),
                "sequences": len(reader.index.lengths),
                "documents": reader.documents,
                "tokens": reader.tokens,
                "bytes": bin_path(prefix).stat().st_size + idx_path(prefix).stat().st_size,
                "fingerprint": fingerprint(str(prefix)),
                "record": asdict(record) if record else None,
                "tokenizer": asdict(tokenizer) if tokenizer else None,
            }
            if read_tokens:
                _read_tokens(reader, report, eod)
            else:
                for block in reader.blocks():
                    report.lengths.add(block.tokens)
    except UserError as error:
        report.problems.append(str(error))
        return report
    _compare(report, record, vocab_size)
    return report


def _read_tokens(reader: DatasetReader, report: Report, eod: int | None) -> None:
    progress = Progress("inspect_dataset: reading", reader.tokens * reader.dtype.itemsize)
    smallest, largest, without = 0, -1, 0
    for block in reader.blocks():
        report.lengths.add(block.tokens)
        ids = reader.read(block)
        if len(ids):
            smallest, largest = min(smallest, int(ids.min())), max(largest, int(ids.max()))
        if eod is not None:
            last = np.cumsum(block.tokens) - 1
            ends = (block.tokens > 0) & (ids[last] == eod) if len(ids) else block.tokens > 0
            without += len(block.tokens) - int(ends.sum())
        progress.advance(block.size)
    report.tokens_read, report.max_token_id = True, largest
    if eod is not None:
        report.eod, report.without_eod = eod, without
    if smallest < 0:
        report.problems.append(f"{bin_path(reader.prefix)}: a token id is {smallest}")


def _compare(report: Report, record: domains.DomainRecord | None, vocab_size: int | None) -> None:
    """Adds what contradicts `domains.json` or the vocabulary."""
    largest = report.max_token_id
    if largest is not None and vocab_size is not None and largest >= vocab_size:
        report.problems.append(
            f"{bin_path(report.prefix)}: the largest token id is {largest}, and the vocabulary "
            f"has {vocab_size}"
        )
    if record is None:
        return
    found = {"documents": report.facts["documents"], "tokens": report.facts["tokens"]}
    if largest is not None:
        found["max_token_id"] = largest
    for name, value in found.items():
        listed = getattr(record, name)
        if value != listed:
            report.problems.append(
                f"{report.prefix}: {name} is {value:,}, and {domains.FILE_NAME} says {listed:,}"
            )
