"""Where the labels of a training sample are from, and what files say of them: weights and losses.

A sample of core's `GPTDataset` is a stretch of tokens over consecutive documents, in the order that
it has shuffled them to. What it takes for documents are the sequences of the `.idx`.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_rw.data.indexed.scores import score_path
from megatron_rw.reweighting import ReweightConfig

WEIGHTS_KEY, REFERENCE_KEY = "sample_weights", "reference"


@dataclass(frozen=True)
class Origin:
    """Where the labels of a sample are from, by position; padding at its end is left out."""

    documents: NDArray[np.int64]  # [labels], number in the `.idx`.
    offsets: NDArray[np.int64]  # [labels], place in the document, in tokens.

    def stretch(self, position: int) -> tuple[int, int, int]:
        """Returns the document of a label, its place in it, and how many of its labels follow.

        The label itself counts as one that follows.
        """
        document, offset = self.documents[position], self.offsets[position]
        ahead = np.arange(len(self.documents) - position)
        same = self.documents[position:] == document
        same &= self.offsets[position:] - offset == ahead
        return int(document), int(offset), int(same.sum())


def origin_of(dataset: Any, index: int) -> Origin:
    """Returns where the labels of a sample of a `GPTDataset` are from."""
    if dataset.shuffle_index is None:
        # Under --dataloader-defer-npy-index-mmap core maps its indexes when it reads a sample.
        dataset._query_document_sample_shuffle_indices(index)
    row = int(dataset.shuffle_index[index])
    (first, begin), (last, end) = dataset.sample_index[row : row + 2].tolist()
    documents = dataset.document_index[first : last + 1].astype(np.int64)
    stops = dataset.dataset.sequence_lengths[documents].astype(np.int64)
    starts = np.zeros_like(stops)
    starts[0], stops[-1] = begin, end + dataset.config.add_extra_token_to_sequence
    counts = stops - starts
    ends = np.cumsum(counts)
    offsets = np.arange(ends[-1]) - np.repeat(ends - stops, counts)
    # The first token is the label of none.
    return Origin(np.repeat(documents, counts)[1:], offsets[1:])


def weights_path(given: str, prefix: str) -> Path:
    """Returns the file of a dataset, of what `--reweight-sample-weights` was given."""
    return Path(given, f"{os.path.basename(prefix)}.npy") if os.path.isdir(given) else Path(given)


class TokenValues:
    """The static weight and the reference loss of every label, from memory-mapped files."""

    def __init__(self, config: ReweightConfig, prefixes: Sequence[str]) -> None:
        """Maps the files of the members of the training blend, which are known to be right."""
        weights, folders = config.sample_weights, config.reference_scores or []
        self._weights = [_mapped(weights_path(weights, p)) for p in prefixes] if weights else []
        self._scores = [
            [
                _mapped(score_path(Path(folder), os.path.basename(prefix), "token_losses"))
                for folder in folders
            ]
            for prefix in prefixes
        ]

    def of(self, dataset: Any, member: int, index: int) -> dict[str, NDArray[np.float32]]:
        """Returns what is asked for of a sample of a member, float32 `[s]` each, by key of a batch.

        Padding has weight 1 and no reference loss, which is NaN.
        """
        origin, size = origin_of(dataset, index), dataset.config.sequence_length
        found = {}
        if self._weights:
            found[WEIGHTS_KEY] = _padded(self._weights[member][origin.documents], size, 1.0)
        if self._scores[member]:
            file = dataset.dataset.index
            at = file.sequence_pointers[origin.documents] // file.dtype_size + origin.offsets
            losses = [scores[at] for scores in self._scores[member]]
            # Early minus late of two.
            reference = losses[0] - losses[1] if len(losses) > 1 else losses[0]
            found[REFERENCE_KEY] = _padded(reference, size, np.nan)
        return found


def _mapped(path: Path) -> NDArray[np.float32]:
    return np.lib.format.open_memmap(path, mode="r")


def _padded(values: NDArray[np.float32], size: int, value: float) -> NDArray[np.float32]:
    return np.pad(values, (0, size - len(values)), constant_values=value)
