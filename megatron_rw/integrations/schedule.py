"""Megatron core's pipeline schedules, with a step of reweighting round them.

A schedule runs the micro-batches of one step forward and backward and finalises the gradients.
Core has no hook before and after it, so the three schedule functions are wrapped by name; any
training loop that asks `get_forward_backward_func` for one gets the wrapped, `megatron.training`'s
included. They act only on a training step whose forward step function is a `SteppedForward`.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any, Protocol, runtime_checkable

import torch
from megatron.core.pipeline_parallel import schedules
from megatron.core.tensor_parallel.random import _fork_rng
from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

from megatron_rw.integrations import cross_entropy

Schedule = Callable[..., Any]

_NAMES = (
    "forward_backward_no_pipelining",
    "forward_backward_pipelining_without_interleaving",
    "forward_backward_pipelining_with_interleaving",
)
_MARK = "_megatron_rw_original"


@runtime_checkable
class SteppedForward(Protocol):
    """A forward step function that wants to know where a training step begins and ends."""

    def run_step(self, schedule: Schedule, call: dict[str, Any]) -> Any:
        """Run `schedule(**call)`, with what belongs before and after it."""


def install() -> None:
    """Wrap core's schedules. Again without effect."""
    for name in _NAMES:
        original = getattr(schedules, name)
        if not hasattr(original, _MARK):
            setattr(schedules, name, _wrap(original))


def _wrap(original: Schedule) -> Schedule:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def run(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(*args, **kwargs)
        call.apply_defaults()
        forward_step = call.arguments["forward_step_func"]
        if call.arguments["forward_only"] or not isinstance(forward_step, SteppedForward):
            return original(*args, **kwargs)
        return forward_step.run_step(original, dict(call.arguments))

    setattr(run, _MARK, original)
    return run


class ReplayIterator:
    """Gives a step's micro-batches as often as asked.

    Args:
        source: drawn from once per micro-batch.
    """

    def __init__(self, source: Iterator[Any]) -> None:
        self._source = source
        self._drawn: list[Any] = []
        self._position = 0

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self._position == len(self._drawn):
            self._drawn.append(next(self._source))
        self._position += 1
        # The reader may replace entries of what it was given.
        return copy.copy(self._drawn[self._position - 1])

    def rewind(self) -> None:
        """Start again with the first micro-batch."""
        self._position = 0


class ReplayedData:
    """The data iterators of a schedule's call, each replayable.

    Args:
        data_iterator: an iterator or None, or a list of those with virtual pipeline stages.
    """

    def __init__(self, data_iterator: Any) -> None:
        is_list = isinstance(data_iterator, list)
        chunks = data_iterator if is_list else [data_iterator]
        self._chunks = [None if chunk is None else ReplayIterator(chunk) for chunk in chunks]
        self.iterator: Any = self._chunks if is_list else self._chunks[0]

    def rewind(self) -> None:
        """Start every iterator again with its first micro-batch."""
        for chunk in self._chunks:
            if chunk is not None:
                chunk.rewind()

    def peek(self, num_microbatches: int) -> list[Any]:
        """The micro-batches as the last chunk will draw them; none where there is no data."""
        last = self._chunks[-1]
        if last is None:
            return []
        drawn = [next(last) for _ in range(num_microbatches)]
        last.rewind()
        return drawn


def run_forward_only(schedule: Schedule, call: dict[str, Any]) -> None:
    """Run a step's forward passes in training mode, leaving no trace but what the loss notes.

    No gradient, no activations kept. Dropout and every other random number are those of the
    training pass that follows. The losses are our cross-entropy's, which here reads the logits
    once and writes nothing of their size.
    """
    with torch.no_grad(), _fork_rng(), _no_mtp_logging(), cross_entropy.installed():
        schedule(**(call | {"forward_only": True}))


@contextlib.contextmanager
def _no_mtp_logging() -> Iterator[None]:
    """Core's own logging counts a multi-token-prediction loss even when no gradient is wanted."""
    original = MTPLossLoggingHelper.save_metrics_to_tracker
    MTPLossLoggingHelper.save_metrics_to_tracker = staticmethod(lambda *args, **kwargs: None)
    try:
        yield
    finally:
        MTPLossLoggingHelper.save_metrics_to_tracker = staticmethod(original)
