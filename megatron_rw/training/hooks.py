"""Every name of Megatron's training program that is wrapped, and why no official hook serves.

The training loop of 0.19 has no callbacks. The wrappers change no argument and no result of what
they wrap, but for the values that join the log line.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
from argparse import Namespace
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import mpu
from megatron.core.datasets import utils as dataset_utils
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.training import get_timers, training

from megatron_rw.integrations import cross_entropy, schedule
from megatron_rw.integrations.checkpoint import keep_in_checkpoints
from megatron_rw.integrations.state import ReweightState
from megatron_rw.observability import profiling
from megatron_rw.observability.stragglers import ForwardTimes, SlowestRank
from megatron_rw.resilience import atomic_index, leaving, writer
from megatron_rw.resilience.health import Heartbeat
from megatron_rw.resilience.saving import SaveGuard
from megatron_rw.resilience.step_guard import StepGuard
from megatron_rw.resilience.watchdog import Meeting, Progress, watch
from megatron_rw.reweighting import LossByDomain, ReweightConfig, ReweightReport, temperature_at
from megatron_rw.training.loss import PretrainLoss
from megatron_rw.training.reporting import Reporter, inject


class Hooks:
    """Ties metrics and state to the training loop.

    Args:
        args: validated.
        config: the reweighting settings.
        state: saved and resumed with the checkpoints.
        loss: fills the metrics.
        reporter: writes them.
        progress: told how far the rank is.
        forward_times: finds the slowest rank; None not to look for it.
        guard: looks for bad numbers in the steps.
    """

    def __init__(
        self,
        args: Namespace,
        config: ReweightConfig,
        state: ReweightState,
        loss: PretrainLoss,
        reporter: Reporter,
        progress: Progress,
        forward_times: ForwardTimes | None,
        guard: StepGuard,
    ) -> None:
        self._args = args
        self._config = config
        self._state = state
        self._loss = loss
        self._reporter = reporter
        self._progress = progress
        self._forward_times = forward_times
        self._guard = guard
        self._heartbeat = Heartbeat()
        self._interval = _Interval()

    def install(self) -> None:
        """Wrap the functions. Once per process."""
        # training.train looks both up by name, on every rank, after every step and evaluation.
        training.training_log = self._around(training.training_log, self._training_log)
        training.evaluate_and_print_results = self._around(
            training.evaluate_and_print_results, self._evaluate
        )
        training.train_step = self._around(training.train_step, self._train_step)
        training.initialize_megatron = self._around(training.initialize_megatron, self._initialize)
        # The first that pretrain does when the checkpoint has been loaded.
        training.build_train_valid_test_data_iterators = self._around(
            training.build_train_valid_test_data_iterators, self._build_data
        )
        if self._args.cross_entropy_impl == "fused":
            cross_entropy.install()
        keep_in_checkpoints(self._state, self._args)
        schedule.install()
        self._guard.install()
        if self._args.ckpt_format == "torch_dist" and "://" not in (self._args.save or "://"):
            SaveGuard(self._args, self._reporter.saved).install()
            writer.install(self._args.device)
        atomic_index.install()
        use_shipped_dataset_helpers()
        _let_fp32_shards_load()

    @staticmethod
    def _around(original: Callable[..., Any], wrapper: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(original)

        @functools.wraps(original)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            call = signature.bind(*args, **kwargs)
            call.apply_defaults()
            return wrapper(lambda: original(*args, **kwargs), **call.arguments)

        return wrapped

    def _initialize(self, original: Callable[[], Any], **_: Any) -> Any:
        with Meeting(self._args.distributed_timeout_minutes):
            result = original()
        # Rank 0 has read them. They go into every checkpoint with the other arguments.
        shared = [getattr(self._args, "data_fingerprints", None)]
        dist.broadcast_object_list(shared, src=0)
        self._args.data_fingerprints = shared[0]
        watch(self._args, self._progress)
        return result

    def _build_data(self, original: Callable[[], Any], **_: Any) -> Any:
        leaving.end_if_finished(self._args)
        profiling.count_from_here(self._args)
        return original()

    def _train_step(self, original: Callable[[], Any], **call: Any) -> Any:
        self._progress.begin(call["iteration"], "the step's begin")
        self._interval.begin(self._args.consumed_train_samples, _seconds_in_steps())
        model, optimizer, iteration = call["model"], call["optimizer"], call["iteration"]
        result = self._guard.step(original, model, optimizer, iteration + 1)
        _, skipped, *_ = result
        self._loss.end_step(taken=not skipped)
        self._heartbeat.beat()
        self._progress.then("logging, evaluating or saving")
        return result

    def _training_log(self, original: Callable[[], Any], **call: Any) -> Any:
        iteration = call["iteration"]
        # Megatron prints one more line after the first step of a run, and begins no new interval.
        ends_interval = iteration % self._args.log_interval == 0
        if ends_interval or iteration == self._args.train_iters:
            self._guard.flush()
        if not mpu.is_pipeline_last_stage(ignore_virtual=True):
            result = original()
            self._slowest_rank(ends_interval)
            return result
        if not call["skipped_iter"]:
            self._interval.add(call["loss_dict"])
        samples = self._args.consumed_train_samples
        self._reporter.step(iteration, samples, bool(call["skipped_iter"]))
        if not (ends_interval or call["is_first_iteration"]):
            return original()

        metrics = self._loss.weight_metrics
        report, by_domain, temperature = None, None, None
        if self._config.enabled:
            if self._reporter.writes:
                report = metrics.read()
                temperature = temperature_at(
                    self._config, self._state.step(self._args.curr_iteration)
                )
                self._put_on_log_line(report, temperature, **call)
        else:
            by_domain = self._loss.train_losses.read(_data_parallel_group(), reset=ends_interval)

        if not call["is_first_iteration"]:
            _leave_out_if_all_skipped(**call)
        result = original()
        scalars = {key: call[key] for key in ("learning_rate", "loss_scale", "grad_norm")}
        self._reporter.train_step(
            iteration,
            self._interval.means() | scalars,
            report,
            temperature,
            by_domain,
            metrics.last,
            self._interval.speed(samples, _seconds_in_steps(), self._args.seq_length),
            self._slowest_rank(ends_interval),
            self._guard.counts(),
        )
        if ends_interval:
            metrics.reset()
            self._guard.reset()
            self._interval = _Interval()
        return result

    def _slowest_rank(self, ends_interval: bool) -> SlowestRank | None:
        if self._forward_times is None or not ends_interval:
            return None
        return self._forward_times.read(mpu.get_pipeline_model_parallel_rank())

    def _put_on_log_line(
        self, report: ReweightReport | None, temperature: float, **call: Any
    ) -> None:
        totals = call["total_loss_dict"]
        # Megatron prints its sums over the steps that were not skipped, this one included.
        divisor = max(1, totals.get("advanced iterations", 0) + (not call["skipped_iter"]))
        inject(report, temperature, self._reporter.names, totals, list(call["loss_dict"]), divisor)

    def _evaluate(self, original: Callable[[], Any], **call: Any) -> Any:
        result = original()
        if mpu.is_pipeline_last_stage(ignore_virtual=True):
            losses: LossByDomain = self._loss.valid_losses.read(_data_parallel_group())
            self._reporter.validation(
                call["iteration"],
                "test" if "test set" in call["prefix"] else "validation",
                losses,
                call["write_to_tensorboard"],
            )
        return result


def _leave_out_if_all_skipped(total_loss_dict: dict[str, Any], skipped_iter: int, **_: Any) -> None:
    """Keep losses of 0 off the log line of an interval without a step: Megatron prints no -1."""
    if skipped_iter and not total_loss_dict.get("advanced iterations", 0):
        for key, value in total_loss_dict.items():
            if isinstance(value, torch.Tensor):
                total_loss_dict[key] = torch.full_like(value, -1.0)


class _Interval:
    """A logging interval: Megatron's losses, on the device, and how fast it went."""

    def __init__(self) -> None:
        self._sums: dict[str, Any] = {}
        self._steps = 0
        self._begun: tuple[int, float] | None = None
        self._all_steps = 0

    def begin(self, samples: int, seconds: float) -> None:
        """Before each step: the samples consumed and the time spent in steps so far."""
        self._begun = self._begun or (samples, seconds)
        self._all_steps += 1

    def speed(self, samples: int, seconds: float, seq_length: int) -> dict[str, float]:
        """Over all steps, skipped ones included; arguments as those of `begin`, now."""
        assert self._begun is not None
        samples, seconds = samples - self._begun[0], seconds - self._begun[1]
        return {
            "seconds_per_step": seconds / self._all_steps,
            "tokens_per_second": samples * seq_length / seconds,
        }

    def add(self, losses: Mapping[str, Any]) -> None:
        self._steps += 1
        for key, value in losses.items():
            self._sums[key] = self._sums.get(key, 0.0) + value

    def means(self) -> dict[str, Any]:
        return {key: value / self._steps for key, value in self._sums.items()}


def _seconds_in_steps() -> float:
    """Megatron's own measure, which stands still while it evaluates or saves."""
    seconds: float = get_timers()("interval-time").active_time()
    return seconds


def _data_parallel_group() -> Any:
    return mpu.get_data_parallel_group(with_context_parallel=True)


def use_shipped_dataset_helpers() -> None:
    """Keep Megatron from compiling its dataset helpers: the wheel brings them, but no Makefile."""
    if importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is not None:
        dataset_utils.compile_helpers = lambda: None


def _let_fp32_shards_load() -> None:
    """Let the distributed optimizer resume an fp32 run.

    Its main parameters are then views of leaves that require a gradient, and it copies into them.
    """
    DistributedOptimizer.load_state_dict = torch.no_grad()(DistributedOptimizer.load_state_dict)
