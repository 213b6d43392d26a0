"""A vocabulary that ranks share: shards in one process, in every backend, and real ranks."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_rw.kernels import CrossEntropyOptions
from megatron_rw.kernels.cuda_backend import CudaBackend, Launch
from megatron_rw.kernels.options import Backend, Shard
from megatron_rw.kernels.selection import backend
from tests.kernels.operations import VARIANTS, Found, compare, inputs, run
from tests.ranks import run_ranks

# With padding, the last of four shards has both: columns that take part and some that do not.
SHAPE = (5, 3, 136)
WITH_ENTROPY = {
    variant: dataclasses.replace(options, entropy=True) for variant, options in VARIANTS.items()
}


def sharded(*given: Tensor, shards: int, options: CrossEntropyOptions, passes: Backend) -> Found:
    """What `shards` tensor-parallel ranks compute together of logits, target and upstream."""
    logits, target, upstream = given
    width = logits.shape[2] // shards
    vocab_size = options.vocab_size or logits.shape[2]
    parts = [
        (columns, Shard(rank * width, min(width, vocab_size - rank * width), vocab_size))
        for rank, columns in enumerate(logits.chunk(shards, dim=2))
    ]
    tables = [passes.statistics(columns, target, shard, options) for columns, shard in parts]
    made = passes.combine(torch.stack(tables), target, parts[0][1], options, None)
    gradient = torch.empty_like(logits)
    for (columns, shard), out in zip(parts, gradient.chunk(shards, dim=2), strict=True):
        passes.gradient(columns, target, made.lse, upstream, shard, options, out)
    return Found(made.losses, gradient, made.entropy)


@pytest.mark.parametrize("options", WITH_ENTROPY.values(), ids=WITH_ENTROPY)
@pytest.mark.parametrize("shards", [1, 2, 4])
def test_shards_together_are_the_whole(
    options: CrossEntropyOptions, shards: int, name: Any
) -> None:
    data = inputs(shape=SHAPE, options=options)
    found = sharded(*data, shards=shards, options=options, passes=backend(name))
    compare(found, *data, options=options)


def test_sample_longer_than_a_block_joins(name: Any) -> None:
    logits, target, _ = inputs(shape=(2 * 8192 + 100, 2, 3))
    mask = (torch.arange(target.numel(), device=target.device).view_as(target) % 4 > 0).float()
    shard, options = Shard(0, 3, 3), CrossEntropyOptions()
    table = backend("torch").statistics(logits, target, shard, options).unsqueeze(0)
    found, wanted = (
        backend(one).combine(table, target, shard, options, mask) for one in (name, "torch")
    )
    torch.testing.assert_close(found.losses, wanted.losses)
    torch.testing.assert_close(found.sums, wanted.sums)


@pytest.mark.parametrize("shards", [1, 2])
def test_launch_of_few_threads(shards: int) -> None:
    """Every thread has several stretches of a row, the last of them ragged."""
    options = dataclasses.replace(VARIANTS["all"], vocab_size=1101)
    data = inputs(shape=(2, 2, 1360), options=options)
    few = CudaBackend(Launch(forward_threads=32, backward_threads=32))
    found = sharded(*data, shards=shards, options=options, passes=few)
    compare(found, *data, options=options)


@pytest.mark.parametrize("shards", [1, 2, 4])
@pytest.mark.parametrize("mask", [-math.inf, -1e10, -1e30, torch.finfo(torch.float32).min])
def test_masked_columns_have_no_probability(mask: float, shards: int, name: Any) -> None:
    """Not even where a thread, or a shard, has nothing else, or has it first."""
    options = CrossEntropyOptions(entropy=True)
    data = inputs(shape=SHAPE)
    data[0][..., 7:], data[1][:] = mask, 5
    data[0][1:] = data[0][1:].flip(-1)
    data[1][1:] = SHAPE[2] - 6
    found = sharded(*data, shards=shards, options=options, passes=backend(name))
    compare(found, *data, options=options)


def on_rank(options: CrossEntropyOptions, operation: str) -> Found:
    from megatron.core import parallel_state

    group = parallel_state.get_tensor_model_parallel_group()
    # The ranks talk over gloo, on the CPU on any machine.
    logits, *others = inputs(torch.float64, SHAPE, options, device="cpu")
    mine = logits.chunk(2, dim=2)[group.rank()]
    return run(mine, *others, "torch", operation, tp_group=group, options=options)


@pytest.mark.parametrize("variant", ["plain", "all"])
def test_two_tensor_parallel_ranks(variant: str, operation: str) -> None:
    options = WITH_ENTROPY[variant]
    ranks = run_ranks(2, on_rank, options, operation, tensor_model_parallel_size=2)
    gradient = torch.cat([found.gradient for found in ranks], dim=2)
    data = inputs(torch.float64, SHAPE, options, device="cpu")
    for found in ranks:
        compare(found._replace(gradient=gradient), *data, options=options)
