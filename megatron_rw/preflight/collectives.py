"""Whether the ranks can form a process group, and on GPUs how fast they are in it.

The speeds are those of Megatron's own GPU sniff test, which a job runs with
--gpu-sniff-test-interval: matrix products on each GPU, an all-reduce over all of them, and messages
between pairs.
"""

import logging
import sys
from datetime import timedelta
from logging.handlers import BufferingHandler
from types import SimpleNamespace

import torch
import torch.distributed as dist
from megatron.training import gpu_sniff_test
from torch.distributed import PrefixStore  # type: ignore[attr-defined]

from megatron_rw.platform import Device
from megatron_rw.preflight.messages import RankMessages
from megatron_rw.resilience import watchdog


def try_collectives(
    messages: RankMessages, backend: str, device: Device
) -> tuple[str | None, list[str]]:
    """Forms a group of all ranks and tries it. Collective over all ranks.

    A watchdog ends the process, with the names of the ranks that keep the others waiting, if the
    group stands still for most of `messages.wait_s`. Returns why collectives do not work, None if
    they do; and, on rank 0 of GPUs, the lines of the sniff test, of which those that begin with
    "OUTLIER" name a rank far from the median.
    """
    progress = watchdog.Progress()
    progress.then("preflight, forming a group of all ranks")
    connection = messages.store.clone()
    connection.set_timeout(timedelta(seconds=2 * watchdog.BEAT_SECONDS))
    dog = watchdog.Watchdog(connection, messages.rank, messages.size, progress, messages.wait_s)
    dog.start()
    try:
        dist.init_process_group(
            backend,
            store=PrefixStore("megatron_rw/preflight/group", messages.store),
            rank=messages.rank,
            world_size=messages.size,
            timeout=timedelta(seconds=messages.wait_s),
        )
        progress.then("preflight, all-reduce over all ranks")
        problem = _check_sum(device)
        progress.then("preflight, Megatron's GPU sniff test")
        speeds = sniff_test() if device == "cuda" else []
        dist.destroy_process_group()
        return problem, speeds
    except RuntimeError as error:
        # torch and its backends raise this where the network or another rank fails.
        return f"{progress.position.doing}: {error}", []
    finally:
        dog.stop()


def _check_sum(device: Device) -> str | None:
    """All-reduces ones over all ranks, and returns what is wrong with the sum."""
    ranks = dist.get_world_size()
    message = torch.ones(1 << 20, device=device)
    dist.all_reduce(message)
    if bool((message == ranks).all()):
        return None
    return (
        f"an all-reduce of ones over {ranks} ranks gave {message.min().item():g} to "
        f"{message.max().item():g} instead of {ranks}"
    )


def sniff_test() -> list[str]:
    """Runs Megatron's GPU sniff test over all ranks; returns what rank 0 logs."""
    logger = gpu_sniff_test.logger
    handler = BufferingHandler(sys.maxsize)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    # The lines are part of the table, and not to be printed twice.
    logger.propagate = False
    try:
        groups = SimpleNamespace(ep=None, dp=dist.group.WORLD, tp=None)
        gpu_sniff_test.run_gpu_sniff_test("preflight", groups)
    finally:
        logger.removeHandler(handler)
    lines = [record.getMessage().strip() for record in handler.buffer]
    return [line for line in lines if line.strip("=")]
