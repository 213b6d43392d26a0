"""Calls the callbacks, from functions around those of Megatron's training loop."""

from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import Any

from megatron_rw.resilience.step_guard import NonFiniteExit
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

    def _each(self, event: Callable[..., None], *args: Any) -> None:
        for callback in self._callbacks:
            getattr(callback, event.__name__)(*args)

    def initialize_megatron(self, proceed: Proceed, call: Call) -> Any:
        """Makes the process groups."""
        self._each(Callback.on_start)
        result = proceed()
        self._each(Callback.on_process_groups)
        return result

    def build_data_iterators(self, proceed: Proceed, call: Call) -> Any:
        """Builds the data, which is what `pretrain` does first once the checkpoint is loaded."""
        self._each(Callback.on_loaded)
        return proceed()

    def train_step(self, proceed: Proceed, call: Call) -> Any:
        """Runs a step: forward and backward passes, and the optimizer."""
        step = Step(call["iteration"], call["model"])
        self._each(Callback.before_step, step)
        try:
            result = proceed()
        except NonFiniteExit:
            self._each(Callback.on_failed_step, step)
            raise
        _, skipped, _, exits, *_ = result
        step.skipped, step.exits = bool(skipped), bool(exits)
        self._each(Callback.after_step, step)
        return result

    def training_log(self, proceed: Proceed, call: Call) -> Any:
        """Prints the log line, at the end of an interval."""
        iteration = call["iteration"]
        # Megatron prints one more line after the first step of a run, and begins no new interval.
        ends_interval = iteration % self._args.log_interval == 0
        prints = ends_interval or call["is_first_iteration"]
        log = LogEvent(iteration, prints, ends_interval, call)
        self._each(Callback.before_log, log)
        result = proceed()
        self._each(Callback.on_log, log)
        return result

    def evaluate(self, proceed: Proceed, call: Call) -> Any:
        """Evaluates, and prints the losses."""
        result = proceed()
        self._each(Callback.on_evaluation, call)
        return result

    def saved(self, iteration: int) -> None:
        """Notes a complete checkpoint."""
        self._each(Callback.on_saved, iteration)
