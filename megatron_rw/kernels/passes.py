"""What a cross-entropy does with its backend forward and backward, whoever differentiates it."""

from __future__ import annotations

import functools

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rw.kernels.options import Combined, CrossEntropyBackend, CrossEntropyOptions, Shard
from megatron_rw.kernels.selection import BackendName


@functools.cache
def backend(name: BackendName) -> CrossEntropyBackend:
    """The backend of that name; imports what it needs."""
    if name == "triton":
        from megatron_rw.kernels.triton_backend import TritonBackend

        return TritonBackend()
    if name == "cuda":
        from megatron_rw.kernels.cuda_backend import CudaBackend

        return CudaBackend()
    from megatron_rw.kernels.torch_backend import TorchBackend

    return TorchBackend()


def forward(
    logits: Tensor,
    target: Tensor,
    loss_mask: Tensor | None,
    tp_group: dist.ProcessGroup | None,
    shard: Shard,
    options: CrossEntropyOptions,
    passes: CrossEntropyBackend,
) -> Combined:
    """Losses, log-sum-exps and sums over the whole vocabulary, after one all-gather."""
    tables = passes.statistics(logits, target, shard, options)
    return join(tables, target, loss_mask, tp_group, shard, options, passes)


def join(
    tables: Tensor,
    target: Tensor,
    loss_mask: Tensor | None,
    tp_group: dist.ProcessGroup | None,
    shard: Shard,
    options: CrossEntropyOptions,
    passes: CrossEntropyBackend,
) -> Combined:
    """Losses, log-sum-exps and sums from this rank's statistics, `[parts, rows, s, b]`."""
    if tp_group is not None and tp_group.size() > 1:
        table = passes.merge(tables)
        tables = table.new_empty(tp_group.size(), *table.shape[1:])
        dist.all_gather_into_tensor(tables, table, group=tp_group)
    return passes.combine(tables, target, shard, options, loss_mask)


def upstream_of(
    of_losses: Tensor | None, of_sums: Tensor | None, loss_mask: Tensor | None
) -> Tensor | None:
    """Gradient of each token's loss, `[s, b]` fp32 (fp64 where the losses are).

    From those of the losses and of the sums; None where there are neither.
    """
    upstream = of_losses
    if of_sums is not None:
        assert loss_mask is not None
        # 0·NaN is NaN: a masked token has no gradient, whatever its sample's.
        spread = torch.where(loss_mask > 0, loss_mask * of_sums, 0.0)
        upstream = spread if upstream is None else upstream + spread
    if upstream is None or upstream.dtype == torch.float64:
        return upstream
    return upstream.float()
