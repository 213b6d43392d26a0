"""Notes how far this rank is, for the watchdog and error messages."""

from argparse import Namespace

from megatron_rw.resilience.watchdog import Progress, Rendezvous, watch
from megatron_rw.training.callbacks.base import Callback, Step


class ProgressCallback(Callback):
    """Notes what this rank does, and starts the watchdog once the ranks have met."""

    def __init__(self, args: Namespace, progress: Progress) -> None:
        self._args = args
        self._progress = progress
        self._rendezvous = Rendezvous(args.distributed_timeout_minutes)

    def on_start(self) -> None:
        """Begins to wait for the other ranks."""
        self._rendezvous.begin()

    def on_process_groups(self) -> None:
        """Starts the watchdog."""
        self._rendezvous.end()
        watch(self._args, self._progress)

    def before_step(self, step: Step) -> None:
        """Notes the iteration."""
        self._progress.begin(step.iteration, "the step's begin")

    def before_batch(self) -> None:
        """Notes that data is read. Scoring and evaluations have micro-batches and no steps."""
        self._progress.then("reading a micro-batch")

    def before_forward(self) -> None:
        """Notes that the model runs."""
        self._progress.then("a micro-batch")

    def after_passes(self) -> None:
        """Notes that all micro-batches are done."""
        self._progress.then("the optimizer's step")

    def after_step(self, step: Step) -> None:
        """Notes that the step is done."""
        self._progress.then("logging, evaluating or saving")
