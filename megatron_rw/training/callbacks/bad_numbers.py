"""Handles losses and gradients that are not finite, and losses far above the mean."""

from argparse import Namespace

from megatron_rw.resilience.spikes import SpikeLog
from megatron_rw.resilience.step_guard import StepGuard
from megatron_rw.training.callbacks.base import Callback, LogEvent, Step


class NonFiniteCallback(Callback):
    """Runs the guard against numbers that are not finite, which decides on each step."""

    def __init__(self, guard: StepGuard) -> None:
        self._guard = guard

    def before_step(self, step: Step) -> None:
        """Forgets the step before."""
        self._guard.begin(step.iteration + 1, step.model)

    def after_step(self, step: Step) -> None:
        """Explains the numbers if Megatron is about to end the run. Collective in that case."""
        if step.exits:
            self._guard.explain()

    def on_log(self, log: LogEvent) -> None:
        """Counts the skipped steps of the interval."""
        if not self._guard.skips:
            return
        log.record["skipped_steps"] = self._guard.skipped
        log.scalars["non-finite/skipped steps"] = float(self._guard.skipped)
        if log.ends_interval:
            self._guard.skipped = 0


class SpikeCallback(Callback):
    """Writes samples whose loss is far above the mean to spikes.jsonl (`--loss-spike-factor`)."""

    def __init__(self, args: Namespace, log: SpikeLog) -> None:
        self._args = args
        self._log = log

    def after_step(self, step: Step) -> None:
        """Compares the step's losses with the running mean. Collective."""
        self._log.end_step(step.iteration + 1)
        if step.exits:
            self._log.flush()

    def on_failed_step(self, step: Step) -> None:
        """Writes what is known before the run ends."""
        self._log.end_step(step.iteration + 1)
        self._log.flush()

    def before_log(self, log: LogEvent) -> None:
        """Writes the interval's samples, at a point where Megatron waits for the device anyway."""
        if log.ends_interval or log.iteration == self._args.train_iters:
            self._log.flush()
