"""Writes encoded documents to one Megatron dataset per domain."""

from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from megatron_rw.data.encoding import EncodedBatch


@dataclass
class DomainCounts:
    """What was written of a domain.

    Attributes:
        prefix: File name of the dataset without `.bin` or `.idx`.
        documents: Number of documents.
        tokens: Number of tokens, end-of-document tokens included.
        text_bytes: UTF-8 bytes of text.
        max_token_id: The largest token id.
    """

    prefix: str
    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    max_token_id: int = 0


class DatasetWriter:
    """Writes `<domain>_text_document.bin/.idx` into a directory; a context manager.

    Args:
        directory: Where to write, under the final names; they are complete after `finalize`.
        dtype: NumPy type of the stored token ids.

    Attributes:
        counts: Domain to what was written of it so far, in order of appearance.
    """

    def __init__(self, directory: Path, dtype: type[Any]) -> None:
        self._directory = directory
        self._dtype = dtype
        self._builders: dict[str, Any] = {}
        self.counts: dict[str, DomainCounts] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Closes the data files, whatever happened."""
        for builder in self._builders.values():
            builder.data_file.close()

    def add(self, batch: EncodedBatch) -> None:
        """Appends the documents of a batch to the datasets of their domains."""
        start = 0
        for domain, length, text_bytes in zip(
            batch.domains, batch.lengths, batch.text_bytes, strict=True
        ):
            ids = batch.ids[start : start + length]
            start += length
            if domain not in self._builders:
                self._open(domain)
            self._builders[domain].add_document(ids, [length])
            count = self.counts[domain]
            count.documents += 1
            count.tokens += length
            count.text_bytes += text_bytes
            count.max_token_id = max(count.max_token_id, int(ids.max()))

    def finalize(self) -> dict[str, DomainCounts]:
        """Writes the indices and returns the counts; nothing can be added afterwards."""
        for domain, builder in self._builders.items():
            builder.finalize(self._path(domain, ".idx"))
        return self.counts

    def _open(self, domain: str) -> None:
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

        self.counts[domain] = DomainCounts(prefix=f"{domain}_text_document")
        self._builders[domain] = IndexedDatasetBuilder(
            self._path(domain, ".bin"), dtype=self._dtype
        )

    def _path(self, domain: str, suffix: str) -> str:
        return str(self._directory / f"{domain}_text_document{suffix}")
