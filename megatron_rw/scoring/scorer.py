"""The model over the rows of a block: token losses, gathered on the rank that writes."""

import dataclasses
import itertools
from argparse import Namespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import mpu
from megatron.core.pipeline_parallel import get_forward_backward_func
from numpy.typing import NDArray
from torch import Tensor

from megatron_rw.data.indexed.documents import DatasetReader, DocumentBlock
from megatron_rw.data.indexed.pair import bin_path
from megatron_rw.errors import UserError
from megatron_rw.integrations.groups import device, has_loss
from megatron_rw.integrations.schedule import run_forward_only
from megatron_rw.resilience.watchdog import Progress
from megatron_rw.scoring.plan import MicroBatch, Plan
from megatron_rw.training.batch import Batch, BatchReader
from megatron_rw.training.callbacks.progress import ProgressCallback
from megatron_rw.training.datasets import PLACE_KEY
from megatron_rw.training.forward_step import ForwardPass
from megatron_rw.training.loss import LossResult
from megatron_rw.training.settings import Settings


class Scorer:
    """Scores the blocks of datasets with the model's chunks, on all ranks together."""

    def __init__(
        self, settings: Settings, model: list[Any], plan: Plan, progress: Progress
    ) -> None:
        self._settings, self._args = settings, settings.megatron
        self._model, self._plan, self._progress = model, plan, progress
        self._callbacks = [ProgressCallback(self._args, progress)]
        self._passes: dict[int, ForwardPass] = {}
        self._collected: list[tuple[Tensor, Tensor]] = []
        for chunk in model:
            chunk.eval()

    def score(self, dataset: DatasetReader, block: DocumentBlock) -> NDArray[np.float32] | None:
        """Scores a block of a dataset, with each document by itself. Collective over all ranks.

        Returns, on the rank that writes (`writes`), the loss of each of the block's tokens in nats,
        0 where there is none; None elsewhere. A token id beyond the vocabulary is a `UserError`.
        """
        tokens = int(block.tokens.sum())
        # Each rank reads only what it scores.
        ids = np.memmap(bin_path(dataset.prefix), dataset.dtype, "r")[block.start :][:tokens]
        batches = self._plan.micro_batches(block.tokens)
        # Each data-parallel rank takes a stretch, so that it has few shapes.
        each = -(-len(batches) // mpu.get_data_parallel_world_size())
        first = mpu.get_data_parallel_rank() * each
        mine = batches[first : first + each]
        if self._args.expert_model_parallel_size > 1 and batches:
            # Experts are spread over these ranks, which therefore make the same calls.
            mine += [batches[0].empty()] * (each - len(mine))
        self._collected.clear()
        for length, group in itertools.groupby(mine, key=lambda batch: batch.length):
            self._forward(str(dataset.prefix), ids, length, list(group))
        return self._gather(tokens)

    def _forward(
        self, prefix: str, ids: NDArray[Any], length: int, batches: list[MicroBatch]
    ) -> None:
        """Calls the schedule once, on micro-batches of one shape."""
        args = self._args
        chunks = len(self._model)
        if chunks > 1:
            # Interleaved stages take as many micro-batches at a time as there are stages.
            batches += [batches[0].empty()] * (-len(batches) % args.pipeline_model_parallel_size)
        iterators = [
            (to_samples(prefix, ids, batch, args.padded_vocab_size) for batch in batches)
            for _ in range(chunks)
        ]
        call = {
            "forward_step_func": self._pass(length, len(batches[0].rows)),
            "data_iterator": iterators if chunks > 1 else iterators[0],
            "model": self._model,
            "num_microbatches": len(batches),
            "seq_length": length,
            "micro_batch_size": len(batches[0].rows),
        }
        run_forward_only(get_forward_backward_func(), call)

    def _pass(self, length: int, rows: int) -> ForwardPass:
        if length not in self._passes:
            shaped = {"seq_length": length, "eval_micro_batch_size": rows}
            args = Namespace(**(vars(self._args) | shaped))
            self._passes[length] = ForwardPass(
                dataclasses.replace(self._settings, megatron=args),
                BatchReader(args, num_domains=1),
                self._collect,
                self._callbacks,
            )
        return self._passes[length]

    def _collect(
        self, batch: Batch, token_losses: Tensor, *, model: Any, training: bool
    ) -> LossResult:
        """Keeps the losses, on the device where nothing waits for them; takes a loss's place."""
        if batch.places is not None:
            self._collected.append((batch.places, token_losses.float()))
        nothing = torch.zeros((), device=token_losses.device)
        return nothing, nothing.int(), {}

    def _gather(self, tokens: int) -> NDArray[np.float32] | None:
        self._progress.then("gathering the losses of a block")
        if not has_loss() or mpu.get_tensor_model_parallel_rank() != 0:
            return None
        block = np.zeros(tokens, np.float32)
        for places, losses in self._collected:
            rows = losses.cpu().numpy()
            for (start, skipped, made), row in zip(places.tolist(), rows, strict=True):
                # Each token is of one row: adding to 0 also makes one zero of both.
                block[start + 1 + skipped : start + 1 + made] += row[skipped:made]
        if tokens and mpu.get_data_parallel_world_size() > 1:
            # All but one add 0 to a token, so that the sum is exact.
            total = torch.from_numpy(block).to(device())
            group = mpu.get_data_parallel_group()
            dist.reduce(total, dst=dist.get_global_rank(group, 0), group=group)
            block = total.cpu().numpy()
        return block if writes() else None


def writes() -> bool:
    """Returns whether this is the one rank of the job that gets the losses and writes them."""
    ranks = (mpu.get_tensor_model_parallel_rank(), mpu.get_data_parallel_rank())
    return has_loss() and ranks == (0, 0)


def to_samples(
    prefix: str, ids: NDArray[Any], batch: MicroBatch, vocab_size: int
) -> dict[str, Tensor]:
    """Returns a micro-batch of a block's token ids as the data loader would give it.

    It has `tokens`, `labels`, `position_ids` int64 and `loss_mask` fp32, each [rows, length]; and
    the rows themselves, [rows, 3] int64, in the place of the samples' places.
    """
    shape = (len(batch.rows), batch.length)
    tokens, labels = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    mask = np.zeros(shape, np.float32)
    for row, (start, skipped, made) in enumerate(batch.rows):
        tokens[row, :made] = ids[start : start + made]
        labels[row, :made] = ids[start + 1 : start + 1 + made]
        mask[row, skipped:made] = 1.0
    largest = max(int(tokens.max()), int(labels.max()))
    if largest >= vocab_size:
        raise UserError(
            f"{bin_path(prefix)}: holds token id {largest}, but the model's vocabulary has "
            f"{vocab_size} entries; the data was made with another tokenizer",
            known_to_all=False,
        )
    positions = np.broadcast_to(np.arange(batch.length), shape).copy()
    return {
        "tokens": torch.from_numpy(tokens),
        "labels": torch.from_numpy(labels),
        "loss_mask": torch.from_numpy(mask),
        "position_ids": torch.from_numpy(positions),
        PLACE_KEY: torch.from_numpy(batch.rows),
    }
