"""Refusals of flags for profiles and snapshots, before any long work."""

import os
from argparse import Namespace

from megatron_rw.errors import UserError
from megatron_rw.platform import Device


def check_monitoring(args: Namespace, device: Device) -> None:
    """Checks the flags against each other, the device and the disk."""
    if args.profile:
        _check_profile(args, device)
    if args.record_memory_history:
        if device == "cpu":
            raise UserError("--record-memory-history needs a GPU: drop it to run on the CPU.")
        folder = os.path.dirname(os.path.abspath(args.memory_snapshot_path))
        if not os.path.isdir(folder):
            raise UserError(
                f"--memory-snapshot-path {args.memory_snapshot_path}: there is no folder {folder}."
            )


def _check_profile(args: Namespace, device: Device) -> None:
    if not args.use_pytorch_profiler:
        if device == "cpu":
            raise UserError(
                "--profile is for Nsight Systems and needs a GPU: add --use-pytorch-profiler to "
                "run on the CPU."
            )
        return
    if args.tensorboard_dir is None:
        raise UserError(
            "--use-pytorch-profiler writes into torch_profile beside --tensorboard-dir: add it."
        )
    if args.profile_step_start >= args.profile_step_end:
        raise UserError(
            f"--profile-step-start {args.profile_step_start} must be below --profile-step-end "
            f"{args.profile_step_end}."
        )
    if args.train_iters and args.profile_step_end > args.train_iters:
        raise UserError(
            f"--profile-step-end {args.profile_step_end} is beyond --train-iters "
            f"{args.train_iters}, so that no profile would be written: lower it."
        )
