"""Explains an out-of-memory error of a device."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from argparse import Namespace
from collections.abc import Iterator

import torch
from megatron.core import parallel_state

from megatron_rw.resilience.watchdog import Progress


@contextlib.contextmanager
def explaining(args: Namespace, progress: Progress) -> Iterator[None]:
    """Prints a line that explains an out-of-memory error of the body, before the error passes.

    The line names rank, host and place, how full the device is, and flags that would help. With
    Megatron's --record-memory-history it names the snapshot that Megatron has written of the failed
    allocation, for pytorch.org/memory_viz.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        print(f"error: {_explanation(args, progress)}", file=sys.stderr, flush=True)
        raise


def _explanation(args: Namespace, progress: Progress) -> str:
    gib = 2.0**30
    # Where Megatron writes this rank's snapshot.
    path = f"_oom_rank-{args.rank}".join(os.path.splitext(args.memory_snapshot_path))
    if not args.record_memory_history or args.rank not in (args.profile_ranks or [args.rank]):
        snapshot = "--record-memory-history would leave a snapshot of what took it."
    elif os.path.exists(path):
        snapshot = f"Snapshot: {path}."
    else:
        snapshot = f"There is no snapshot at {path}."
    return (
        f"rank {args.rank} on {socket.gethostname()} is out of memory at {progress.position}, "
        f"with --micro-batch-size {args.micro_batch_size}: allocated "
        f"{torch.cuda.memory_allocated() / gib:.2f} GiB (at most "
        f"{torch.cuda.max_memory_allocated() / gib:.2f}), reserved "
        f"{torch.cuda.memory_reserved() / gib:.2f} GiB. Less is needed with {_remedies(args)}. "
        f"{snapshot}"
    )


def _remedies(args: Namespace) -> str:
    """Lists the flags that would save memory and are not in use yet."""
    parallel = parallel_state.model_parallel_is_initialized()
    has_logits = parallel and parallel_state.is_pipeline_last_stage(ignore_virtual=True)
    remedies = []
    if args.micro_batch_size > 1:
        remedies.append("a smaller --micro-batch-size")
    if args.recompute_granularity is None:
        remedies.append("--recompute-granularity selective (or full)")
    elif args.recompute_granularity == "selective":
        remedies.append("--recompute-granularity full")
    if has_logits and not args.fused_linear_cross_entropy:
        remedies.append("--fused-linear-cross-entropy")
    elif has_logits:
        lower = args.logits_budget_mib is not None
        remedies.append("a lower --logits-budget-mib" if lower else "--logits-budget-mib")
    return ", ".join(remedies) or "more ranks of model parallelism"
