"""Datasets that megatron.core writes and reads, and calls of the tools that make and read them."""

import contextlib
import io
import itertools
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from megatron_rw.data.indexed.domains import DomainRecord, DomainsFile, TokenizerRecord

TOKENIZER = TokenizerRecord("SentencePieceTokenizer", "t/bpe.model", "ab" * 32, 4096)
type Document = list[list[int]]  # its sequences, each of token ids


@dataclass(frozen=True)
class Ended:
    """How a tool ended, and what it printed."""

    status: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The last line of standard error, which must be an error's."""
        *_, last = self.err.splitlines()
        assert last.startswith("error: "), self.err
        return last


def call(
    main: Callable[[Sequence[str]], int | None], *flags: object, status: int | None = 0
) -> Ended:
    """Runs a tool's command line in this process; any exit status will do if `status` is None."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            found = main([str(flag) for flag in flags]) or 0
        except SystemExit as error:
            found = error.code if isinstance(error.code, int) else 1
    ended = Ended(found, out.getvalue(), err.getvalue())
    assert status in (None, found), ended
    return ended


def fresh(tmp_path: Path) -> Path:
    """Returns a new directory, for an example of a test that has many."""
    return Path(tempfile.mkdtemp(dir=tmp_path))


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
    dtype: type[Any] = np.uint16,
    tokenizer: TokenizerRecord = TOKENIZER,
) -> Path:
    for name, documents in domains.items():
        write_dataset(directory / f"{name}_text_document", documents, dtype)
    records = {name: record(name, documents) for name, documents in domains.items()}
    DomainsFile(tokenizer, records).save(directory / "domains.json")
    return directory


def read_dataset(prefix: Path, dtype: type[Any] | None = None) -> list[Document]:
    dataset = IndexedDataset(str(prefix))
    assert dtype in (None, dataset.index.dtype)
    sequences = [dataset[number].tolist() for number in range(len(dataset))]
    bounds = dataset.document_indices.tolist()
    return [sequences[start:stop] for start, stop in itertools.pairwise(bounds)]


def overwrite(path: Path, place: int, value: bytes) -> None:
    """Damages a file at a place."""
    content = bytearray(path.read_bytes())
    content[place : place + len(value)] = value
    path.write_bytes(content)


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


def datasets(directory: Path) -> dict[str, bytes]:
    """The files of a directory but for `blend.txt`, which has the directory's own path."""
    return {name: content for name, content in files(directory).items() if name != "blend.txt"}
