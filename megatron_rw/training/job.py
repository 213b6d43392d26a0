"""What a run consists of beside Megatron: its loss, its callbacks and its patches."""

import functools
import socket

from megatron_rw.integrations.state import ReweightState
from megatron_rw.resilience import writer
from megatron_rw.resilience.saving import SaveGuard
from megatron_rw.resilience.spikes import SpikeLog
from megatron_rw.resilience.step_guard import StepGuard
from megatron_rw.resilience.step_samples import StepSamples
from megatron_rw.resilience.watchdog import Progress
from megatron_rw.training.batch import BatchReader
from megatron_rw.training.callbacks.bad_numbers import NonFiniteCallback, SpikeCallback
from megatron_rw.training.callbacks.base import Callback
from megatron_rw.training.callbacks.kernels import KernelsCallback
from megatron_rw.training.callbacks.metrics import MetricsCallback
from megatron_rw.training.callbacks.progress import ProgressCallback
from megatron_rw.training.callbacks.resume import ResumeCallback
from megatron_rw.training.callbacks.samples import SamplesCallback
from megatron_rw.training.datasets import Domains, datasets_provider
from megatron_rw.training.forward_step import ForwardStep
from megatron_rw.training.loop import TrainingLoop
from megatron_rw.training.loss import PretrainLoss
from megatron_rw.training.patches import patches
from megatron_rw.training.reference import SecondModel
from megatron_rw.training.reporting import MetricsFile, Reporter
from megatron_rw.training.settings import Settings


class Job:
    """A run, built from its validated settings.

    Megatron's `pretrain` gets its `forward_step` and `datasets_provider`.
    """

    def __init__(self, settings: Settings, domains: Domains, progress: Progress) -> None:
        args, nonfinite = settings.megatron, settings.nonfinite
        samples = StepSamples(domains.train_members)
        state = ReweightState(settings.reweight)
        guard = None
        callbacks: list[Callback] = [
            ProgressCallback(args, progress),
            KernelsCallback(settings),
            ResumeCallback(args),
        ]
        second = None
        if settings.reweight.reference_load is not None or settings.reweight.signal == "progress":
            second = SecondModel(settings, callbacks[:1])
        loss = PretrainLoss(settings, state, len(domains), samples, second)
        if args.check_for_nan_in_loss_and_grad:
            guard = StepGuard(nonfinite, samples, settings.megatron_decides)
            callbacks.append(NonFiniteCallback(guard))
        if nonfinite.loss_spike_factor is not None and settings.monitoring.log_dir is not None:
            spikes = SpikeLog(nonfinite.loss_spike_factor, settings.monitoring.log_dir, samples)
            callbacks.append(SpikeCallback(args, spikes))
        dumped = settings.reweight.dump_samples
        if dumped and settings.monitoring.log_dir is not None:
            log_dir = settings.monitoring.log_dir
            callbacks.append(SamplesCallback(dumped, log_dir, domains, loss, samples))
        callbacks.append(MetricsCallback(settings, state, loss, _reporter(settings, domains)))

        loop = TrainingLoop(args, callbacks)
        save_guard = None
        if args.ckpt_format == "torch_dist" and "://" not in (args.save or "://"):
            save_guard = SaveGuard(args.save, settings.checkpoints, args.async_save, loop.saved)
            writer.end_with_this_process()
        self.datasets_provider = functools.partial(datasets_provider, domains, settings.reweight)
        # Megatron then calls it on every rank.
        self.datasets_provider.is_distributed = True  # type: ignore[attr-defined]
        read_batch = BatchReader(args, len(domains), settings.reweight)
        self.forward_step = ForwardStep(settings, read_batch, loss, callbacks, loss.logit_scale)
        self.patches = patches(settings, loop, state, guard, save_guard, second, loss.logit_scale)


def _reporter(settings: Settings, domains: Domains) -> Reporter | None:
    """Returns the reporter of the rank that Megatron logs from, the last; None on the others."""
    args, monitoring = settings.megatron, settings.monitoring
    if args.rank != args.world_size - 1:
        return None
    file = None
    if monitoring.log_dir is not None:
        file = MetricsFile(monitoring.log_dir)
        file.write_arguments(vars(args))
    endpoint = None
    if monitoring.prometheus_port is not None:
        # It imports `prometheus_client`, which is optional.
        from megatron_rw.observability.endpoint import Endpoint

        address, port = monitoring.prometheus_address, monitoring.prometheus_port
        endpoint = Endpoint(address, port, args.seq_length)
        print(f"> metrics at {endpoint.url} (rank {args.rank}, {socket.gethostname()})", flush=True)
    return Reporter(domains.names, file, endpoint)
