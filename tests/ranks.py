"""Run a function in real processes that form gloo groups, with megatron-core's own group layout."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import traceback
from collections.abc import Callable
from typing import Any

from tests.ports import free_port

TIMEOUT_S = 120


def run_ranks(processes: int, function: Callable[..., Any], *args: Any, **sizes: int) -> list[Any]:
    """Call `function(*args)` on every rank after `initialize_model_parallel(**sizes)`.

    The function must be importable by name. Returns the results by rank, which must pickle. A rank
    that raises fails the test with its traceback.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.preload"])
    port = free_port()
    results = context.Queue()
    ranks = [
        context.Process(
            target=_rank_main,
            # As bytes: the context's own pickling would share every tensor by file descriptor.
            args=(rank, processes, port, results, function, pickle.dumps(args), sizes),
        )
        for rank in range(processes)
    ]
    for rank in ranks:
        rank.start()
    try:
        collected = dict(results.get(timeout=TIMEOUT_S) for _ in ranks)
    finally:
        for rank in ranks:
            rank.join(timeout=5)
            rank.kill()
    for rank_number, (failed, value) in sorted(collected.items()):
        assert not failed, f"rank {rank_number}:\n{value}"
    return [pickle.loads(collected[rank][1]) for rank in range(processes)]


def _rank_main(
    rank: int,
    processes: int,
    port: int,
    results: Any,
    function: Callable[..., Any],
    args: bytes,
    sizes: dict[str, int],
) -> None:
    import torch
    from megatron.core import parallel_state

    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    try:
        torch.distributed.init_process_group("gloo")
        parallel_state.initialize_model_parallel(**sizes)
        # As bytes again: the sender of a shared tensor may be gone before it is read.
        results.put((rank, (False, pickle.dumps(function(*pickle.loads(args))))))
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    except Exception:
        results.put((rank, (True, traceback.format_exc())))
