"""The weights, the losses by domain and the speed of each logging interval."""

from collections.abc import Mapping
from typing import Any

import torch
from megatron.core import mpu
from megatron.training import get_timers, print_rank_last

from megatron_rw.integrations.state import ReweightState
from megatron_rw.reweighting import ReweightReport
from megatron_rw.training.callbacks.base import Callback, LogEvent, Step
from megatron_rw.training.loss import PretrainLoss
from megatron_rw.training.reporting import Reporter
from megatron_rw.training.settings import Settings


class MetricsCallback(Callback):
    """Puts the weights on Megatron's log line, and writes the metrics of each logged step.

    It comes last of the callbacks, because it writes what the others leave in a `LogEvent`. The
    loss collects the metrics; the reporter writes them, and is None on ranks that write nothing.
    """

    def __init__(
        self,
        settings: Settings,
        state: ReweightState,
        loss: PretrainLoss,
        reporter: Reporter | None,
    ) -> None:
        self._args = settings.megatron
        self._config = settings.reweight
        self._state = state
        self._loss = loss
        self._reporter = reporter
        self._interval = _Interval()

    def before_step(self, step: Step) -> None:
        """Begins the interval, unless it has begun."""
        self._interval.begin(self._args.consumed_train_samples)

    def after_step(self, step: Step) -> None:
        """Adds the step to the averages if the optimizer took it, as Megatron does."""
        self._loss.end_step(taken=not step.skipped)

    def before_log(self, log: LogEvent) -> None:
        """Reads the metrics where there is a loss, and puts the weights on the log line."""
        if not mpu.is_pipeline_last_stage(ignore_virtual=True):
            return
        losses = None
        if log.prints and not self._config.enabled:
            # This is collective over the ranks that have the loss.
            group = mpu.get_data_parallel_group(with_context_parallel=True)
            losses = self._loss.train_losses.read(group, reset=log.ends_interval)
        report = self._weights() if log.prints else None
        reporter = self._reporter
        if reporter is None:
            return
        if not log.skipped:
            self._interval.add(log.call["loss_dict"])
        if reporter.endpoint is not None:
            samples = self._args.consumed_train_samples
            reporter.endpoint.step(log.iteration, samples, log.skipped)
        if not log.prints:
            return
        if report is not None:
            self._put_weights(log, reporter, report)
        elif losses is not None and (seen := reporter.seen(losses)):
            log.record["domains"] = {name: {"lm_loss": loss} for name, loss in seen}
            log.scalars |= {f"domain lm loss/{name}": loss for name, loss in seen}
        if not log.call["is_first_iteration"]:
            _leave_out_if_all_skipped(log)

    def on_log(self, log: LogEvent) -> None:
        """Writes the record of a logged step, and begins a new interval where one ends."""
        if not (log.prints and mpu.is_pipeline_last_stage(ignore_virtual=True)):
            return
        if self._reporter is not None:
            self._write(log, self._reporter)
        if log.ends_interval:
            self._loss.weight_metrics.reset()
            if self._loss.reweighting is not None:
                self._loss.reweighting.gradients = None
            self._interval = _Interval()

    def _write(self, log: LogEvent, reporter: Reporter) -> None:
        logged = {name: log.call[name] for name in ("learning_rate", "loss_scale", "grad_norm")}
        losses = {key.replace(" ", "_"): value for key, value in self._interval.means().items()}
        speed = self._interval.speed(self._args.consumed_train_samples, self._args.seq_length)
        record: dict[str, object] = losses | logged | {"speed": speed}
        weighted = self._loss.weight_metrics.last
        if weighted is not None and self._config.log_samples:
            record["samples"] = reporter.samples(weighted, self._config.log_samples)
        reporter.write("train", log.iteration, record | log.record)
        reporter.write_scalars(log.scalars, log.iteration)

    def on_evaluation(self, call: Mapping[str, Any]) -> None:
        """Writes an evaluation; with several domains also prints a line with their losses."""
        if not mpu.is_pipeline_last_stage(ignore_virtual=True):
            return
        group = mpu.get_data_parallel_group(with_context_parallel=True)
        losses = self._loss.valid_losses.read(group)
        split = "test" if "test set" in call["prefix"] else "validation"
        scale = None if self._loss.logit_scale is None else self._loss.logit_scale.read(group)
        if self._reporter is None:
            return
        iteration = call["iteration"]
        record: dict[str, object] = {"lm_loss": losses.overall}
        if scale is not None:
            record |= vars(scale)
            values = {name.replace("_", " "): value for name, value in vars(scale).items()}
            text = " | ".join(f"{name}: {value:.6g}" for name, value in values.items())
            print_rank_last(f" {split} diagnostics at iteration {iteration} | {text} |")
            if call["write_to_tensorboard"]:
                scalars = {f"{split} diagnostics/{name}": value for name, value in values.items()}
                self._reporter.write_scalars(scalars, iteration)
        if seen := self._reporter.seen(losses):
            record["domains"] = {name: {"lm_loss": loss} for name, loss in seen}
            text = " | ".join(f"{name}: {loss:.6E}" for name, loss in seen)
            print_rank_last(f" {split} loss by domain at iteration {iteration} | {text} |")
            if call["write_to_tensorboard"]:
                scalars = {f"domain {split} lm loss/{name}": loss for name, loss in seen}
                self._reporter.write_scalars(scalars, iteration)
        self._reporter.write(split, iteration, record)

    def on_saved(self, iteration: int) -> None:
        """Tells Prometheus of the checkpoint."""
        if self._reporter is not None and self._reporter.endpoint is not None:
            self._reporter.endpoint.saved(iteration)

    def _weights(self) -> ReweightReport | None:
        """Returns the weights of the interval. Collective where units are not gathered."""
        metrics, config = self._loss.weight_metrics, self._config
        if config.unit == "sequence":
            return None if self._reporter is None else metrics.read()
        copies = mpu.get_context_parallel_world_size() if config.unit == "document" else 1
        return metrics.read(mpu.get_data_parallel_group(with_context_parallel=True), copies)

    def _put_weights(self, log: LogEvent, reporter: Reporter, report: ReweightReport) -> None:
        record = reporter.weights_record(report)
        log.scalars |= reporter.weights_scalars(report)
        line = reporter.log_line(report)
        assert self._loss.reweighting is not None
        if (gradients := self._loss.reweighting.gradients) is not None:
            found = {f"gradient {name}": value for name, value in vars(gradients).items()}
            record |= {name.replace(" ", "_"): value for name, value in found.items()}
            log.scalars |= {f"reweight/{name}": value for name, value in found.items()}
            line |= found
        log.record["reweight"] = record
        # Megatron prints its sums over the steps that were not skipped, this one included.
        totals = log.call["total_loss_dict"]
        divisor = max(1, totals.get("advanced iterations", 0) + (not log.skipped))
        for key in log.call["loss_dict"]:
            # Megatron adds its own losses after this, and they are to come first on the line.
            totals.setdefault(key, torch.zeros(1, device=torch.cuda.current_device()))
        for name, value in line.items():
            totals[name] = torch.tensor([value * divisor])


def _leave_out_if_all_skipped(log: LogEvent) -> None:
    """Sets the losses of an interval without a step from 0 to -1, which Megatron does not print."""
    totals = log.call["total_loss_dict"]
    if log.skipped and not totals.get("advanced iterations", 0):
        for key, value in totals.items():
            if isinstance(value, torch.Tensor):
                totals[key] = torch.full_like(value, -1.0)


class _Interval:
    """Sums of Megatron's losses over a logging interval, on the device, and its speed."""

    def __init__(self) -> None:
        self._sums: dict[str, Any] = {}
        self._taken_steps = 0
        self._all_steps = 0
        self._begun: tuple[int, float] | None = None

    def begin(self, samples: int) -> None:
        """Called before each step, with the samples consumed so far."""
        self._begun = self._begun or (samples, _seconds_in_steps())
        self._all_steps += 1

    def add(self, losses: Mapping[str, Any]) -> None:
        """Takes in the losses of a step that was not skipped."""
        self._taken_steps += 1
        for key, value in losses.items():
            self._sums[key] = self._sums.get(key, 0.0) + value

    def means(self) -> dict[str, Any]:
        """Returns the mean losses of the steps that were not skipped."""
        return {key: value / self._taken_steps for key, value in self._sums.items()}

    def speed(self, samples: int, seq_length: int) -> dict[str, float]:
        """Returns the speed over all steps, skipped ones included, from the samples so far."""
        assert self._begun is not None
        seconds = _seconds_in_steps() - self._begun[1]
        return {
            "seconds_per_step": seconds / self._all_steps,
            "tokens_per_second": (samples - self._begun[0]) * seq_length / seconds,
        }


def _seconds_in_steps() -> float:
    """Returns the time by Megatron's timer, which is stopped while it evaluates or saves."""
    return get_timers()("interval-time").active_time()
