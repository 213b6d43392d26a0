#!/usr/bin/env python
"""Pretrain GPT and Llama models on Megatron with loss-based sample reweighting.

The counterpart of Megatron's pretrain_gpt.py: takes the same flags, and adds --reweight-*.

    torchrun --nproc-per-node 8 pretrain_gpt_rw.py <your Megatron flags> \
        --reweight-strategy linupper --reweight-temperature 1.0 --reweight-warmup-steps 2000
"""

import time

_PROGRAM_START = time.time()

import functools  # noqa: E402
import sys  # noqa: E402


def main() -> None:
    """Parse, build, train.

    Imports are made here: the device is chosen before Megatron is imported, and the processes
    that write checkpoints import this file again.
    """
    from megatron_rw.errors import reported
    from megatron_rw.platform import select_device
    from megatron_rw.platform.launch import prepare_process

    with reported("choosing the device", alike=True):
        prepare_process()
        device = select_device(sys.argv[1:])

    from megatron.core.enums import ModelType
    from megatron.training import inprocess_restart, pretrain, set_startup_timestamps

    from megatron_rw import patching
    from megatron_rw.integrations.groups import embedding_ranks
    from megatron_rw.resilience import exit_status, safe_pickle
    from megatron_rw.resilience.watchdog import Progress
    from megatron_rw.training.arguments import (
        announce,
        megatron_config,
        megatron_refusals,
        parse_args,
    )
    from megatron_rw.training.datasets import Domains
    from megatron_rw.training.job import Job
    from megatron_rw.training.patches import early_patches

    set_startup_timestamps(program_start=_PROGRAM_START, main_entry=time.time())
    patching.apply(early_patches())
    safe_pickle.load_weights_only()
    with reported("reading the arguments", alike=True):
        settings = parse_args(device)
        config = megatron_config(settings.megatron)
    args, progress = settings.megatron, Progress()
    with reported("preparing the run", alike=True):
        with megatron_refusals():
            domains = Domains(args)
        job = Job(settings, domains, progress)
        announce(settings, domains.names)
        patching.apply(job.patches)

    pretrain, store = inprocess_restart.maybe_wrap_for_inprocess_restart(pretrain)
    train = functools.partial(
        pretrain,
        config,
        job.datasets_provider,
        ModelType.encoder_or_decoder,
        job.forward_step,
        store=store,
        get_embedding_ranks=functools.partial(embedding_ranks, args),
    )
    with reported(lambda: f"training, at {progress.position}", training=True):
        exit_status.run_to_its_end(args, settings.checkpoints.exit_code_when_unfinished, train)


if __name__ == "__main__":
    main()
