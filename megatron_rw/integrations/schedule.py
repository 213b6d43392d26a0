"""Wraps core's pipeline schedules, so that reweighting acts before and after a step's passes.

A schedule runs the micro-batches of one step forward and backward and finalises the gradients.
Core has no hook before and after it, so the three schedule functions are wrapped by name. Every
training loop that asks `get_forward_backward_func` for one gets a wrapped one. The wrappers act
only on a training step whose forward step function is a `SteppedForward`.
"""

import copy
import itertools
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


class ReplayedData:
    """The data of a schedule's call for several passes, each micro-batch of which is drawn once.

    A call has an iterator or None, or a list of those with virtual pipeline stages. Core's own
    `RerunDataIterator` keeps nothing while its rerun mode is off.
    """

    def __init__(self, data_iterator: Any) -> None:
        self._is_list = isinstance(data_iterator, list)
        sources = data_iterator if self._is_list else [data_iterator]
        # By chunk of the model: the source, and what was drawn from it.
        self._chunks: list[tuple[Any, list[Any]]] = [(source, []) for source in sources]

    def iterators(self) -> Any:
        """Returns what the schedule takes, beginning with the first micro-batch."""
        chunks = [
            None if source is None else _replay(source, drawn) for source, drawn in self._chunks
        ]
        return chunks if self._is_list else chunks[0]

    def peek(self, num_microbatches: int) -> list[Any]:
        """Returns the micro-batches that the last chunk will draw; none if it has no data."""
        source, drawn = self._chunks[-1]
        if source is None:
            return []
        return list(itertools.islice(_replay(source, drawn), num_microbatches))


def _replay(source: Iterator[Any], drawn: list[Any]) -> Iterator[Any]:
    """Yields copies, because a reader may replace entries of what it was given."""
    yield from map(copy.copy, drawn)
    while True:
        drawn.append(next(source))
        yield copy.copy(drawn[-1])


def run_forward_only(schedule: Schedule, call: dict[str, Any], entropy: bool = False) -> None:
    """Runs a step's forward passes in training mode, only for what the loss function notes.

    There are no gradients, and no activations are kept. Dropout and all other random numbers are
    the same as in the training pass that follows. Our cross-entropy computes the losses: without a
    gradient it reads the logits once and allocates nothing of their size.
    """
    with torch.no_grad(), _fork_rng(), patching.applied(forward_only_patches(entropy)):
        schedule(**(call | {"forward_only": True}))


def forward_only_patches(entropy: bool = False) -> list[Patch]:
    """Returns what is replaced during `run_forward_only`."""
    why = "Core logs a multi-token-prediction loss even when no gradient is wanted."
    no_logging = staticmethod(lambda *args, **kwargs: None)
    return [
        *cross_entropy.patches(entropy),
        Patch(MTPLossLoggingHelper, "save_metrics_to_tracker", no_logging, why),
    ]
