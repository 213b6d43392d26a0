"""The samples of the current training step: their losses, and where in the data they are from.

Losses stay on the device and places on the host. Noting a micro-batch therefore waits for nothing,
and a sample is named only once something is wrong with it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rw.reweighting import SampleSums


@dataclass(frozen=True)
class Note:
    """One micro-batch of this rank, which is on the last pipeline stage."""

    sums: SampleSums  # Over this rank's tokens, `[b]` each, without gradient.
    domain: Tensor | None  # `[b]` int64; None if there is only one domain.
    # `[b, 3]` int64 on the host: index in training order, member of the blend, and sample within
    # that member. None on ranks that draw no data.
    places: Tensor | None


@dataclass(frozen=True)
class Sample:
    """One sample, in plain values; the loss is in nats per token."""

    micro_batch: int  # Index in its rank's step, from 0.
    loss: float
    position: int  # Index in training order, from 0.
    dataset: str  # Prefix of the dataset's files.
    index: int  # In that dataset, in the order that Megatron shuffled.
    domain: str

    def __str__(self) -> str:
        return (
            f"micro-batch {self.micro_batch}: sample {self.position} (no. {self.index} of "
            f"{self.dataset}, domain {self.domain}), loss {self.loss:g}"
        )


class StepSamples:
    """Notes the micro-batches of the current step."""

    def __init__(self, members: Sequence[tuple[str, str]]) -> None:
        # Path and domain of every member of the training blend; none for mock data.
        self._members = members
        self.notes: list[Note] = []  # By micro-batch; empty on ranks without the loss.

    def begin(self) -> None:
        """Forgets the notes; call it when a pass over a step's micro-batches begins."""
        self.notes = []

    def note(self, sums: SampleSums, domain: Tensor | None, places: Tensor | None) -> None:
        """Takes note of a micro-batch without waiting for the device. Arguments as in `Note`."""
        self.notes.append(Note(SampleSums(*map(Tensor.detach, sums)), domain, places))

    def nonfinite(self) -> Tensor | None:
        """Returns which losses are not finite, `[M, b]` bool on the device; None without a note."""
        if not self.notes:
            return None
        return ~torch.isfinite(torch.stack([note.sums.loss_sum for note in self.notes]))

    def losses(self) -> Tensor:
        """Returns the losses over this rank's tokens, `[M, b]` on the device, nats per token."""
        sums = [note.sums for note in self.notes]
        return torch.stack([loss_sum / tokens.clamp(min=1.0) for loss_sum, tokens in sums])

    def named(self, chosen: Tensor, losses: Tensor, notes: Sequence[Note]) -> list[Sample]:
        """Names the chosen samples, in order, of the step that has the notes.

        It waits for the device. `chosen` and `losses` are `[M, b]`. A rank that draws no data names
        none: another has the same samples.
        """
        found = []
        for micro_batch, row in chosen.nonzero().tolist():
            places = notes[micro_batch].places
            if places is not None:
                loss = float(losses[micro_batch, row])
                position, member, index = places[row].tolist()
                path, domain = self._members[member] if self._members else ("mock data", "all")
                found.append(Sample(micro_batch, loss, position, path, index, domain))
        return found

    def places(self) -> Tensor:
        """Returns the places of all samples, `[M·b, 3]` as in `Note`; `[0, 3]` if not known."""
        places = [note.places for note in self.notes if note.places is not None]
        return torch.cat(places) if places else torch.empty(0, 3, dtype=torch.long)

    def positions(self) -> list[int]:
        """Returns the indexes in training order of all samples, where they are known."""
        positions: list[int] = self.places()[:, 0].tolist()
        return positions


def gather(mine: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Returns the object of every rank of a group on each. It is slow, and not for every step."""
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, mine, group)
    return found
