"""Wraps core's pipeline schedules, so that reweighting acts before and after a step's passes.

A schedule runs the micro-batches of one step forward and backward and finalises the gradients.
Core has no hook before and after it, so the three schedule functions are wrapped by name. Every
training loop that asks `get_forward_backward_func` for one gets a wrapped one. The wrappers act
only on a training step whose forward step function is a `SteppedForward`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any, Protocol, runtime_checkable

import torch
from megatron.core.pipeline_parallel import schedules
from megatron.core.tensor_parallel.random import _fork_rng
from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

from megatron_rw import patching
from megatron_rw.integrations import cross_entropy
from megatron_rw.patching import Around, Patch

Schedule = Callable[..., Any]

_NAMES = (
    "forward_backward_no_pipelining",
    "forward_backward_pipelining_without_interleaving",
    "forward_backward_pipelining_with_interleaving",
)


@runtime_checkable
class SteppedForward(Protocol):
    """A forward step function that runs the passes of a training step itself."""

    def run_step(self, schedule: Schedule, call: dict[str, Any]) -> Any:
        """Runs `schedule(**call)`, with what comes before and after it, and returns its result."""


def patches() -> list[Patch]:
    """Returns the wrappers of core's three schedules."""
    why = "Core has no hook before and after the micro-batches of a step."
    return [Patch(schedules, name, Around(_run_step), why) for name in _NAMES]


def _run_step(proceed: Schedule, call: dict[str, Any]) -> Any:
    forward_step = call["forward_step_func"]
    if call["forward_only"] or not isinstance(forward_step, SteppedForward):
        return proceed()
    return forward_step.run_step(proceed, call)


class ReplayIterator:
    """Yields a step's micro-batches repeatedly, but draws each from its source only once."""

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
        """Starts again with the first micro-batch."""
        self._position = 0


class ReplayedData:
    """The data iterators of a schedule's call, made replayable.

    They are an iterator or None, or a list of those with virtual pipeline stages.
    """

    def __init__(self, data_iterator: Any) -> None:
        is_list = isinstance(data_iterator, list)
        chunks = data_iterator if is_list else [data_iterator]
        self._chunks = [None if chunk is None else ReplayIterator(chunk) for chunk in chunks]
        self.iterator: Any = self._chunks if is_list else self._chunks[0]

    def rewind(self) -> None:
        """Starts every iterator again with its first micro-batch."""
        for chunk in self._chunks:
            if chunk is not None:
                chunk.rewind()

    def peek(self, num_microbatches: int) -> list[Any]:
        """Returns the micro-batches that the last chunk will draw; none if it has no data."""
        last = self._chunks[-1]
        if last is None:
            return []
        drawn = [next(last) for _ in range(num_microbatches)]
        last.rewind()
        return drawn


def run_forward_only(schedule: Schedule, call: dict[str, Any]) -> None:
    """Runs a step's forward passes in training mode, only for what the loss function notes.

    There are no gradients, and no activations are kept. Dropout and all other random numbers are
    the same as in the training pass that follows. Our cross-entropy computes the losses: without a
    gradient it reads the logits once and allocates nothing of their size.
    """
    with torch.no_grad(), _fork_rng(), patching.applied(forward_only_patches()):
        schedule(**(call | {"forward_only": True}))


def forward_only_patches() -> list[Patch]:
    """Returns what is replaced during `run_forward_only`."""
    why = "Core logs a multi-token-prediction loss even when no gradient is wanted."
    no_logging = staticmethod(lambda *args, **kwargs: None)
    return [
        *cross_entropy.patches(),
        Patch(MTPLossLoggingHelper, "save_metrics_to_tracker", no_logging, why),
    ]
