"""Datasets that megatron.core writes and reads, for the tests of what copies them."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from megatron_rw.data.indexed.domains import DomainRecord, DomainsFile, TokenizerRecord

TOKENIZER = TokenizerRecord("SentencePieceTokenizer", "t/bpe.model", "ab" * 32, 4096)
type Document = list[list[int]]  # its sequences, each of token ids


def exit_status(main: Callable[[Sequence[str]], int | None], *flags: object) -> int:
    """Runs a tool's command line in this process and returns the exit status of the tool."""
    try:
        return main([str(flag) for flag in flags]) or 0
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else 1


def write_dataset(
    prefix: Path, documents: Sequence[Document], dtype: type[Any] = np.uint16
) -> Path:
    prefix.parent.mkdir(parents=True, exist_ok=True)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for document in documents:
        ids = list(itertools.chain.from_iterable(document))
        builder.add_document(ids, [len(sequence) for sequence in document])
    builder.finalize(f"{prefix}.idx")
    return prefix


def record(name: str, documents: Sequence[Document]) -> DomainRecord:
    ids = [token for document in documents for sequence in document for token in sequence]
    return DomainRecord(f"{name}_text_document", len(documents), len(ids), max(ids))


def write_directory(
    directory: Path,
    domains: Mapping[str, Sequence[Document]],
    tokenizer: TokenizerRecord = TOKENIZER,
) -> Path:
    for name, documents in domains.items():
        write_dataset(directory / f"{name}_text_document", documents)
    records = {name: record(name, documents) for name, documents in domains.items()}
    DomainsFile(tokenizer, records).save(directory / "domains.json")
    return directory


def read_dataset(prefix: Path) -> list[Document]:
    dataset = IndexedDataset(str(prefix))
    sequences = [dataset[number].tolist() for number in range(len(dataset))]
    bounds = dataset.document_indices.tolist()
    return [sequences[start:stop] for start, stop in itertools.pairwise(bounds)]


def files(directory: Path) -> dict[str, bytes]:
    """The content of a directory; without `blend.txt`, which has the directory's own path."""
    return {p.name: p.read_bytes() for p in directory.iterdir() if p.name != "blend.txt"}
