"""The oracle's network from Megatron core's parallel layers, in any layout core has."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.enums import ModelType
from megatron.core.transformer import MegatronModule, TransformerConfig
from megatron.core.utils import get_batch_on_this_cp_rank
from torch import Tensor
from torch.nn import functional

from megatron_rw.kernels import linear_weighted_cross_entropy
from tests.exactness import oracle


def _cut(full: Tensor, dim: int) -> Tensor:
    """This tensor-parallel rank's part."""
    size = parallel_state.get_tensor_model_parallel_world_size()
    return full.chunk(size, dim)[parallel_state.get_tensor_model_parallel_rank()]


# Which dimension core cuts.
PARTITION_DIM = {"embedding": 0, "output": 0, "up": 0, "down": 1}


def own_part(name: str, full: Tensor) -> Tensor:
    """This rank's part of the parameter or gradient `name`."""
    return _cut(full, PARTITION_DIM[name.split(".")[0]])


class TokenNetwork(MegatronModule):
    """One model chunk; `chunk` is its index along the pipeline, virtual stages included."""

    def __init__(
        self,
        config: TransformerConfig,
        chunk: int,
        chunks: int,
        values: oracle.Parameters,
        vp_stage: int | None,
        fused: bool,
    ) -> None:
        super().__init__(config)
        self.fused = fused
        self.pre_process, self.post_process = chunk == 0, chunk == chunks - 1
        self.share_embeddings_and_output_weights = False
        self.model_type = ModelType.encoder_or_decoder
        self.vp_stage = vp_stage
        self.input_tensor: Tensor | None = None
        per_chunk = oracle.LAYERS // chunks
        self.layers = range(chunk * per_chunk, (chunk + 1) * per_chunk)
        parts = torch.nn.ModuleDict()
        make: dict[str, Any] = {"config": config, "init_method": lambda weight: None}
        column = functools.partial(
            tensor_parallel.ColumnParallelLinear, bias=False, gather_output=False, **make
        )
        if self.pre_process:
            parts["embedding"] = tensor_parallel.VocabParallelEmbedding(
                oracle.VOCAB, oracle.HIDDEN, **make
            )
        for layer in self.layers:
            parts[f"up_{layer}"] = column(oracle.HIDDEN, oracle.FFN)
            parts[f"down_{layer}"] = tensor_parallel.RowParallelLinear(
                oracle.FFN,
                oracle.HIDDEN,
                bias=False,
                input_is_parallel=True,
                skip_bias_add=False,
                **make,
            )
        if self.post_process:
            parts["output"] = column(oracle.HIDDEN, oracle.VOCAB)
        self.parts = parts
        with torch.no_grad():
            for name, weight in self.weights():
                weight.copy_(own_part(name, values[name]))

    def weights(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Parameters by the oracle's names."""
        for name, part in self.parts.items():
            yield name.replace("_", "."), cast(torch.nn.Parameter, part.weight)

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Take the previous stage's output; core's schedules call it."""
        self.input_tensor = input_tensor[0] if isinstance(input_tensor, list) else input_tensor

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """`[b, s/cp]` token losses on the last chunk, `[s/cp/sp, b, h]` before."""
        if self.pre_process:
            x = self.parts["embedding"](tokens).transpose(0, 1).contiguous()
            if self.config.sequence_parallel:
                x = tensor_parallel.scatter_to_sequence_parallel_region(x)
        else:
            assert self.input_tensor is not None
            x = self.input_tensor
        for layer in self.layers:
            hidden, _ = self.parts[f"up_{layer}"](x)
            x = x + self.parts[f"down_{layer}"](functional.gelu(hidden))[0]
        if not self.post_process:
            return x
        labels = labels.transpose(0, 1).contiguous()
        if self.fused:
            output = cast(tensor_parallel.ColumnParallelLinear, self.parts["output"])
            losses = linear_weighted_cross_entropy(
                *(x, output.weight, labels, output.tp_group),
                sequence_parallel=output.sequence_parallel,
                gradient_accumulation_fusion=True,
            )
            return losses.transpose(0, 1).contiguous()
        logits, _ = self.parts["output"](x)
        if logits.dtype == torch.float64:
            # Core's cross-entropy computes in fp32.
            logits = tensor_parallel.gather_from_tensor_model_parallel_region(logits)
            return functional.cross_entropy(logits.permute(1, 2, 0), labels.T, reduction="none")
        losses = tensor_parallel.vocab_parallel_cross_entropy(logits.contiguous(), labels)
        return losses.transpose(0, 1).contiguous()


def build(
    config: TransformerConfig,
    ddp: DistributedDataParallelConfig,
    values: oracle.Parameters,
    fused: bool = False,
) -> list[DistributedDataParallel]:
    """This rank's model chunks, wrapped, with the hooks that `megatron.training` sets."""
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    virtual = config.virtual_pipeline_model_parallel_size
    rank = parallel_state.get_pipeline_model_parallel_rank()
    model = []
    for v in range(virtual or 1):
        chunk = TokenNetwork(
            config,
            v * stages + rank,
            stages * (virtual or 1),
            values,
            v if virtual is not None else None,
            fused,
        )
        model.append(DistributedDataParallel(config, ddp, chunk, disable_bucketing=v > 0))
    config.finalize_model_grads_func = finalize_model_grads
    if ddp.overlap_grad_reduce:
        no_sync: list[Callable[[], Any]] = [chunk.no_sync for chunk in model]
        config.no_sync_func = no_sync if len(model) > 1 else no_sync[0]
    return model


def gradients(model: list[DistributedDataParallel], sharded: bool) -> oracle.Parameters:
    """This rank's part of the finalised gradients, by the oracle's names.

    They are `sharded` if the distributed optimizer's reduce-scatter left each rank one shard.
    """
    found = {}
    for chunk in model:
        if sharded:
            for buffer in chunk.buffers:
                _gather_shards(buffer)
        for name, weight in chunk.module.weights():
            found[name] = weight.main_grad.clone()
    return found


def _gather_shards(buffer: Any) -> None:
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    size, rank = group.size(), group.rank()
    for bucket in buffer.buckets:
        shards = list(bucket.grad_data.chunk(size))
        torch.distributed.all_gather(shards, shards[rank].clone(), group=group)


def micro_batches(samples: list[oracle.Samples]) -> Iterator[dict[str, Tensor]]:
    """This rank's rows of every micro-batch, whole along the sequence, as a data loader's."""
    dp = parallel_state.get_data_parallel_world_size()
    for micro_batch in samples:
        rows = len(micro_batch.tokens) // dp
        start = parallel_state.get_data_parallel_rank() * rows
        own = micro_batch[slice(start, start + rows)]
        yield {"tokens": own.tokens, "labels": own.labels, "loss_mask": own.mask}


def forward_step(
    data_iterator: Iterator[dict[str, Tensor]], model: Any
) -> tuple[Tensor, Callable[..., Any]]:
    """A forward step as Megatron's scripts have it; knows nothing of sample weights."""
    batch = get_batch_on_this_cp_rank(
        dict(next(data_iterator)),
        is_hybrid_cp=False,
        cp_group=parallel_state.get_context_parallel_group(),
    )
    losses = model(batch["tokens"], batch["labels"])
    return losses, functools.partial(token_mean, batch["loss_mask"])


def token_mean(loss_mask: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Megatron's own loss."""
    total = (losses.view(-1) * loss_mask.view(-1)).sum()
    tokens = loss_mask.sum().int()
    return total, tokens, {"lm loss": torch.stack([total.detach(), tokens.to(total)])}
