"""The points of the training loop at which a callback is called, in the order of a run."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Step:
    """A training step."""

    iteration: int  # Completed iterations before the step.
    model: list[Any]  # The model chunks of this rank.
    # Known in `after_step`: the optimizer took no step; Megatron will end the run now.
    skipped: bool = False
    exits: bool = False


@dataclass
class LogEvent:
    """Megatron's call of `training_log`, which follows every step.

    Megatron prints a line at the end of a logging interval, and after the first step of a run.
    """

    iteration: int  # Completed ones.
    prints: bool
    ends_interval: bool
    call: Mapping[str, Any]  # The arguments of `training_log` by name.
    record: dict[str, Any] = field(default_factory=dict)  # For the line of metrics.jsonl.
    scalars: dict[str, float] = field(default_factory=dict)  # For TensorBoard and W&B, by tag.

    @property
    def skipped(self) -> bool:
        """Whether the optimizer took no step."""
        return bool(self.call["skipped_iter"])


class Callback:
    """One concern of a run. Every method is called on every rank, and does nothing by default.

    A method may use collectives, except for those around a forward pass, which the ranks of a
    pipeline reach at different times.
    """

    def on_start(self) -> None:
        """Called before the process groups are made."""

    def on_process_groups(self) -> None:
        """Called when the process groups exist; no model is built yet."""

    def on_loaded(self) -> None:
        """Called when the checkpoint, if there is one, is loaded; no data is read yet."""

    def before_step(self, step: Step) -> None:
        """Called before Megatron's `train_step`."""

    def before_passes(self) -> None:
        """Called before the forward and backward passes of a step."""

    def before_batch(self) -> None:
        """Called before a micro-batch is read, of training or of an evaluation."""

    def before_forward(self) -> None:
        """Called when the micro-batch is read, before the model's forward pass."""

    def after_passes(self) -> None:
        """Called after the passes of a step, before the optimizer."""

    def after_step(self, step: Step) -> None:
        """Called after Megatron's `train_step`."""

    def on_failed_step(self, step: Step) -> None:
        """Called in place of `after_step` when a step ends the run on all ranks."""

    def before_log(self, log: LogEvent) -> None:
        """Called before Megatron prints."""

    def on_log(self, log: LogEvent) -> None:
        """Called after Megatron has printed."""

    def on_evaluation(self, call: Mapping[str, Any]) -> None:
        """Called after an evaluation, with the arguments of `evaluate_and_print_results`."""

    def on_saved(self, iteration: int) -> None:
        """Called when a checkpoint is complete."""
