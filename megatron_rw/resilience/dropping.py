"""A step run again without the samples whose loss is not finite.

Weight 0 does not take such a sample out of a step: where its activations are not finite, every
weight gradient that sums over the batch has 0·NaN in it. So the step's gradients are thrown away,
and the step is run again with the sample's tokens replaced by zeros and its loss mask by nothing.
Its activations are then finite, its part of every gradient is an exact 0, and the moments, weights
and token counts are those of the other samples.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import mpu
from megatron.core.tensor_parallel.random import _get_all_rng_states, _set_all_rng_states
from megatron.training.utils import print_rank_0
from torch import Tensor

from megatron_rw.integrations import groups
from megatron_rw.integrations.schedule import ReplayedData
from megatron_rw.resilience.nonfinite import bad_samples, describe, gather
from megatron_rw.resilience.step_samples import StepSamples

_BLANKED = ("tokens", "labels", "loss_mask")


class SampleDropper:
    """Runs steps, and those with bad samples twice.

    What costs: the step's data are kept, one all-reduce of 4 bytes per sample of the global batch,
    and one wait for the device before the optimizer's own.

    Args:
        args: validated.
        samples: of the step under way.

    Attributes:
        dropped: samples since `reset`, over all ranks.
    """

    def __init__(self, args: Namespace, samples: StepSamples) -> None:
        self._args = args
        self._samples = samples
        self.dropped = 0

    def reset(self) -> None:
        """Count anew."""
        self.dropped = 0

    def run(self, run: Callable[[dict[str, Any]], Any], call: dict[str, Any]) -> Any:
        """Run a step.

        Args:
            run: runs core's schedule with these arguments, and notes the samples' losses.
            call: the arguments by name.

        Returns:
            What the last run returned.
        """
        data = ReplayedData(call["data_iterator"])
        call = call | {"data_iterator": data.iterator}
        random_states = _get_all_rng_states()
        result = run(call)
        bad = self._all_bad(call["num_microbatches"])
        # Without a sample left there is no step to take: the optimizer will skip it.
        if not bad.any() or bad.all():
            return result
        count = int(bad.sum())
        self.dropped += count
        what = describe(list(enumerate(gather(bad_samples(self._samples)))))
        iteration = self._args.curr_iteration + 1
        print_rank_0(f"WARNING: iteration {iteration}: the step is run again: {what}")
        for chunk in call["model"] if isinstance(call["model"], list) else [call["model"]]:
            chunk.zero_grad_buffer()
        _set_all_rng_states(*random_states)
        mine = bad[mpu.get_data_parallel_rank()]
        self._samples.begin_again()
        data.rewind(lambda micro_batch, drawn: _without(drawn, mine[micro_batch]))
        return run(call)

    def _all_bad(self, num_microbatches: int) -> Tensor:
        """`[dp, M, b]` bool on the host, the same on every rank. Collective."""
        replicas, count = mpu.get_data_parallel_world_size(), self._args.micro_batch_size
        shape = (replicas, num_microbatches, count)
        table = torch.zeros(shape, dtype=torch.int32, device=groups.device())
        mine = self._samples.nonfinite()
        if mine is not None:
            table[mpu.get_data_parallel_rank()] = mine.int()
        if dist.get_world_size() > 1:
            dist.all_reduce(table, op=dist.ReduceOp.MAX)
        return table.cpu().bool()


def _without(drawn: dict[str, Any], rows: Tensor) -> dict[str, Any]:
    """A micro-batch as the data loader gave it, some of its samples blank.

    Args:
        drawn: `[b, s]` each.
        rows: `[b]` bool, those samples.
    """
    if not rows.any():
        return drawn
    blank = {name: drawn[name].masked_fill(rows.unsqueeze(1), 0) for name in _BLANKED}
    return {**drawn, **blank}
