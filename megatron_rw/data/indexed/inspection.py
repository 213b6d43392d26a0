"""What is in a dataset, and what is wrong with it."""

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_rw.data.indexed.documents import DatasetReader
from megatron_rw.data.indexed.domains import FILE_NAME, InputDataset
from megatron_rw.data.indexed.integrity import fingerprint
from megatron_rw.data.indexed.pair import bin_path, idx_path
from megatron_rw.data.progress import Progress
from megatron_rw.errors import UserError

_BAR_CHARACTERS = 40


class Lengths:
    """Counts documents by their length, in memory that does not grow with their number.

    `shortest` and `longest` are the tokens of such a document; -1 and 0 without documents.
    """

    def __init__(self) -> None:
        # Bin 0 counts documents without tokens, bin k those of 2^(k-1) to 2^k - 1 tokens.
        self._bins = np.zeros(65, np.int64)
        self.documents = self.tokens = self.longest = 0
        self.shortest = -1

    def add(self, tokens: NDArray[np.int64]) -> None:
        """Adds documents by the number of tokens of each, [documents]."""
        if len(tokens) == 0:
            return
        self._bins += np.bincount(np.frexp(tokens)[1], minlength=65)
        self.documents += len(tokens)
        self.tokens += int(tokens.sum())
        shortest = int(tokens.min())
        self.shortest = shortest if self.shortest < 0 else min(shortest, self.shortest)
        self.longest = max(int(tokens.max()), self.longest)

    def bins(self) -> list[tuple[int, int, int]]:
        """Returns (fewest tokens, most tokens, documents) from the first to the last filled bin."""
        filled = np.flatnonzero(self._bins)
        if len(filled) == 0:
            return []
        return [
            (1 << number >> 1, max(0, (1 << number) - 1), int(self._bins[number]))
            for number in range(filled[0], filled[-1] + 1)
        ]

    @property
    def mean(self) -> float:
        """Tokens of a document on average."""
        return self.tokens / max(1, self.documents)

    def summary(self) -> dict[str, Any]:
        """Returns the counts, for JSON."""
        return {
            "shortest": self.shortest,
            "mean": self.mean,
            "longest": self.longest,
            "histogram": [
                {"from": low, "to": high, "documents": count} for low, high, count in self.bins()
            ],
        }

    def text(self) -> list[str]:
        """Returns the lines of a histogram."""
        most = max((count for _, _, count in self.bins()), default=1)
        return [
            f"{f'{low:,}' if low == high else f'{low:,}-{high:,}':>27} {count:>15,} "
            f"{'#' * round(_BAR_CHARACTERS * count / most)}".rstrip()
            for low, high, count in self.bins()
        ]


@dataclass
class Report:
    """What was found in a dataset."""

    dataset: InputDataset
    # What is wrong with the dataset, a sentence each.
    problems: list[str] = field(default_factory=list)
    # What its files say, by name; empty if they cannot be read.
    facts: dict[str, Any] = field(default_factory=dict)
    lengths: Lengths = field(default_factory=Lengths)
    tokens_read: bool = False  # Whether every token was read; the next three are None if not.
    max_token_id: int | None = None  # The largest id, -1 without tokens.
    eod: int | None = None  # The id that ends a document; None if it is not known.
    without_eod: int | None = None  # The number of documents that do not end in it.

    def summary(self) -> dict[str, Any]:
        """Returns the whole report, for JSON."""
        record, tokenizer = self.dataset.record, self.dataset.tokenizer
        made_by = {
            "record": asdict(record) if record else None,
            "tokenizer": asdict(tokenizer) if tokenizer else None,
        }
        return {
            "prefix": str(self.dataset.prefix),
            "domain": self.dataset.domain,
            **(self.facts and {**self.facts, **made_by}),
            "lengths": self.lengths.summary(),
            "tokens_read": self.tokens_read,
            "max_token_id": self.max_token_id,
            "eod": self.eod,
            "without_eod": self.without_eod,
            "problems": self.problems,
        }

    def text(self) -> str:
        """Returns the report for people to read, in several lines."""
        lines = [f"{self.dataset.prefix}: domain '{self.dataset.domain}'"]
        if self.facts:
            lines += [f"  {name:<13}{value}" for name, value in self._rows()]
            lines.append(f"{'tokens':>27} {'documents':>15}")
            lines += self.lengths.text()
        return "\n".join(lines + [f"  PROBLEM: {problem}" for problem in self.problems])

    def _rows(self) -> list[tuple[str, str]]:
        record, tokenizer = self.dataset.record, self.dataset.tokenizer
        rows = [
            (name, f"{value:,}" if isinstance(value, int) else value)
            for name, value in self.facts.items()
        ]
        listed = [f"{name} {value}" for name, value in asdict(record).items()] if record else []
        rows.append((FILE_NAME, ", ".join(listed) or "nothing"))
        if tokenizer is not None:
            model = f"{tokenizer.type} {tokenizer.model}, vocabulary {tokenizer.vocab_size:,}"
            rows += [("tokenizer", model), ("its sha256", tokenizer.sha256)]
        if self.tokens_read:
            rows.append(("largest id", f"{self.max_token_id:,}"))
            without = "not known: give --tokenizer-model"
            if self.without_eod is not None:
                without = f"{self.without_eod:,} (token {self.eod})"
            rows.append(("without EOD", without))
        tokens = f"{self.lengths.shortest:,} to {self.lengths.longest:,} tokens"
        return [*rows, ("a document", f"{tokens}, {self.lengths.mean:,.1f} on average")]


def inspect(
    dataset: InputDataset, read_tokens: bool, vocab_size: int | None = None, eod: int | None = None
) -> Report:
    """Looks at the whole index of a dataset, and at its tokens on request.

    The token ids must be below `vocab_size`, which is taken from `domains.json` if it is None. The
    ends of documents are checked only if `eod`, the id that ends a document, is known. Returns what
    was found; a damaged dataset is a problem in the report and no exception.
    """
    report = Report(dataset)
    if vocab_size is None and dataset.tokenizer is not None:
        vocab_size = dataset.tokenizer.vocab_size
    prefix = dataset.prefix
    try:
        with DatasetReader(prefix) as reader:
            report.facts = {
                "dtype": str(reader.dtype),
                "documents": reader.documents,
                "tokens": reader.tokens,
                "bytes": bin_path(prefix).stat().st_size + idx_path(prefix).stat().st_size,
                "fingerprint": fingerprint(str(prefix)),
            }
            if read_tokens:
                _read_tokens(reader, report, eod)
            else:
                for block in reader.blocks():
                    report.lengths.add(block.tokens)
    except UserError as error:
        report.problems.append(str(error))
        return report
    _compare(report, vocab_size)
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


def _compare(report: Report, vocab_size: int | None) -> None:
    """Adds what contradicts `domains.json` or the vocabulary."""
    prefix, largest = report.dataset.prefix, report.max_token_id
    if largest is not None and vocab_size is not None and largest >= vocab_size:
        report.problems.append(
            f"{bin_path(prefix)}: the largest token id is {largest}, and the vocabulary has "
            f"{vocab_size}"
        )
    found = {name: report.facts[name] for name in ("documents", "tokens")}
    if largest is not None:
        found["max_token_id"] = largest
    for name, value in found.items():
        listed = getattr(report.dataset.record, name, value)
        if value != listed:
            report.problems.append(
                f"{prefix}: {name} is {value:,}, and {FILE_NAME} says {listed:,}"
            )
