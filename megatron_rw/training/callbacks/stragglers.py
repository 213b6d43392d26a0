"""The slowest rank of each logging interval (`--log-slowest-rank`)."""

from __future__ import annotations

import dataclasses

from megatron.core import mpu
from megatron.training import print_rank_last

from megatron_rw.observability.stragglers import ForwardTimes, event_maker
from megatron_rw.platform import Device
from megatron_rw.training.callbacks.base import Callback, LogEvent


class StragglerCallback(Callback):
    """Times the forward passes of training, and names the slowest rank."""

    def __init__(self, device: Device) -> None:
        self._times = ForwardTimes(event_maker(device))

    def before_batch(self, training: bool) -> None:
        """Begins to time a pass, reading its micro-batch included."""
        if training:
            self._times.begin()

    def after_forward(self, training: bool) -> None:
        """Ends the time of the pass."""
        if training:
            self._times.end()

    def on_log(self, log: LogEvent) -> None:
        """Compares the ranks. Collective at the end of an interval."""
        if not log.ends_interval:
            return
        slowest = self._times.read(mpu.get_pipeline_model_parallel_rank())
        if slowest is None:
            return
        print_rank_last(f" {slowest}, up to iteration {log.iteration}")
        log.record["slowest_rank"] = dataclasses.asdict(slowest)
        log.scalars["slowest rank/rank"] = slowest.rank
        log.scalars["slowest rank/ratio"] = slowest.ratio
