"""Calls the callbacks, from functions around those of Megatron's training loop."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import Any

from megatron_rw.resilience.nonfinite import NonFiniteExit
from megatron_rw.training.callbacks.base import Callback, LogEvent, Step

Proceed = Callable[..., Any]
Call = dict[str, Any]


class TrainingLoop:
    """Calls callbacks, in order, around functions of `megatron.training.training`.

    Each method but `saved` is the `run` of a `patching.Around`, in the table of `patches.py`.
    """

    def __init__(self, args: Namespace, callbacks: Sequence[Callback]) -> None:
        self._args = args
        self._callbacks = callbacks

    def initialize_megatron(self, proceed: Proceed, call: Call) -> Any:
        """Makes the process groups."""
        for callback in self._callbacks:
            callback.on_start()
        result = proceed()
        for callback in self._callbacks:
            callback.on_process_groups()
        return result

    def build_data_iterators(self, proceed: Proceed, call: Call) -> Any:
        """Builds the data, which is what `pretrain` does first once the checkpoint is loaded."""
        for callback in self._callbacks:
            callback.on_loaded()
        return proceed()

    def train_step(self, proceed: Proceed, call: Call) -> Any:
        """Runs a step: forward and backward passes, and the optimizer."""
        step = Step(call["iteration"], call["model"])
        for callback in self._callbacks:
            callback.before_step(step)
        try:
            result = proceed()
        except NonFiniteExit:
            for callback in self._callbacks:
                callback.on_failed_step(step)
            raise
        _, skipped, _, exits, *_ = result
        step.skipped, step.exits = bool(skipped), bool(exits)
        for callback in self._callbacks:
            callback.after_step(step)
        return result

    def training_log(self, proceed: Proceed, call: Call) -> Any:
        """Prints the log line, at the end of an interval."""
        iteration = call["iteration"]
        # Megatron prints one more line after the first step of a run, and begins no new interval.
        ends_interval = iteration % self._args.log_interval == 0
        prints = ends_interval or call["is_first_iteration"]
        log = LogEvent(iteration, prints, ends_interval, call)
        for callback in self._callbacks:
            callback.before_log(log)
        result = proceed()
        for callback in self._callbacks:
            callback.on_log(log)
        return result

    def evaluate(self, proceed: Proceed, call: Call) -> Any:
        """Evaluates, and prints the losses."""
        result = proceed()
        for callback in self._callbacks:
            callback.on_evaluation(call)
        return result

    def saved(self, iteration: int) -> None:
        """Notes a complete checkpoint."""
        for callback in self._callbacks:
            callback.on_saved(iteration)
