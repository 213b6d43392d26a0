"""The samples of the training step under way: their losses, and where in the data they are from.

Losses stay on the device, places on the host: noting a micro-batch waits for nothing, and a sample
is named only once something is wrong with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rw.reweighting import SampleSums


@dataclass(frozen=True)
class Note:
    """One micro-batch of this rank, which is on the last pipeline stage.

    Attributes:
        sums: `[b]` each, without gradient, over this rank's tokens.
        domain: `[b]` int64; None where there is one domain alone.
        places: `[b, 3]` int64 on the host: position in the order of training, member of the blend,
            sample within that member. None on ranks that draw no data.
    """

    sums: SampleSums
    domain: Tensor | None
    places: Tensor | None


@dataclass(frozen=True)
class Sample:
    """One sample, in plain values.

    Attributes:
        micro_batch: of its rank's step, from 0.
        loss: nats per token.
        position: the how-manieth sample of the training data, from 0.
        dataset: prefix of the files that it is from.
        index: the how-manieth of that dataset's samples, in the order that Megatron shuffled.
        domain: of the dataset.
    """

    micro_batch: int
    loss: float
    position: int
    dataset: str
    index: int
    domain: str

    def __str__(self) -> str:
        """For people."""
        return (
            f"micro-batch {self.micro_batch}: sample {self.position} (no. {self.index} of "
            f"{self.dataset}, domain {self.domain}), loss {self.loss:g}"
        )


class StepSamples:
    """Notes of the step under way.

    Args:
        members: path and domain of every member of the training blend; none for mock data.

    Attributes:
        notes: by micro-batch; empty on ranks without the loss.
    """

    def __init__(self, members: Sequence[tuple[str, str]]) -> None:
        self._members = members
        self.notes: list[Note] = []

    def begin(self) -> None:
        """A pass over the step's micro-batches begins."""
        self.notes = []

    def note(self, sums: SampleSums, domain: Tensor | None, places: Tensor | None) -> None:
        """Take note of a micro-batch; no host synchronisation. Arguments as in `Note`."""
        detached = SampleSums(sums.loss_sum.detach(), sums.tokens.detach())
        self.notes.append(Note(detached, domain, places))

    def nonfinite(self) -> Tensor | None:
        """`[M, b]` bool on the device, of this rank's samples; None without a note."""
        if not self.notes:
            return None
        return ~torch.isfinite(torch.stack([note.sums.loss_sum for note in self.notes]))

    def losses(self) -> Tensor:
        """`[M, b]` on the device, nats per token, over this rank's tokens."""
        sums = [note.sums for note in self.notes]
        return torch.stack([loss_sum / tokens.clamp(min=1.0) for loss_sum, tokens in sums])

    def named(
        self, chosen: Tensor, losses: Tensor, notes: Sequence[Note] | None = None
    ) -> list[Sample]:
        """Name samples; waits for the device.

        Args:
            chosen: `[M, b]` bool.
            losses: `[M, b]`.
            notes: of their step; of the one under way when None.

        Returns:
            In order; nothing on a rank that draws no data, as another one has the same samples.
        """
        found = []
        for micro_batch, row in chosen.nonzero().tolist():
            places = (self.notes if notes is None else notes)[micro_batch].places
            if places is not None:
                loss = float(losses[micro_batch, row])
                found.append(self._sample(micro_batch, loss, places[row].tolist()))
        return found

    def positions(self) -> list[int]:
        """Of all samples, where they are known."""
        places = [note.places for note in self.notes if note.places is not None]
        return torch.cat(places)[:, 0].tolist() if places else []

    def _sample(self, micro_batch: int, loss: float, place: Sequence[int]) -> Sample:
        position, member, index = place
        path, domain = self._members[member] if self._members else ("mock data", "all")
        return Sample(micro_batch, loss, position, path, index, domain)
