"""The reweighting state that a checkpoint carries, whatever its format and parallel layout.

It rides in Megatron's argument record, which every checkpoint format saves whole from one rank
and hands to `check_checkpoint_args` on a resume (not on --finetune, which starts anew).
"""

from __future__ import annotations

import dataclasses
from argparse import Namespace

from megatron_rw.reweighting import ReweightConfig
from megatron_rw.reweighting.config import flag

_KEY = "reweight_state"


class ReweightState:
    """At which iteration reweighting began, so that its warm-up does not depend on the run's age.

    The same on every rank.

    Args:
        args: validated; the state is kept in it from here on.
        config: the reweighting settings.
    """

    def __init__(self, args: Namespace, config: ReweightConfig) -> None:
        self._config = config
        self._saved: dict[str, int | None] = {"first_iteration": None}
        setattr(args, _KEY, self._saved)

    def begin(self, iteration: int) -> None:
        """Note that a training step runs; the first one is where reweighting begins.

        Args:
            iteration: completed iterations of the run.
        """
        if self._config.enabled and self._saved["first_iteration"] is None:
            self._saved["first_iteration"] = iteration

    def step(self, iteration: int) -> int:
        """Completed steps of reweighted training, 0 in the first.

        Args:
            iteration: completed iterations of the run.
        """
        first = self._saved["first_iteration"]
        return 0 if first is None else iteration - first

    def resume(self, checkpoint_args: Namespace) -> list[str]:
        """Take the state from a checkpoint.

        Args:
            checkpoint_args: the argument record in it; one of Megatron's own has no state.

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
        if self._config.enabled:
            saved = getattr(checkpoint_args, _KEY, {"first_iteration": None})
            self._saved["first_iteration"] = saved["first_iteration"]
        lines = [
            f"{flag(name)} was {value} when the checkpoint was saved and is "
            f"{getattr(self._config, name)} now"
            for name, value in before.items()
            if value != getattr(self._config, name)
        ]
        if self._config.enabled and self._saved["first_iteration"] is None:
            lines.append("reweighting begins with this run, its warm-up included")
        return lines
