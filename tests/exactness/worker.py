"""One rank of a layout: every scope and mask through core's real schedule, against the oracle."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig

from megatron_rw.integrations import attach
from tests.exactness import cases, model, oracle

Sums = dict[tuple[str, str], list[tuple[float, float]]]


def core_config(layout: cases.Layout, dtype: torch.dtype) -> TransformerConfig:
    return TransformerConfig(
        num_layers=oracle.LAYERS,
        hidden_size=oracle.HIDDEN,
        ffn_hidden_size=oracle.FFN,
        num_attention_heads=2,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        sequence_parallel=layout.sequence_parallel,
        calculate_per_token_loss=layout.per_token,
        gradient_accumulation_fusion=False,
        use_cpu_initialization=True,
        perform_initialization=False,
        batch_p2p_comm=False,
        overlap_p2p_comm="virtual_pipeline_model_parallel_size" in layout.sizes,
        variable_seq_lengths=False,
        **layout.sizes,
    )


def run_step(
    forward_step: Any, chunks: list[Any], samples: list[oracle.Samples], forward_only: bool = False
) -> Any:
    """One step through core's schedule; the gradients are left in the buffers."""
    for chunk in chunks:
        chunk.zero_grad_buffer()
    data = [model.micro_batches(samples) for _ in chunks]
    rows = len(samples[0].tokens) // parallel_state.get_data_parallel_world_size()
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=data if len(chunks) > 1 else data[0],
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=len(samples),
        seq_length=cases.SEQUENCE,
        micro_batch_size=rows,
        forward_only=forward_only,
    )


def errors(
    layout: cases.Layout, wanted: dict[tuple[str, str], list[oracle.Parameters]]
) -> dict[str, Sums]:
    """Squared error and squared size of this rank's part of every step's gradient.

    By precision, then by scope and mask: one pair a step, as `wanted` has one gradient a step.
    """
    logging.getLogger("megatron.core").setLevel(logging.WARNING)
    model_parallel_cuda_manual_seed(1)
    values = oracle.parameters(0)
    result: dict[str, Sums] = {precision: {} for precision in cases.PRECISIONS}
    for precision, (dtype, masks) in cases.PRECISIONS.items():
        for (scope, mask), gradients in wanted.items():
            if mask not in masks:
                continue
            ddp = DistributedDataParallelConfig(**layout.ddp)
            core = core_config(layout, dtype)
            core.grad_scale_func = lambda loss: loss * layout.loss_scale
            chunks = model.build(core, ddp, values, layout.fused)
            forward_step = attach(model.forward_step, cases.CONFIGS[scope])
            pairs = []
            for samples, gradient in zip(cases.steps(mask), gradients, strict=True):
                run_step(forward_step, chunks, samples)
                found = model.gradients(chunks, ddp.use_distributed_optimizer)
                unscaled = {name: value / layout.loss_scale for name, value in found.items()}
                pairs.append(compare(unscaled, gradient))
            result[precision][scope, mask] = pairs
    return result


def compare(found: oracle.Parameters, wanted: oracle.Parameters) -> tuple[float, float]:
    """Squared error and squared size over this rank's parameters; NaN is an infinite error."""
    error = size = 0.0
    for name, gradient in found.items():
        part = model.own_part(name, wanted[name])
        error += float((gradient.double() - part).square().sum())
        size += float(part.square().sum())
    return (error if math.isfinite(error) else math.inf), size
