"""The oracle's network from Megatron core's parallel layers, in any layout core has."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, cast
from unittest import mock

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.enums import ModelType
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer import MegatronModule, TransformerConfig
from megatron.core.utils import get_batch_on_this_cp_rank
from torch import Tensor
from torch.nn import functional

from megatron_rw import patching
from megatron_rw.integrations import cross_entropy, schedule
from megatron_rw.integrations.state import ReweightState
from megatron_rw.integrations.step import StepReweighting
from megatron_rw.kernels import (
    CrossEntropy,
    CrossEntropyOptions,
    LogitsPlan,
    linear_cross_entropy,
    linear_weighted_cross_entropy,
    vocab_parallel_cross_entropy,
)
from megatron_rw.reweighting import ReweightConfig, TokenBatch
from tests.exactness import cases, oracle

# Which dimension core cuts.
PARTITION_DIM = {"embedding": 0, "output": 0, "up": 0, "down": 1}


def own_part(name: str, full: Tensor) -> Tensor:
    """This tensor-parallel rank's part of the parameter or gradient `name`."""
    size = parallel_state.get_tensor_model_parallel_world_size()
    parts = full.chunk(size, PARTITION_DIM[name.split(".")[0]])
    return parts[parallel_state.get_tensor_model_parallel_rank()]


def several_splits(tokens: int, columns: int, *_: Any, **__: Any) -> LogitsPlan:
    """Splits of so few columns as no budget would make."""
    return LogitsPlan(5, -(-columns // 5), 0)


class TokenNetwork(MegatronModule):
    """The model chunk of a virtual pipeline stage of this rank."""

    def __init__(self, config: TransformerConfig, layout: cases.Layout, vp_stage: int) -> None:
        super().__init__(config)
        self.fused = layout.has("fused")
        # Losses by our cross-entropy, with the entropy of the predictions.
        self.ours = False
        stages = layout.size("PP")
        chunks = stages * layout.size("VPP")
        chunk = vp_stage * stages + parallel_state.get_pipeline_model_parallel_rank()
        per_chunk = oracle.LAYERS // chunks
        self.layers = range(chunk * per_chunk, (chunk + 1) * per_chunk)
        # As core's models have it.
        self.pre_process, self.post_process = chunk == 0, chunk == chunks - 1
        self.share_embeddings_and_output_weights = False
        self.model_type = ModelType.encoder_or_decoder
        self.vp_stage = vp_stage if layout.size("VPP") > 1 else None
        self.input_tensor: Tensor | None = None
        hidden, ffn, vocab = oracle.HIDDEN, oracle.FFN, oracle.VOCAB
        make: dict[str, Any] = {"config": config, "init_method": lambda weight: None}
        column = functools.partial(
            tensor_parallel.ColumnParallelLinear, bias=False, gather_output=False, **make
        )
        inner = {"bias": False, "input_is_parallel": True, "skip_bias_add": False}
        row = functools.partial(tensor_parallel.RowParallelLinear, **inner, **make)
        self.parts = torch.nn.ModuleDict()
        if self.pre_process:
            self.parts["embedding"] = tensor_parallel.VocabParallelEmbedding(vocab, hidden, **make)
        for layer in self.layers:
            self.parts[f"up_{layer}"] = column(hidden, ffn)
            self.parts[f"down_{layer}"] = row(ffn, hidden)
        if self.post_process:
            self.parts["output"] = column(hidden, vocab)
        values = oracle.parameters(0)
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
        if self.ours:
            return cross_entropy.losses_with_sums(self._ours(x, labels))
        return self._losses(x, labels).transpose(0, 1).contiguous()

    def _ours(self, x: Tensor, labels: Tensor) -> CrossEntropy:
        output = cast(tensor_parallel.ColumnParallelLinear, self.parts["output"])
        options = CrossEntropyOptions(entropy=True)
        return vocab_parallel_cross_entropy(output(x)[0], labels, output.tp_group, options)

    def _losses(self, x: Tensor, labels: Tensor) -> Tensor:
        output = cast(tensor_parallel.ColumnParallelLinear, self.parts["output"])
        if self.fused:
            with mock.patch.object(linear_cross_entropy, "plan_logits", several_splits):
                return linear_weighted_cross_entropy(
                    *(x, output.weight, labels, output.tp_group),
                    logits_budget=0,
                    sequence_parallel=output.sequence_parallel,
                    gradient_accumulation_fusion=True,
                ).losses
        logits, _ = output(x)
        if logits.dtype == torch.float64:
            # Core's cross-entropy computes in fp32.
            logits = tensor_parallel.gather_from_tensor_model_parallel_region(logits)
            return functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        return tensor_parallel.vocab_parallel_cross_entropy(logits.contiguous(), labels)


def build(layout: cases.Layout, dtype: torch.dtype) -> list[DistributedDataParallel]:
    """This rank's model chunks, wrapped, with the hooks that `megatron.training` sets."""
    model_parallel_cuda_manual_seed(1)
    config = TransformerConfig(
        num_layers=oracle.LAYERS,
        hidden_size=oracle.HIDDEN,
        ffn_hidden_size=oracle.FFN,
        num_attention_heads=2,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        sequence_parallel=layout.has("SP"),
        calculate_per_token_loss=layout.has("per-token"),
        gradient_accumulation_fusion=False,
        use_cpu_initialization=True,
        perform_initialization=False,
        batch_p2p_comm=False,
        overlap_p2p_comm=layout.size("VPP") > 1,
        variable_seq_lengths=False,
        **layout.sizes,
    )
    config.grad_scale_func = lambda loss: loss * layout.loss_scale
    config.finalize_model_grads_func = finalize_model_grads
    ddp = DistributedDataParallelConfig(
        use_distributed_optimizer=layout.has("distopt"),
        overlap_grad_reduce=layout.has("overlap"),
        bucket_size=200 if layout.has("overlap") else None,
    )
    model = [
        DistributedDataParallel(
            config, ddp, TokenNetwork(config, layout, vp_stage), disable_bucketing=vp_stage > 0
        )
        for vp_stage in range(layout.size("VPP"))
    ]
    if layout.has("overlap"):
        [config.no_sync_func] = [chunk.no_sync for chunk in model]
    return model


def run_step(
    forward_step: Any, model: list[Any], samples: list[oracle.Samples], forward_only: bool = False
) -> None:
    """One step through core's schedule; the gradients are left in the buffers."""
    for chunk in model:
        chunk.zero_grad_buffer()
    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[_micro_batches(samples) for _ in model],
        model=model,
        num_microbatches=len(samples),
        seq_length=cases.SEQUENCE,
        micro_batch_size=cases.SET_SIZE // parallel_state.get_data_parallel_world_size(),
        forward_only=forward_only,
    )


def gradients(model: list[DistributedDataParallel], layout: cases.Layout) -> oracle.Parameters:
    """This rank's part of the finalised gradients, by the oracle's names."""
    found = {}
    for chunk in model:
        if layout.has("distopt"):
            for buffer in chunk.buffers:
                _gather_shards(buffer)
        for name, weight in chunk.module.weights():
            found[name] = weight.main_grad / layout.loss_scale
    return found


def _gather_shards(buffer: Any) -> None:
    """Undoes the distributed optimizer's reduce-scatter, which left each rank one shard."""
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    for bucket in buffer.buckets:
        shards = list(bucket.grad_data.chunk(group.size()))
        torch.distributed.all_gather(shards, shards[group.rank()].clone(), group=group)


def _micro_batches(samples: list[oracle.Samples]) -> Iterator[dict[str, Tensor]]:
    """This rank's rows of every micro-batch, whole along the sequence, as a data loader's."""
    rows = cases.SET_SIZE // parallel_state.get_data_parallel_world_size()
    start = parallel_state.get_data_parallel_rank() * rows
    for micro_batch in samples:
        own = micro_batch[slice(start, start + rows)]
        batch = {"tokens": own.tokens, "labels": own.labels, "loss_mask": own.mask}
        more = {n: getattr(own, n) for n in ("documents", "reference", "weights")}
        yield batch | {name: value for name, value in more.items() if value is not None}


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


class WeightedForwardStep:
    """A forward step that gives the method all that a micro-batch can have, as our program does."""

    def __init__(self, config: ReweightConfig) -> None:
        patching.apply(schedule.patches())
        self._config = config
        self._steps = 0
        self._state = ReweightState(config)
        self.reweighting = StepReweighting(config, self._state, lambda: self._steps)

    def __call__(self, data: Iterator[dict[str, Tensor]], model: Any) -> tuple[Tensor, Any]:
        batch = get_batch_on_this_cp_rank(
            dict(next(data)),
            is_hybrid_cp=False,
            cp_group=parallel_state.get_context_parallel_group(),
        )
        return model(batch["tokens"], batch["labels"]), functools.partial(self._loss, batch)

    def _loss(self, batch: dict[str, Tensor], losses: Tensor) -> tuple[Tensor, Tensor, Any]:
        signal = None
        if self._config.signal == "entropy":
            signal = cross_entropy.entropy_of(losses)
        elif self._config.signal == "excess":
            signal = losses.detach() - batch["reference"]
        loss, divisor = self.reweighting.weigh(
            TokenBatch(
                losses,
                batch["loss_mask"],
                signal=signal,
                documents=batch["documents"],
                sample_weights=batch["weights"] if self._config.sample_weights else None,
            )
        )
        return loss, divisor, {}

    def run_step(self, core_schedule: Any, call: dict[str, Any]) -> Any:
        """Runs a training step; see `schedule.SteppedForward`."""
        result = self.reweighting.run(core_schedule, call)
        self._steps += 1
        return result
