"""The weighted units of a rank's step, and those among them of highest and lowest weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class WeighedUnits:
    """Weighted units of a rank's step, in any order. The tensors are `[n]` each."""

    losses: Tensor  # Nats per token; NaN for a unit that does not compete.
    weights: Tensor  # Over what it would be without a strategy.
    rows: Tensor  # int64, the unit's sequence: micro-batch · b + row of the micro-batch.
    positions: Tensor  # int64, position of the unit's first label in the sequence.

    @torch.no_grad()
    def most(self, count: int, highest: bool) -> WeighedUnits:
        """Returns the units of highest or of lowest weight, without waiting for the device.

        They are at most `count`. Those that do not compete come last.
        """
        key = self.weights if highest else -self.weights
        key = torch.where(torch.isfinite(self.losses), key, -torch.inf)
        chosen = torch.topk(key, min(count, key.numel())).indices
        return WeighedUnits(*(values[chosen] for values in self._columns()))

    def read(self) -> list[tuple[float, float, int, int]]:
        """Returns loss, weight, row, position of units that compete. Waits for the device."""
        used = torch.isfinite(self.losses)
        columns = (values[used].tolist() for values in self._columns())
        return list(zip(*columns, strict=True))

    def _columns(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.losses, self.weights, self.rows, self.positions
