"""Refusals of a second model: no checkpoint, another vocabulary, a layout it cannot have."""

import os
from argparse import Namespace
from typing import Any

from megatron.training.argument_utils import gpt_config_from_args

from megatron_rw.data.tokenizers.tokenizer import model_sha256
from megatron_rw.errors import UserError
from megatron_rw.resilience.folder import CheckpointFolder, saved_arguments
from megatron_rw.reweighting import ReweightConfig
from megatron_rw.reweighting.config import flag
from megatron_rw.training.reference import reference_arguments
from megatron_rw.training.refusals.base import flag as argument_flag
from megatron_rw.training.refusals.base import refuse_flags

# Flags that a second model of either kind was not made for.
_SECOND_MODEL = {
    "use_megatron_fsdp": "spreads the parameters of one model, and a second was not tried",
    "use_torch_fsdp2": "spreads the parameters of one model, and a second was not tried",
}
_SNAPSHOT = _SECOND_MODEL | {
    "fp8_param_gather": "keeps parameters in FP8, whose copies were not tried",
    "fp4_param_gather": "keeps parameters in FP4, whose copies were not tried",
    "non_persistent_ckpt_type": "is for checkpoints of other places, where a snapshot is not "
    "looked for",
}


def check_second_model(args: Namespace, config: ReweightConfig) -> None:
    """Checks what a second model needs. Rank 0 alone reads the reference's checkpoint."""
    if config.signal == "progress":
        remedy = f"drop it, or {flag('signal')} progress"
        refuse_flags(args, _SNAPSHOT, remedy)
        if args.ckpt_format != "torch_dist" and (args.save or args.load):
            raise UserError(
                f"--ckpt-format {args.ckpt_format} does not hold the snapshot of {flag('signal')} "
                f"progress: use torch_dist."
            )
    elif config.reference_load is not None:
        refuse_flags(args, _SECOND_MODEL, f"drop it, or {flag('reference_load')}")
        if args.rank == 0:
            _check_reference(args, config.reference_load)


def _check_reference(args: Namespace, path: str) -> None:
    where = f"{flag('reference_load')} {path}"
    checkpoint = CheckpointFolder.meant(path)
    if checkpoint is None:
        raise UserError(
            f"{where}: there is no checkpoint. Give the folder that a run had as its --save, or "
            "one of the folders iter_0000123 in it."
        )
    if not checkpoint.is_distributed:
        raise UserError(f"{where}: only a checkpoint of --ckpt-format torch_dist can be read.")
    if (defect := checkpoint.defect()) is not None:
        raise UserError(f"{where}: {checkpoint.path.name} is incomplete: {defect}.")
    saved = saved_arguments(checkpoint.common())
    _check_vocabulary(args, saved, where)
    reference = reference_arguments(args, saved)
    longest = reference.max_position_embeddings
    if reference.position_embedding_type == "learned_absolute" and longest < args.seq_length:
        raise UserError(
            f"{where}: its model has positions for {longest} tokens and --seq-length is "
            f"{args.seq_length}: lower that, or give another reference."
        )
    chunks = args.virtual_pipeline_model_parallel_size or 1
    parts = args.pipeline_model_parallel_size * chunks
    if reference.num_layers % parts:
        raise UserError(
            f"{where}: its model has {reference.num_layers} layers, which the run's {parts} "
            "pipeline stages cannot share evenly: use other stages, or give another reference."
        )
    try:
        gpt_config_from_args(reference).finalize()
    except (AssertionError, ValueError) as error:
        raise UserError(f"{where}: the run's layout does not fit its model: {error}") from error


def _check_vocabulary(args: Namespace, saved: dict[str, Any], where: str) -> None:
    """Checks that token ids mean the same in both models, and their softmax is over as many."""
    for name in ("tokenizer_type", "vocab_size"):
        if saved.get(name) != getattr(args, name):
            raise UserError(
                f"{where}: it was trained with {argument_flag(name)} {saved.get(name)}, and this "
                f"run has {getattr(args, name)}: give a reference of the same tokenizer."
            )
    models = (saved.get("tokenizer_model"), args.tokenizer_model)
    # One that has been moved cannot be compared.
    there = all(model is not None and os.path.exists(model) for model in models)
    if there and len({model_sha256(model) for model in models}) > 1:
        raise UserError(
            f"{where}: it was trained with --tokenizer-model {models[0]}, which is not "
            f"{models[1]}: give a reference of the same tokenizer."
        )
    padded = saved.get("padded_vocab_size")
    if padded != args.padded_vocab_size:
        raise UserError(
            f"{where}: its vocabulary is padded to {padded} entries and the run's to "
            f"{args.padded_vocab_size}: give --make-vocab-size-divisible-by such that it is the "
            "same, or another reference."
        )
