"""Everything that a run refuses, before any long work: impossible, contradictory or missing.

Each check is a function of parsed settings. It builds nothing, and raises a `UserError` for the
first problem that it finds. Checks of files run on rank 0 alone, so that 4,096 ranks do not ask the
file system the same.
"""

from __future__ import annotations

from megatron_rw.resilience.resuming import check_resume, choose_checkpoint
from megatron_rw.training.refusals.checkpoints import check_folders, check_saving
from megatron_rw.training.refusals.data import (
    check_files,
    check_split,
    check_vocabulary,
    fingerprints,
)
from megatron_rw.training.refusals.launch import check_cpu, check_shape
from megatron_rw.training.refusals.method import (
    check_backend,
    check_bad_numbers,
    check_choices,
    check_kernels,
    check_reweighting,
)
from megatron_rw.training.refusals.monitoring import check_monitoring
from megatron_rw.training.refusals.reference import check_second_model
from megatron_rw.training.refusals.token_values import check_token_values
from megatron_rw.training.settings import Settings


def check_parsed(settings: Settings) -> None:
    """Checks, before Megatron validates, what it would report in its own terms, or too late."""
    args = settings.megatron
    check_backend(settings)
    if args.yaml_cfg is None:
        check_shape(args)
    check_saving(args, settings.checkpoints)
    if settings.device == "cpu":
        check_cpu(args)
    check_monitoring(args, settings.monitoring, settings.device)
    if args.rank == 0:
        check_files(args)
        check_folders(args, settings.monitoring.log_dir)
        for line in choose_checkpoint(args):
            print(f"> {line}", flush=True)


def check_validated(settings: Settings) -> None:
    """Checks the validated arguments against the data, the checkpoint and our settings."""
    args = settings.megatron
    if args.rank == 0:
        args.data_fingerprints = fingerprints(args)
        check_resume(args, settings.checkpoints.allow_changed_data)
        check_split(args)
        check_vocabulary(args)
        check_token_values(args, settings.reweight)
    check_kernels(args, settings.kernels)
    check_choices(settings)
    check_bad_numbers(settings)
    check_reweighting(args, settings.reweight, settings.monitoring.log_dir)
    check_second_model(args, settings.reweight)
