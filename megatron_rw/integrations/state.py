"""The reweighting state in a checkpoint, whose format and parallel layout do not matter."""

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
    """Where the warm-up began, and the plan that the next step will use.

    It is the same on every rank. Warm-up counts from the first reweighted step, so a baseline
    checkpoint can be continued.
    """

    def __init__(self, config: ReweightConfig) -> None:
        self._config = config
        self._first_iteration: int | None = None
        # `[5]` fp64, the plan that the next step will use, see `megatron_rw.kernels.Plan`; None
        # before the first step, and outside the scope `deferred`.
        self.plan: Tensor | None = None

    def record(self) -> dict[str, Any]:
        """Returns what a checkpoint holds, in plain numbers. Waits for the device."""
        return {
            "first_iteration": self._first_iteration,
            "moments": None if self.plan is None else self.plan.tolist(),
            "settings": self._settings(),
        }

    def _settings(self) -> dict[str, Any]:
        settings = dataclasses.asdict(self._config)
        # These settings have no influence on training.
        for name in ("log_samples", "gradient_interval", "dump_samples"):
            del settings[name]
        return settings

    def keep_in(self, args: Namespace) -> None:
        """Puts the record into Megatron's arguments, before they are saved.

        Every checkpoint format saves the arguments as a whole from one rank, and `load_checkpoint`
        passes them to `check_checkpoint_args` (not with --finetune, which starts a new run). They
        may hold no tensor, because Megatron broadcasts and compares them as Python objects.
        """
        setattr(args, _KEY, self.record())

    def begin(self, iteration: int) -> int:
        """Begins a training step, and returns the completed steps of reweighted training.

        Reweighting begins with the first call. `iteration` counts the run's completed iterations.
        """
        if self._config.enabled and self._first_iteration is None:
            self._first_iteration = iteration
        return self.step(iteration)

    def step(self, iteration: int) -> int:
        """Returns the completed steps of reweighted training, 0 before and in the first."""
        first = self._first_iteration
        return 0 if first is None else iteration - first

    def load(self, record: dict[str, Any]) -> None:
        """Takes over the `record()` of a checkpoint."""
        expected = self.record().keys()
        if record.keys() != expected:
            raise UserError(
                f"the checkpoint's reweighting state holds {sorted(record)}, expected "
                f"{sorted(expected)}: it was saved by another version."
            )
        self._first_iteration = record["first_iteration"]
        moments = record["moments"]
        if moments is not None and len(moments) == 2:
            # Of a version whose plan was the range alone; the rest was not in use then.
            moments = [*moments, 1.0, 0.0, 0.0]
        self.plan = None if moments is None else torch.tensor(moments, dtype=torch.float64)

    def resume(self, checkpoint_args: Namespace) -> list[str]:
        """Takes the state out of a checkpoint's arguments; plain Megatron's hold none.

        Returns lines for the user on what differs from the run that saved the checkpoint.
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
        elif self._config.scope == "deferred" and self.plan is None:
            lines.append("the checkpoint has no range of signals: the first step weighs all alike")
        return lines
