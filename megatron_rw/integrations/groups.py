"""Core's process groups as the method needs them, and the losses that a model adds itself."""

from argparse import Namespace
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.multi_token_prediction import get_mtp_ranks
from torch import Tensor

from megatron_rw.reweighting import ReduceGroup


def data_parallel_ranks() -> ReduceGroup:
    """Returns the data- and context-parallel ranks of this process, from Megatron's groups."""
    return ReduceGroup(
        group=parallel_state.get_data_parallel_group(with_context_parallel=True),
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        cp_rank=parallel_state.get_context_parallel_rank(),
        cp_size=parallel_state.get_context_parallel_world_size(),
        cp_group=parallel_state.get_context_parallel_group(),
    )


def embedding_ranks(args: Namespace, pp_ranks: Sequence[int]) -> list[int]:
    """Returns the ranks of a pipeline group that hold the word embeddings.

    `pp_ranks` are the group's global ranks by stage. The first holds them, the last if the output
    layer shares their weight, and those with multi-token prediction.
    """
    from megatron.training.argument_utils import core_transformer_config_from_args

    ranks = {pp_ranks[0]}
    if len(pp_ranks) > 1:
        if not args.untie_embeddings_and_output_weights:
            ranks.add(pp_ranks[-1])
        ranks.update(get_mtp_ranks(pp_ranks, core_transformer_config_from_args(args)))
    return sorted(ranks)


def has_loss() -> bool:
    """Whether this rank is in the last pipeline stage."""
    return bool(parallel_state.is_pipeline_last_stage(ignore_virtual=True))


def share_with_pipeline(values: Tensor) -> None:
    """Overwrites `values` with those of the last pipeline stage. Collective over the pipeline."""
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        dist.broadcast(
            values,
            parallel_state.get_pipeline_model_parallel_last_rank(),
            group=parallel_state.get_pipeline_model_parallel_group(),
        )


def sum_over_replicas(count: Tensor) -> Tensor:
    """Sums over data parallelism what tensor-parallel rank 0 holds, for all ranks of a stage.

    Collective over these ranks.
    """
    if parallel_state.get_data_parallel_world_size() > 1:
        dist.all_reduce(count, group=parallel_state.get_data_parallel_group())
    if parallel_state.get_tensor_model_parallel_world_size() > 1:
        dist.broadcast(
            count,
            parallel_state.get_tensor_model_parallel_src_rank(),
            group=parallel_state.get_tensor_model_parallel_group(),
        )
    return count


def other_losses(config: Any) -> list[str]:
    """Returns the flags behind the losses that a model adds to the language model's.

    `config` is Megatron's `TransformerConfig`, or its parsed arguments, whose names agree.
    """
    found = []
    experts = getattr(config, "num_moe_experts", None) or getattr(config, "num_experts", None)
    if experts is not None:
        kinds = _as_list(config.moe_router_load_balancing_type)
        coefficients = _as_list(config.moe_aux_loss_coeff)
        if any(kind.endswith("aux_loss") for kind in kinds) and any(c > 0 for c in coefficients):
            found.append("--moe-aux-loss-coeff")
        if config.moe_z_loss_coeff:
            found.append("--moe-z-loss-coeff")
    if config.mtp_num_layers:
        found.append("--mtp-num-layers")
    if getattr(config, "experimental_attention_variant", None) == "dsa":
        found.append("--experimental-attention-variant")
    return found


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def device() -> torch.device:
    """Returns the device of this rank's tensors, as Megatron finds it."""
    return torch.device(torch.cuda.current_device())
