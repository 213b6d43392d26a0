"""A training step, watched for bad numbers by `nonfinite` and `spikes`."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from typing import Any

from megatron_rw.resilience.nonfinite import NonFiniteExit, NonFiniteGuard, megatron_checks
from megatron_rw.resilience.spikes import SpikeLog
from megatron_rw.resilience.step_samples import StepSamples


class StepGuard:
    """Runs the guards that the arguments ask for around a step. Collective.

    Args:
        args: validated.
        samples: of the step under way.
    """

    def __init__(self, args: Namespace, samples: StepSamples) -> None:
        self._args = args
        self._samples = samples
        self._nonfinite: NonFiniteGuard | None = None
        self._spikes: SpikeLog | None = None
        if args.check_for_nan_in_loss_and_grad:
            self._nonfinite = NonFiniteGuard(args, samples)
        if args.loss_spike_factor is not None:
            self._spikes = SpikeLog(args, samples)

    def install(self) -> None:
        """Once per process."""
        if self._nonfinite is not None:
            self._nonfinite.install()

    def begin(self) -> None:
        """A pass over the step's micro-batches begins."""
        self._samples.begin()
        if self._nonfinite is not None:
            self._nonfinite.begin()

    def step(
        self, train_step: Callable[[], Any], model: list[Any], optimizer: Any, iteration: int
    ) -> Any:
        """Run a step.

        Args:
            train_step: Megatron's.
            model: its chunks.
            optimizer: its optimizer.
            iteration: as logged.

        Returns:
            What Megatron's returns.

        Raises:
            NonFiniteExit: on every rank; rank 0 has printed why.
        """
        if self._nonfinite is not None:
            self._nonfinite.watch(model, optimizer)
        try:
            result = train_step()
        except NonFiniteExit:
            self._note_spikes(iteration)
            self.flush()
            raise
        self._note_spikes(iteration)
        _, _, _, should_exit, *_ = result
        if should_exit and self._nonfinite is not None and megatron_checks(self._args):
            self._nonfinite.explain()
            self.flush()
        return result

    def _note_spikes(self, iteration: int) -> None:
        if self._spikes is not None:
            self._spikes.end_step(iteration)

    def flush(self) -> None:
        """Write the spikes since the last time; waits for the device."""
        if self._spikes is not None:
            self._spikes.flush()

    def counts(self) -> dict[str, int]:
        """Since `reset`, by name, of what the arguments allow to happen."""
        counts = {}
        if self._nonfinite is not None and self._args.on_nonfinite != "raise":
            counts["skipped steps"] = self._nonfinite.skipped
        return counts

    def reset(self) -> None:
        """Count anew."""
        if self._nonfinite is not None:
            self._nonfinite.reset()
