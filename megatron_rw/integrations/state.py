"""The reweighting state that a checkpoint carries, whatever its format and parallel layout."""

from __future__ import annotations

import dataclasses
from argparse import Namespace
from typing import Any

from torch import Tensor

from megatron_rw.reweighting import ConfigError, ReweightConfig
from megatron_rw.reweighting.config import flag

_KEY = "reweight_state"


class ReweightState:
    """Where the warm-up began, and the moments that the next step will use.

    The same on every rank. The warm-up so does not depend on the run's age.

    Args:
        config: the reweighting settings.

    Attributes:
        record: what a checkpoint holds: `first_iteration` (int or None) and `moments` (`[2]` fp64
            tensor, or None outside the scope `deferred`).
    """

    def __init__(self, config: ReweightConfig) -> None:
        self._config = config
        self.record: dict[str, Any] = {"first_iteration": None, "moments": None}

    def keep_in(self, args: Namespace) -> None:
        """Let the state ride in Megatron's argument record.

        Every checkpoint format saves the record whole from one rank, and `load_checkpoint` hands it
        to `check_checkpoint_args` (not on --finetune, which starts anew).
        """
        setattr(args, _KEY, self.record)

    def begin(self, iteration: int) -> int:
        """Note that a training step runs; the first one is where reweighting begins.

        Args:
            iteration: completed iterations of the run.

        Returns:
            Completed steps of reweighted training, 0 in the first.
        """
        if self._config.enabled and self.record["first_iteration"] is None:
            self.record["first_iteration"] = iteration
        return self.step(iteration)

    def step(self, iteration: int) -> int:
        """Completed steps of reweighted training, 0 before and in the first."""
        first = self.record["first_iteration"]
        return 0 if first is None else iteration - first

    @property
    def moments(self) -> Tensor | None:
        """`[2]` fp64, the range that the next step will use; None before the first."""
        return self.record["moments"]

    @moments.setter
    def moments(self, value: Tensor) -> None:
        self.record["moments"] = value

    def load(self, record: dict[str, Any]) -> None:
        """Take over what `record` was when a checkpoint was saved.

        Raises:
            ConfigError: it is not such a record.
        """
        if record.keys() != self.record.keys():
            raise ConfigError(
                f"the checkpoint's reweighting state holds {sorted(record)}, expected "
                f"{sorted(self.record)}: it was saved by another version."
            )
        self.record.update(record)

    def resume(self, checkpoint_args: Namespace) -> list[str]:
        """Take the state from a checkpoint's argument record.

        Args:
            checkpoint_args: one of Megatron's own has no state.

        Returns:
            Lines for the user on what differs from the run that saved it.
        """
        before = {
            field.name: getattr(checkpoint_args, f"reweight_{field.name}", field.default)
            for field in dataclasses.fields(ReweightConfig)
            if field.name != "log_samples"
        }
        if before["strategy"] == "none" and not self._config.enabled:
            return []
        saved = getattr(checkpoint_args, _KEY, None)
        if self._config.enabled and saved is not None:
            self.load(saved)
        lines = [
            f"{flag(name)} was {value} when the checkpoint was saved and is "
            f"{getattr(self._config, name)} now"
            for name, value in before.items()
            if value != getattr(self._config, name)
        ]
        if self._config.enabled and self.record["first_iteration"] is None:
            lines.append("reweighting begins with this run, its warm-up included")
        elif self._config.scope == "deferred" and self.moments is None:
            lines.append("the checkpoint has no range of losses: the first step weighs all alike")
        return lines
