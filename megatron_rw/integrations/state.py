"""The reweighting state that a checkpoint carries, whatever its format and parallel layout."""

from __future__ import annotations

import dataclasses
from argparse import Namespace
from typing import Any

import torch
from torch import Tensor

from megatron_rw.errors import UserError
from megatron_rw.reweighting import ReweightConfig
from megatron_rw.reweighting.config import flag

_KEY = "reweight_state"


class ReweightState:
    """Where the warm-up began, and the moments that the next step will use.

    The same on every rank. The warm-up so does not depend on the run's age.

    Args:
        config: the reweighting settings.

    Attributes:
        moments: `[2]` fp64 on the device, the range that the next step will use; None before the
            first step, and outside the scope `deferred`.
    """

    def __init__(self, config: ReweightConfig) -> None:
        self._config = config
        self._first_iteration: int | None = None
        self.moments: Tensor | None = None

    def record(self) -> dict[str, Any]:
        """What a checkpoint holds, in plain numbers; waits for the device."""
        return {
            "first_iteration": self._first_iteration,
            "moments": None if self.moments is None else self.moments.tolist(),
            "settings": self._settings(),
        }

    def _settings(self) -> dict[str, Any]:
        settings = dataclasses.asdict(self._config)
        # Changes nothing of the training.
        del settings["log_samples"]
        return settings

    def keep_in(self, args: Namespace) -> None:
        """Put the record into Megatron's arguments, before they are saved.

        Every checkpoint format saves them whole from one rank, and `load_checkpoint` hands them
        to `check_checkpoint_args` (not on --finetune, which starts anew). No tensor may be in
        them: Megatron broadcasts and compares them as Python objects.
        """
        setattr(args, _KEY, self.record())

    def begin(self, iteration: int) -> int:
        """Note that a training step runs; the first one is where reweighting begins.

        Args:
            iteration: completed iterations of the run.

        Returns:
            Completed steps of reweighted training, 0 in the first.
        """
        if self._config.enabled and self._first_iteration is None:
            self._first_iteration = iteration
        return self.step(iteration)

    def step(self, iteration: int) -> int:
        """Completed steps of reweighted training, 0 before and in the first."""
        first = self._first_iteration
        return 0 if first is None else iteration - first

    def load(self, record: dict[str, Any]) -> None:
        """Take over what `record()` was when a checkpoint was saved.

        Raises:
            UserError: it is not such a record.
        """
        expected = self.record().keys()
        if record.keys() != expected:
            raise UserError(
                f"the checkpoint's reweighting state holds {sorted(record)}, expected "
                f"{sorted(expected)}: it was saved by another version."
            )
        self._first_iteration = record["first_iteration"]
        moments = record["moments"]
        self.moments = None if moments is None else torch.tensor(moments, dtype=torch.float64)

    def resume(self, checkpoint_args: Namespace) -> list[str]:
        """Take the state from a checkpoint's argument record.

        Args:
            checkpoint_args: one of Megatron's own has no state.

        Returns:
            Lines for the user on what differs from the run that saved it.
        """
        saved = getattr(checkpoint_args, _KEY, None)
        before = dataclasses.asdict(ReweightConfig()) | (saved["settings"] if saved else {})
        if before["strategy"] == "none" and not self._config.enabled:
            return []
        if self._config.enabled and saved is not None:
            self.load(saved)
        lines = [
            f"{flag(name)} was {before[name]} when the checkpoint was saved and is {value} now"
            for name, value in self._settings().items()
            if value != before[name]
        ]
        if self._config.enabled and self._first_iteration is None:
            lines.append("reweighting begins with this run, its warm-up included")
        elif self._config.scope == "deferred" and self.moments is None:
            lines.append("the checkpoint has no range of losses: the first step weighs all alike")
        return lines
