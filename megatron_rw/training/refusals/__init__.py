"""Everything that a run refuses, before any long work: impossible, contradictory or missing.

Each check is a function of parsed settings. It builds nothing, and raises a `UserError` for the
first problem that it finds. Checks of files run on rank 0 alone, so that 4,096 ranks do not ask the
file system the same.
"""

from megatron_rw.resilience.resuming import check_resume, choose_checkpoint
from megatron_rw.training.refusals import checkpoints, data, launch, method, monitoring, reference
from megatron_rw.training.refusals.token_values import check_token_values
from megatron_rw.training.settings import Settings


def check_parsed(settings: Settings) -> None:
    """Checks, before Megatron validates, what it would report in its own terms, or too late."""
    args = settings.megatron
    method.check_backend(settings)
    if args.yaml_cfg is None:
        launch.check_shape(args)
    checkpoints.check_saving(args, settings.checkpoints)
    if settings.device == "cpu":
        launch.check_cpu(args)
    monitoring.check_monitoring(args, settings.device)
    if args.rank == 0:
        data.check_files(args)
        checkpoints.check_folders(args, settings.monitoring.log_dir)
        for line in choose_checkpoint(args):
            print(f"> {line}", flush=True)


def check_validated(settings: Settings) -> None:
    """Checks the validated arguments against the data, the checkpoint and our settings."""
    args = settings.megatron
    if args.rank == 0:
        args.data_fingerprints = data.fingerprints(args)
        check_resume(args, settings.checkpoints.allow_changed_data)
        data.check_split(args)
        data.check_vocabulary(args)
        check_token_values(args, settings.reweight)
    method.check_kernels(args, settings.kernels)
    method.check_choices(settings)
    method.check_bad_numbers(settings)
    method.check_reweighting(args, settings.reweight, settings.monitoring.log_dir)
    reference.check_second_model(args, settings.reweight)
