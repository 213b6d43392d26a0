"""How documents are cut into rows, and rows are put together into micro-batches.

All of it follows from the index and the flags, and nothing from the number of ranks. Every
micro-batch of a run therefore has the same rows and the same shape wherever it is computed, which
makes the losses the same to the last bit.

A row is of one document. Several in a row would need a mask between them, which not every
attention of Megatron takes as it is; rows of several lengths cost less than padding and are exact
with all of them.
"""

import dataclasses
import os
from argparse import Namespace
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from megatron_rw.data.indexed.documents import DatasetReader
from megatron_rw.data.indexed.domains import domain_names
from megatron_rw.data.indexed.pair import bin_path
from megatron_rw.errors import UserError
from megatron_rw.resilience.folder import CheckpointFolder
from megatron_rw.resilience.resuming import SHAPING
from megatron_rw.scoring.command import ScoreConfig
from megatron_rw.training.refusals.data import data_prefixes, tokenizer_record

_VERSION = 1
_DEFINITION = (
    "token_losses[i] = -ln p(token i of the .bin | the tokens before it in its document, as many "
    "as its row holds), nats; NaN for the first token of a document"
)
# Arguments that do not change a row's shape, but the last bits of its losses.
_PRECISION = (
    *("bf16", "fp16", "fp8", "fp4", "transformer_impl", "attention_backend"),
    *("tensor_model_parallel_size", "fused_linear_cross_entropy", "logits_budget_mib"),
)
SHORTEST_ROW = 64  # Shorter rows than this are not worth a shape of their own.


@dataclass(frozen=True)
class MicroBatch:
    """Rows of one shape."""

    length: int  # Tokens of a row, padding included.
    # int64 [rows, 3]: the index of the row's first token in the block; how many of its predictions
    # do not count, because the row before makes them with more context; how many it makes, those
    # included. A row that makes none is padding.
    rows: NDArray[np.int64]

    def empty(self) -> Self:
        """Returns one of the same shape, all padding."""
        return dataclasses.replace(self, rows=np.zeros_like(self.rows))


@dataclass(frozen=True)
class Plan:
    """How documents are cut into rows, and rows are put together; `scores.json` has its fields."""

    seq_length: int  # Most tokens of a row.
    # Tokens from one row of a document to the next; those between it and `seq_length` are read
    # again as context.
    stride: int
    # Rows of `seq_length` in a micro-batch; of shorter rows as many more as have the same number of
    # tokens.
    micro_batch_size: int
    lengths: list[int]  # Lengths that rows are padded to, descending, `seq_length` first.
    block_tokens: int  # Most tokens of a block, unless it is a single document.

    def micro_batches(self, lengths: NDArray[np.int64]) -> list[MicroBatch]:
        """Returns the micro-batches of a block's documents, the longest rows first."""
        rows = _rows(lengths, self.seq_length, self.stride)
        predictions, batches, longer = rows[:, 2], [], np.zeros(len(rows), bool)
        for length, shorter in zip(self.lengths, [*self.lengths[1:], 0], strict=True):
            fit = rows[~longer & (predictions > shorter)]
            longer |= predictions > shorter
            size = self.micro_batch_size * (self.seq_length // length)
            for at in range(0, len(fit), size):
                part = np.zeros((size, 3), np.int64)
                part[: len(fit[at : at + size])] = fit[at : at + size]
                batches.append(MicroBatch(length, part))
        return batches


def plan_of(config: ScoreConfig, args: Namespace) -> Plan:
    """Returns how datasets are cut, by the flags alone."""
    # Ranks that exchange tokens of experts have to go through the same shapes in step.
    one_shape = args.expert_model_parallel_size > 1 or args.tp_comm_overlap
    lengths = row_lengths(args.seq_length, args.tensor_model_parallel_size)
    return Plan(
        seq_length=args.seq_length,
        stride=config.score_stride or args.seq_length,
        micro_batch_size=args.eval_micro_batch_size,
        lengths=lengths[:1] if one_shape else lengths,
        block_tokens=config.block_tokens,
    )


def row_lengths(seq_length: int, divisor: int) -> list[int]:
    """Returns the lengths that rows are padded to, halved as long as `divisor` divides them."""
    lengths = [seq_length]
    while lengths[-1] % (2 * divisor) == 0 and lengths[-1] // 2 >= SHORTEST_ROW:
        lengths.append(lengths[-1] // 2)
    return lengths


def _rows(lengths: NDArray[np.int64], seq_length: int, stride: int) -> NDArray[np.int64]:
    """Returns the rows of a block's documents, in order; see `MicroBatch.rows`."""
    predictions = np.maximum(lengths - 1, 0)
    # Of a document that fits there is one row, of a document without predictions none.
    counts = np.maximum(0, predictions - seq_length + stride - 1) // stride + (predictions > 0)
    document = np.repeat(np.arange(len(lengths)), counts)
    number = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = np.cumsum(lengths) - lengths
    return np.stack(
        [
            starts[document] + number * stride,
            np.where(number == 0, 0, seq_length - stride),
            np.minimum(seq_length, predictions[document] - number * stride),
        ],
        axis=1,
    )


def describe(args: Namespace, plan: Plan) -> dict[str, Any]:
    """Returns all that decides the scores, as `scores.json` has it: equal runs have equal records.

    It is called on the rank that looked at the data, with arguments that have `data_fingerprints`.
    Raises a `UserError` if two datasets have the same file name, or one cannot be read.
    """
    prefixes = [os.path.abspath(prefix) for prefix in data_prefixes(args)]
    datasets: dict[str, dict[str, Any]] = {}
    for prefix, domain in zip(prefixes, domain_names(prefixes), strict=True):
        name = os.path.basename(prefix)
        if name in datasets:
            raise UserError(
                f"--data-path {datasets[name]['path']} and {prefix} have the same file name, by "
                "which their scores are named: score one of them into another --score-dir."
            )
        with DatasetReader(Path(prefix)) as reader:
            if reader.tokens == 0:
                raise UserError(f"{bin_path(prefix)}: holds no tokens; leave the dataset out")
            datasets[name] = {
                "path": prefix,
                "domain": domain,
                "fingerprint": args.data_fingerprints[prefix],
                # What GPTDataset takes for documents.
                "documents": reader.documents,
                "tokens": reader.tokens,
            }
    return {
        "version": _VERSION,
        "definition": _DEFINITION,
        "checkpoint": {
            "path": os.path.abspath(args.load),
            "iteration": _iteration(args.load, args.ckpt_step),
        },
        "model": {name: _plain(getattr(args, name)) for name in SHAPING},
        "tokenizer": tokenizer_record(args),
        "precision": {name: _plain(getattr(args, name)) for name in _PRECISION},
        "rows": dataclasses.asdict(plan),
        "datasets": datasets,
    }


def _iteration(load: str, ckpt_step: int | None) -> int | str | None:
    if "://" in load:
        return ckpt_step or None
    folder = CheckpointFolder(load)
    return "release" if folder.is_release() else ckpt_step or folder.tracked()


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.name
    return value if isinstance(value, str | int | float | None) else str(value)
