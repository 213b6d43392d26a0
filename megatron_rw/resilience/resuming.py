"""Whether a checkpoint is one of this model, asked before anything is built."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

from megatron_rw.resilience.contents import Contents, arguments
from megatron_rw.resilience.folder import CheckpointFolder

# What decides which tensors there are, and their shapes. The vocabulary's padding may differ.
SHAPING = (
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "kv_channels"),
    *("group_query_attention", "num_query_groups", "multi_latent_attention", "swiglu"),
    *("normalization", "add_bias_linear", "add_qkv_bias", "qk_layernorm"),
    *("untie_embeddings_and_output_weights", "position_embedding_type", "num_experts"),
    *("moe_ffn_hidden_size", "moe_shared_expert_intermediate_size", "mtp_num_layers", "vocab_size"),
)
# Of learnt positions alone.
_POSITIONS = "max_position_embeddings"


class ShapeError(ValueError):
    """The checkpoint is one of another model."""


def check_shapes(args: Namespace) -> None:
    """Compare the model with the checkpoint that will be loaded. On one rank.

    Args:
        args: validated.

    Raises:
        ShapeError: lists what differs.
    """
    path = _loaded(args)
    if path is None or args.use_checkpoint_args:
        return
    saved = arguments(Contents(path).common())
    differing = differences(vars(args), saved)
    if differing:
        lines = "; ".join(
            f"--{name.replace('_', '-')} {theirs} there, {mine} here"
            for name, (theirs, mine) in differing.items()
        )
        raise ShapeError(
            f"{path} is a checkpoint of another model: {lines}. Give the same flags, "
            "or --use-checkpoint-args to take them from it."
        )


def differences(mine: dict[str, Any], saved: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """By name, the checkpoint's value and this run's, where both are known and differ."""
    names = list(SHAPING)
    if mine.get("position_embedding_type") == "learned_absolute":
        names.append(_POSITIONS)
    return {
        name: (saved[name], mine[name])
        for name in names
        if name in saved and name in mine and saved[name] != mine[name]
    }


def _loaded(args: Namespace) -> Path | None:
    if args.load is None or "://" in args.load:
        return None
    folder = CheckpointFolder(args.load)
    wanted = args.ckpt_step or folder.tracked()
    for checkpoint in folder.checkpoints():
        if checkpoint.iteration == wanted and checkpoint.is_distributed:
            return checkpoint.path
    return None
