"""Writes down the samples whose loss is far above the running mean, or not finite.

Megatron's `--check-for-spiky-loss` looks at the summed loss of a micro-batch on its own rank, holds
it against ten times the largest of the first hundred, waits for the device each time, and can only
print the number. Here the losses stay on the device until the logging interval is over. The one
thing that is added to a step is an all-reduce of 12 bytes per sample, of the ranks with the loss.
"""

import json
import math
import os
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rw.integrations import groups
from megatron_rw.resilience.step_samples import Note, StepSamples, gather
from megatron_rw.reweighting import SampleSums, UnitSet, UnitSums

_DECAY = 0.98  # Decay of the running mean over steps, in which about the last fifty count.
# How many samples of a rank's step are written, those with the largest loss first. In a run that
# diverges every sample would be one.
_MOST = 16


@dataclass(frozen=True)
class _Step:
    """One step of this rank, with its losses on the device."""

    iteration: int
    notes: list[Note]
    losses: Tensor  # Over all of a sample's tokens, `[M, b]`.
    chosen: Tensor  # The samples to be written, `[M, b]` bool.
    mean: Tensor  # Over the samples of all ranks, a scalar.
    running: Tensor  # Mean of the steps before, a scalar; not finite in the first step.


class SpikeLog:
    """Writes `spikes.jsonl` in the folder of logs. Collective: every rank calls every method."""

    def __init__(self, factor: float, log_dir: str, samples: StepSamples) -> None:
        self._factor = factor
        self._path = os.path.join(log_dir, "spikes.jsonl")
        self._samples = samples
        self._running: Tensor | None = None
        self._steps: list[_Step] = []

    @torch.no_grad()
    def end_step(self, iteration: int) -> None:
        """Looks at the step that has ended, without waiting for the device."""
        notes = self._samples.notes
        if not notes:
            return
        sums = SampleSums(*map(torch.cat, zip(*(note.sums for note in notes), strict=True)))
        ranks = groups.data_parallel_ranks()
        start = ranks.dp_rank * len(sums.tokens)
        own = slice(start, start + len(sums.tokens))
        gathered = UnitSums(*sums, domain=torch.zeros_like(sums.tokens)).begin_gather(ranks)()
        every = UnitSet.of(gathered, by_tokens=False, local=own)
        used = every.has_tokens
        mean = torch.where(used, every.losses, 0.0).sum() / used.sum().clamp(min=1)
        running = torch.full_like(mean, torch.nan) if self._running is None else self._running
        limit = torch.where(running.isfinite(), self._factor * running, torch.inf)
        above = used & ~(every.losses.isfinite() & (every.losses <= limit))
        shape = (len(notes), -1)
        losses, chosen = every.losses[every.local].view(shape), above[every.local].view(shape)
        self._steps.append(_Step(iteration, notes, losses, chosen, mean, running))
        # A spike counts in the mean with no more than the limit, and a NaN does not count.
        seen = torch.where(mean.isfinite(), torch.minimum(mean, limit), running)
        self._running = torch.where(
            running.isfinite(), _DECAY * running + (1 - _DECAY) * seen, seen
        )

    def flush(self) -> None:
        """Writes the spikes of the steps since the last call; waits for the device."""
        steps, self._steps = self._steps, []
        found = torch.zeros((), dtype=torch.int, device=groups.device())
        for step in steps:
            found += step.chosen.any()
        if dist.get_world_size() > 1:
            dist.all_reduce(found, op=dist.ReduceOp.MAX)
        if not found.item():
            return
        mine: list[dict[str, Any]] = []
        if groups.data_parallel_ranks().cp_rank == 0:
            mine = [record for step in steps for record in self._records(step)]
        records = [record for part in gather(mine) for record in part]
        if dist.get_rank() == 0:
            records.sort(key=lambda record: (record["iteration"], record["rank"]))
            with open(self._path, "a") as file:
                file.writelines(json.dumps(record, allow_nan=False) + "\n" for record in records)

    def _records(self, step: _Step) -> list[dict[str, Any]]:
        found = self._samples.named(step.chosen, step.losses, step.notes)
        found.sort(
            key=lambda sample: sample.loss if math.isfinite(sample.loss) else math.inf,
            reverse=True,
        )
        shared = {
            "iteration": step.iteration,
            "rank": dist.get_rank(),
            "time": time.time(),
            "step_loss": _finite(step.mean.item()),
            "running_loss": _finite(step.running.item()),
            "left_out": max(0, len(found) - _MOST),
        }
        return [
            shared | asdict(sample) | {"loss": _finite(sample.loss)} for sample in found[:_MOST]
        ]


def _finite(value: float) -> float | None:
    """Returns a number as JSON can hold it, which has none that is not finite."""
    return value if math.isfinite(value) else None
