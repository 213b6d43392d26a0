"""Every name of Megatron's training program that is wrapped, and why no official hook serves.

The training loop of 0.19 has no callbacks. The wrappers change no argument and no result of what
they wrap, but for the values that join the log line.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
from argparse import Namespace
from collections.abc import Callable
from typing import Any

from megatron.core import mpu
from megatron.core.datasets import utils as dataset_utils
from megatron.training import checkpointing, print_rank_0, training

from megatron_rw.reweighting import LossByDomain, ReweightConfig, temperature_at
from megatron_rw.training.loss import PretrainLoss
from megatron_rw.training.reporting import Reporter, inject
from megatron_rw.training.state import ReweightState


class Hooks:
    """Ties metrics and state to the training loop.

    Args:
        args: validated.
        config: the reweighting settings.
        state: saved and resumed with the checkpoints.
        loss: fills the metrics.
        reporter: writes them.
    """

    def __init__(
        self,
        args: Namespace,
        config: ReweightConfig,
        state: ReweightState,
        loss: PretrainLoss,
        reporter: Reporter,
    ) -> None:
        self._args = args
        self._config = config
        self._state = state
        self._loss = loss
        self._reporter = reporter

    def install(self) -> None:
        """Wrap the functions. Once per process."""
        # training.train looks both up by name, on every rank, after every step and evaluation.
        training.training_log = self._around(training.training_log, self._training_log)
        training.evaluate_and_print_results = self._around(
            training.evaluate_and_print_results, self._evaluate
        )
        # load_checkpoint hands the saved arguments to it, whatever the checkpoint's format.
        checkpointing.check_checkpoint_args = self._around(
            checkpointing.check_checkpoint_args, self._check_checkpoint_args
        )
        _use_shipped_dataset_helpers()

    @staticmethod
    def _around(original: Callable[..., Any], wrapper: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(original)

        @functools.wraps(original)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            call = signature.bind(*args, **kwargs)
            call.apply_defaults()
            return wrapper(lambda: original(*args, **kwargs), **call.arguments)

        return wrapped

    def _training_log(self, original: Callable[[], Any], **call: Any) -> Any:
        iteration, first = call["iteration"], call["is_first_iteration"]
        if not (iteration % self._args.log_interval == 0 or first):
            return original()
        if not mpu.is_pipeline_last_stage(ignore_virtual=True):
            return original()

        totals, losses = call["total_loss_dict"], call["loss_dict"]
        # What Megatron divides its sums by: completed iterations, this one included.
        done = max(1, totals.get("advanced iterations", 0) + (not call["skipped_iter"]))
        megatron = {key: (totals.get(key, 0.0) + losses[key]) / done for key in losses}
        megatron |= {key: call[key] for key in ("learning_rate", "loss_scale", "grad_norm")}

        report, by_domain, temperature = None, None, None
        if self._config.enabled:
            if self._reporter.writes:
                temperature = temperature_at(
                    self._config, self._state.step(self._args.curr_iteration)
                )
                report = self._loss.weight_metrics.read()
                inject(report, temperature, self._reporter.names, totals, list(losses), done)
        else:
            # Megatron keeps its sums after the first, extra log line; so do we.
            by_domain = self._loss.train_losses.read(_data_parallel_group(), reset=not first)

        result = original()
        self._reporter.train_step(
            iteration,
            megatron,
            report,
            temperature,
            by_domain,
            self._loss.weight_metrics.last,
        )
        if not first:
            self._loss.weight_metrics.reset()
        return result

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

    def _check_checkpoint_args(self, original: Callable[[], Any], **call: Any) -> Any:
        result = original()
        for line in self._state.resume(call["checkpoint_args"]):
            print_rank_0(f"> {line}")
        return result


def _data_parallel_group() -> Any:
    return mpu.get_data_parallel_group(with_context_parallel=True)


def _use_shipped_dataset_helpers() -> None:
    """Keep Megatron from compiling its dataset helpers: the wheel brings them, but no Makefile."""
    if importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is not None:
        dataset_utils.compile_helpers = lambda: None
