"""Where in the losses a model learns: what validation samples lost since they were last seen."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import mpu
from numpy.typing import NDArray
from torch import Tensor

from megatron_rw.reweighting import SampleSums

_GROUPS = 10


@dataclass(frozen=True)
class ProgressReport:
    """Progress, the earlier loss minus the present one, of samples that an evaluation saw again."""

    samples: int
    correlation: float  # Of the earlier loss and the progress; NaN where either is constant.
    by_decile: list[float]  # Mean progress by decile of the earlier loss, the lowest first.


class SampleProgress:
    """Keeps the last loss of every validation sample, 16 bytes each, on the rank that drew it."""

    def __init__(self) -> None:
        self._notes: list[tuple[Tensor, SampleSums]] = []
        self._keys, self._losses = np.zeros(0, np.int64), np.zeros(0)

    def note(self, sums: SampleSums, places: Tensor | None) -> None:
        """Notes a micro-batch; `places` are as in `resilience.step_samples.Note`."""
        if places is not None:
            self._notes.append((places, sums))

    def forget(self) -> None:
        """Forgets the present evaluation."""
        self._notes.clear()

    def read(self) -> ProgressReport | None:
        """Ends an evaluation; None where fewer than ten samples were seen before.

        Collective over the ranks that have the loss; waits for the device.
        """
        found = self._end()
        if mpu.get_context_parallel_rank() > 0:
            # The others have the same samples.
            found = found[:, :0]
        group = mpu.get_tensor_and_data_parallel_group(with_context_parallel=True)
        parts: list[NDArray[np.float64] | None] = [None] * group.size()
        dist.all_gather_object(parts, found, group=group)
        earlier, now = np.concatenate([part for part in parts if part is not None], axis=1)
        return report_of(earlier, now) if earlier.size >= _GROUPS else None

    def _end(self) -> NDArray[np.float64]:
        """Returns earlier and present losses, `[2, n]`, of this rank's samples seen again."""
        if not self._notes:
            return np.zeros((2, 0))
        table = torch.cat([torch.stack(sums) for _, sums in self._notes], dim=1).float()
        if mpu.get_context_parallel_world_size() > 1:
            dist.all_reduce(table, group=mpu.get_context_parallel_group())
        loss_sum, tokens = table.double().cpu().numpy()
        places = torch.cat([places for places, _ in self._notes]).numpy()
        self._notes.clear()
        counts = (tokens > 0) & np.isfinite(loss_sum)
        losses = loss_sum[counts] / tokens[counts]
        # The member of the blend, and the sample within it.
        keys, first = np.unique((places[:, 1] << 40 | places[:, 2])[counts], return_index=True)
        losses = losses[first]
        _, old, new = np.intersect1d(self._keys, keys, assume_unique=True, return_indices=True)
        found = np.stack([self._losses[old], losses[new]])
        merged = np.concatenate([losses, self._losses])
        self._keys, first = np.unique(np.concatenate([keys, self._keys]), return_index=True)
        self._losses = merged[first]
        return found


def report_of(earlier: NDArray[np.float64], now: NDArray[np.float64]) -> ProgressReport:
    """Returns the report on ten or more samples, whose losses are `[n]`."""
    progress = earlier - now
    with np.errstate(invalid="ignore", divide="ignore"):
        correlation = float(np.corrcoef(earlier, progress)[0, 1])
    deciles = np.array_split(progress[np.argsort(earlier, kind="stable")], _GROUPS)
    return ProgressReport(earlier.size, correlation, [float(part.mean()) for part in deciles])
