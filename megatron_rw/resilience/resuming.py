"""Chooses the checkpoint that a run begins with, and refuses one that does not fit, early."""

import os
from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from megatron_rw.errors import UserError
from megatron_rw.resilience.folder import TRACKER, Checkpoint, CheckpointFolder, saved_arguments

# The flags that decide which tensors there are, and their shapes. The padding of the vocabulary
# may differ.
SHAPING = (
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "kv_channels"),
    *("group_query_attention", "num_query_groups", "multi_latent_attention", "swiglu"),
    *("normalization", "add_bias_linear", "add_qkv_bias", "qk_layernorm"),
    *("untie_embeddings_and_output_weights", "position_embedding_type", "num_experts"),
    *("moe_ffn_hidden_size", "moe_shared_expert_intermediate_size", "mtp_num_layers", "vocab_size"),
)
# The flags from which Megatron computes the schedule of the learning rate and the weight decay.
_SCHEDULE_FLAGS = (
    *("train_iters", "train_samples", "global_batch_size", "lr", "min_lr", "lr_decay_style"),
    *("lr_decay_iters", "lr_decay_samples"),
    *("lr_warmup_iters", "lr_warmup_samples", "lr_warmup_fraction"),
    *("weight_decay", "start_weight_decay", "end_weight_decay", "weight_decay_incr_style"),
)


def choose_checkpoint(args: Namespace) -> list[str]:
    """Makes sure that the checkpoint that Megatron will load is complete. Called on one rank.

    Megatron trusts the tracker alone. Where that names no complete checkpoint, because the run
    that wrote it was killed, and the folder is this run's own (`--save` is `--load`), the tracker
    is set to the newest complete one. A tracker that names an older checkpoint than the newest is
    obeyed: somebody may have put it back on purpose.

    Returns lines for the user. Refuses what is not there or not complete, if nothing else can be
    loaded.
    """
    load, ckpt_step = args.load, args.ckpt_step
    if load is None and args.exit_on_missing_checkpoint:
        raise UserError("--exit-on-missing-checkpoint needs a --load: add it.")
    if load is None or "://" in load:
        return []
    folder = CheckpointFolder(load)
    if _is_own(args):
        folder.sweep()
    if folder.is_release():
        return []
    if ckpt_step:
        wanted = folder.of(ckpt_step)
        if wanted is None:
            raise UserError(
                f"--ckpt-step {ckpt_step}: {load} has no such checkpoint{_complete(folder)}."
            )
        if (defect := wanted.defect()) is not None:
            raise UserError(
                f"{wanted.path} is incomplete: {defect}. --ckpt-step names it: give another."
            )
        return []
    tracked = folder.tracked()
    named = None if tracked is None else folder.of(tracked)
    if named is not None and named.defect() is None:
        return _note_newer(folder, named)
    newest = folder.newest_complete()
    if newest is None:
        return _nothing(args, folder, tracked)
    why = (
        "its tracker names none"
        if tracked is None
        else f"its tracker names iteration {tracked}, which "
        + ("is not there" if named is None else f"is incomplete: {named.defect()}")
    )
    if not _is_own(args):
        raise UserError(
            f"--load {load}: {why}. The newest complete checkpoint there is that of iteration "
            f"{newest.iteration}: add --ckpt-step {newest.iteration}."
        )
    folder.write_tracker(newest.iteration)
    return [
        f"{load}: {why}; going on from the newest complete checkpoint, iteration {newest.iteration}"
    ]


def _note_newer(folder: CheckpointFolder, named: Checkpoint) -> list[str]:
    newest = folder.checkpoints()[-1]
    if newest.iteration == named.iteration:
        return []
    defect = newest.defect()
    if defect is not None:
        return [
            f"{folder.path}: the checkpoint of iteration {newest.iteration} is left alone, {defect}"
        ]
    return [
        f"{folder.path}: going on from iteration {named.iteration}, as the tracker says; there is "
        f"a complete checkpoint of iteration {newest.iteration} (--ckpt-step {newest.iteration})"
    ]


def _is_own(args: Namespace) -> bool:
    return args.save is not None and os.path.realpath(args.save) == os.path.realpath(args.load)


def _nothing(args: Namespace, folder: CheckpointFolder, tracked: int | None) -> list[str]:
    unfinished = folder.checkpoints()
    if tracked is not None:
        raise UserError(
            f"--load {folder.path}: its tracker names iteration {tracked}, and there is no "
            f"complete checkpoint{_complete(folder)}. To begin anew, give another folder, or "
            f"delete {folder.path / TRACKER}."
        )
    own = _is_own(args)
    # Megatron takes one of these then, and would otherwise begin a new training.
    others = own or args.pretrained_checkpoint or args.non_persistent_ckpt_type
    if args.exit_on_missing_checkpoint or not others:
        found = "it holds no complete checkpoint" if folder.path.is_dir() else "no such folder"
        remedy = (
            "Give the folder that a run had as its --save. A new run needs no --load, except its "
            "own --save to resume from."
        )
        if own:
            remedy = "Drop --exit-on-missing-checkpoint to begin anew."
        elif folder.path.name.startswith("iter_"):
            found, remedy = "it is a checkpoint itself", f"Give its folder, {folder.path.parent}."
        raise UserError(f"--load {folder.path}: {found}. {remedy}")
    if unfinished:
        return [
            f"{folder.path} holds no complete checkpoint: the run begins from nothing. That of "
            f"iteration {unfinished[-1].iteration} is incomplete: {unfinished[-1].defect()}"
        ]
    return []


def _complete(folder: CheckpointFolder) -> str:
    complete = [str(c.iteration) for c in folder.checkpoints() if c.defect() is None]
    return f"; it has those of iterations {', '.join(complete[-8:])}" if complete else ""


def check_resume(args: Namespace, allow_changed_data: bool) -> None:
    """Refuses to resume where the run differs from its checkpoint. Called on one rank."""
    checkpoint = _loaded(args)
    if checkpoint is None:
        return
    path, common = checkpoint.path, checkpoint.common()
    saved = saved_arguments(common)
    differing = "" if args.use_checkpoint_args else _listed(saved, _shapes(args))
    if differing:
        raise UserError(
            f"{path} is a checkpoint of another model: {differing}. Give the same flags, "
            "or --use-checkpoint-args to take them from it."
        )
    if args.finetune or args.skip_train:
        return
    # A path that only one of the two has is no change: a corpus may be moved, a blend altered.
    before, now = saved.get("data_fingerprints", {}), args.data_fingerprints
    altered = [prefix for prefix in now if before.get(prefix, now[prefix]) != now[prefix]]
    if altered and not allow_changed_data:
        raise UserError(
            f"data path {', '.join(altered)}: not what {path} was trained on; it has been altered "
            "or replaced since, and the position in it means nothing. Put the data back, or add "
            "--allow-changed-data to go on with what is there."
        )
    if args.no_load_optim:
        return
    theirs = saved.get("expert_model_parallel_size", 1)
    mine = args.expert_model_parallel_size
    if args.num_experts and (theirs > 1) != (mine > 1):
        raise UserError(
            f"{path} was written with --expert-model-parallel-size {theirs}, and this run has "
            f"{mine}: Megatron has one optimizer for all parameters at 1 and a second one for "
            "experts above, and cannot take the state of one layout into the other. Resume with "
            "1 from 1, with any above from any above, or add --no-load-optim."
        )
    if args.override_opt_param_scheduler or args.use_checkpoint_opt_param_scheduler:
        return
    mine, theirs = _schedule(args), common.get("opt_param_scheduler", {})
    if any(theirs.get(name, value) != value for name, value in mine.items()):
        differing = _listed(_schedule_flags(saved), _schedule_flags(vars(args)))
        raise UserError(
            f"{path} was written under another schedule: "
            f"{differing or '--use-checkpoint-opt_param-scheduler there'}. Add "
            "--override-opt_param-scheduler to go on under the one given here, for example to "
            "train longer, or --use-checkpoint-opt_param-scheduler for the one there."
        )


def _loaded(args: Namespace) -> Checkpoint | None:
    if args.load is None or "://" in args.load:
        return None
    folder = CheckpointFolder(args.load)
    wanted = args.ckpt_step or folder.tracked()
    checkpoint = folder.of(wanted) if wanted else None
    return checkpoint if checkpoint is not None and checkpoint.is_distributed else None


def _listed(theirs: Mapping[str, Any], mine: Mapping[str, Any]) -> str:
    """Lists the flags of this run whose value differs from the one in the checkpoint."""
    return "; ".join(
        f"--{name.replace('_', '-')} {_said(theirs[name])} there, {_said(value)} here"
        for name, value in mine.items()
        if name in theirs and theirs[name] != value
    )


def _said(value: Any) -> Any:
    return "not given" if value is None else value


def _shapes(args: Namespace) -> dict[str, Any]:
    names = list(SHAPING)
    if not args.group_query_attention:
        # Megatron then changes its own default to the number of heads while it trains, and saves
        # that.
        names.remove("num_query_groups")
    if args.position_embedding_type == "learned_absolute":
        names.append("max_position_embeddings")
    return {name: getattr(args, name) for name in names}


def _schedule(args: Namespace) -> dict[str, Any]:
    """Returns the settings that Megatron's scheduler compares when it loads a checkpoint."""
    if args.train_iters:
        scale, unit = args.global_batch_size, "iters"
    else:
        scale, unit = 1, "samples"
    total = getattr(args, f"train_{unit}") * scale
    decay = (getattr(args, f"lr_decay_{unit}") or getattr(args, f"train_{unit}")) * scale
    warmup = getattr(args, f"lr_warmup_{unit}") * scale
    if args.lr_warmup_fraction is not None:
        warmup = args.lr_warmup_fraction * decay
    return {
        "max_lr": args.lr,
        "min_lr": args.min_lr,
        "lr_warmup_steps": warmup,
        "lr_decay_steps": decay,
        "lr_decay_style": args.lr_decay_style,
        "start_wd": args.start_weight_decay,
        "end_wd": args.end_weight_decay,
        "wd_incr_steps": total,
        "wd_incr_style": args.weight_decay_incr_style,
    }


def _schedule_flags(args: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the flags behind the schedule as a user gave them, None for those not given."""
    flags = {name: args.get(name) for name in _SCHEDULE_FLAGS}
    for unit in ("iters", "samples"):
        if flags[f"lr_decay_{unit}"] == flags[f"train_{unit}"]:
            flags[f"lr_decay_{unit}"] = None
    if flags["train_samples"]:
        # The schedule counts samples, and Megatron computes the iterations.
        flags["train_iters"] = flags["global_batch_size"] = None
    if flags["weight_decay_incr_style"] == "constant":
        flags["start_weight_decay"] = flags["end_weight_decay"] = None
    return flags
