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
    from megatron_rw.errors import UserError
    from megatron_rw.platform import select_device
    from megatron_rw.platform.launch import prepare_process

    try:
        prepare_process()
        device = select_device(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)

    from megatron.core.enums import ModelType
    from megatron.training import inprocess_restart, pretrain, set_startup_timestamps
    from megatron.training.argument_utils import (
        gpt_config_from_args,
        pretrain_cfg_container_from_args,
    )

    from megatron_rw.integrations.state import ReweightState
    from megatron_rw.observability import prometheus
    from megatron_rw.observability.config import MonitoringConfig
    from megatron_rw.observability.memory import explaining
    from megatron_rw.observability.stragglers import ForwardTimes, event_maker
    from megatron_rw.resilience import leaving, safe_pickle
    from megatron_rw.resilience.nonfinite import NonFiniteConfig
    from megatron_rw.resilience.step_guard import StepGuard
    from megatron_rw.resilience.step_samples import StepSamples
    from megatron_rw.resilience.watchdog import Progress
    from megatron_rw.training.arguments import (
        announce,
        one_message,
        parse_args,
        reweight_config,
    )
    from megatron_rw.training.batch import BatchReader
    from megatron_rw.training.checks import settings_of
    from megatron_rw.training.datasets import Domains, datasets_provider
    from megatron_rw.training.embeddings import embedding_ranks
    from megatron_rw.training.forward_step import ForwardStep
    from megatron_rw.training.hooks import Hooks
    from megatron_rw.training.loss import PretrainLoss
    from megatron_rw.training.reporting import Reporter

    set_startup_timestamps(program_start=_PROGRAM_START, main_entry=time.time())
    safe_pickle.install()
    leaving.install()
    with one_message():
        args = parse_args(device)
        config = reweight_config(args)
        megatron_config = pretrain_cfg_container_from_args(args, gpt_config_from_args(args))
        domains = Domains(args)
        monitoring = settings_of(MonitoringConfig, args)
        endpoint = prometheus.serve(monitoring, args.rank, args.world_size, args.seq_length)
    announce(args, device, config, domains.names)

    state = ReweightState(config)
    samples = StepSamples(domains.train_members)
    loss = PretrainLoss(args, config, state, len(domains), samples)
    progress = Progress()
    guard = StepGuard(
        settings_of(NonFiniteConfig, args),
        samples,
        checks=args.check_for_nan_in_loss_and_grad,
        rerun_mode=args.rerun_mode,
        log_dir=args.log_dir,
    )
    times = ForwardTimes(event_maker(device)) if args.log_slowest_rank else None
    reporter = Reporter(args, domains.names, endpoint)
    Hooks(args, config, state, loss, reporter, progress, times, guard).install()

    provider = functools.partial(datasets_provider, domains)
    provider.is_distributed = True  # type: ignore[attr-defined]
    pretrain, store = inprocess_restart.maybe_wrap_for_inprocess_restart(
        explaining(pretrain, args, progress)
    )
    train = functools.partial(
        pretrain,
        megatron_config,
        provider,
        ModelType.encoder_or_decoder,
        ForwardStep(args, BatchReader(args, len(domains)), loss, progress, times, guard),
        store=store,
        get_embedding_ranks=functools.partial(embedding_ranks, args),
    )
    leaving.run_to_its_end(args, train)


if __name__ == "__main__":
    main()
