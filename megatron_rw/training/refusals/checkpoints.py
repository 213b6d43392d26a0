"""Refusals of where and how a run writes, before it has something to lose."""

import importlib.util
import os
from argparse import Namespace

from megatron.training.utils import print_rank_0

from megatron_rw.errors import UserError
from megatron_rw.resilience.folder import CheckpointFolder, nearest_existing
from megatron_rw.resilience.saving import CheckpointConfig
from megatron_rw.training.refusals.base import flag

# Arguments that name folders to which the run writes.
_WRITTEN = ("save", "tensorboard_dir", "data_cache_path")


def check_saving(args: Namespace, config: CheckpointConfig) -> None:
    """Checks the flags on checkpoints, and on how the run ends, against each other."""
    if args.save is not None and not args.save_interval:
        raise UserError("--save DIR needs --save-interval, the steps between checkpoints.")
    if args.save is None and args.save_interval:
        print_rank_0("WARNING: --save-interval without --save saves nothing: add --save DIR")
    _check_retention(args, config)
    if args.async_save:
        _check_async(args)
    if not 0 <= config.exit_code_when_unfinished <= 125:
        raise UserError(
            "--exit-code-when-unfinished must be in [0, 125], not "
            f"{config.exit_code_when_unfinished}: shells use higher ones for signals."
        )


def _check_retention(args: Namespace, config: CheckpointConfig) -> None:
    for name in ("keep_last", "keep_every"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise UserError(f"{flag(name)} must be 1 or more, not {value}.")
    if config.keep_every is not None and config.keep_last is None:
        raise UserError(
            "--keep-every spares checkpoints that --keep-last deletes: add --keep-last."
        )
    if config.keep_last is not None:
        if args.save is None:
            raise UserError("--keep-last deletes checkpoints in --save: add --save DIR.")
        if args.save_retain_interval is not None:
            raise UserError(
                "--keep-last and Megatron's --save-retain-interval both delete checkpoints: "
                "drop one."
            )


def _check_async(args: Namespace) -> None:
    if args.ckpt_format == "torch":
        raise UserError("--async-save cannot write --ckpt-format torch: use torch_dist.")
    if not args.use_persistent_ckpt_worker:
        # Megatron would save synchronously, and say so once among a thousand lines.
        raise UserError("--async-save needs --use-persistent-ckpt-worker: add it.")
    if args.async_strategy == "nvrx" and importlib.util.find_spec("nvidia_resiliency_ext") is None:
        raise UserError(
            "--async-strategy nvrx needs the package nvidia-resiliency-ext, which is not "
            "installed: install it, or use --async-strategy mcore."
        )


def check_folders(args: Namespace, log_dir: str | None) -> None:
    """Checks that what the run writes can be written, and that what it loads exists."""
    written = {flag(name): getattr(args, name) for name in _WRITTEN} | {"--log-dir": log_dir}
    for name, path in written.items():
        if path is None or "://" in path:
            continue
        existing = nearest_existing(path)
        if not existing.is_dir():
            raise UserError(f"{name} {path}: {existing} is no folder.")
        if not os.access(existing, os.W_OK | os.X_OK):
            raise UserError(
                f"{name} {path}: {existing} cannot be written to: give a "
                "folder that can, or change its permissions."
            )
    if args.pretrained_checkpoint is not None and not (
        _holds_checkpoint(args.load) or _holds_checkpoint(args.pretrained_checkpoint)
    ):
        raise UserError(
            f"--pretrained-checkpoint {args.pretrained_checkpoint} holds no checkpoint."
        )


def _holds_checkpoint(path: str | None) -> bool:
    if path is None:
        return False
    if "://" in path:
        return True
    folder = CheckpointFolder(path)
    return folder.is_release() or folder.tracked() is not None
