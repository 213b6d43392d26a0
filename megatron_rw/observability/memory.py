"""Explains an out-of-memory error of a device."""

import contextlib
import os
import socket
from argparse import Namespace
from collections.abc import Iterator

import torch
from megatron.core import parallel_state

from megatron_rw.errors import print_error
from megatron_rw.integrations.output_layer import CONFLICTS
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
        print_error(_explanation(args, progress))
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
        f"{torch.cuda.memory_reserved() / gib:.2f} GiB. Less is needed with {remedies(args)}. "
        f"{snapshot}"
    )


def remedies(args: Namespace) -> str:
    """Names flags that lower the memory of a GPU and are not in use yet, cheapest first."""
    tensor, pipeline = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    useful = {
        "--use-distributed-optimizer": (
            not args.use_distributed_optimizer and args.data_parallel_size > 1
        ),
        "--sequence-parallel": tensor > 1 and not args.sequence_parallel,
        f"a --micro-batch-size below {args.micro_batch_size}": args.micro_batch_size > 1,
        **dict.fromkeys(_for_logits(args), True),
        "--recompute-granularity selective": args.recompute_granularity is None,
        f"a --tensor-model-parallel-size above {tensor}": True,
        f"a --pipeline-model-parallel-size above {pipeline}": True,
        "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1": (
            args.recompute_granularity != "full"
        ),
    }
    options = [flag for flag, applies in useful.items() if applies]
    return ", ".join(options[:-1]) + f" or {options[-1]}"


def _for_logits(args: Namespace) -> list[str]:
    """Names flags that lower the memory of the logits, and those whose place they must take."""
    # Memory can run out before Megatron has its process groups.
    parallel = parallel_state.model_parallel_is_initialized()
    if not parallel or not parallel_state.is_pipeline_last_stage(ignore_virtual=True):
        return []
    if args.fused_linear_cross_entropy:
        return ["a lower --logits-budget-mib"]
    flags, instead = [], ""
    if args.cross_entropy_loss_fusion:
        instead = " in place of --cross-entropy-loss-fusion"
    if args.cross_entropy_impl == "megatron":
        flags.append(f"--cross-entropy-impl fused{instead}")
    else:
        instead = " in place of --cross-entropy-impl fused"
    # The heads of multi-token prediction keep their cross-entropy.
    instead = "" if args.mtp_num_layers else instead
    # A size is in use above 1.
    values = [getattr(args, name, None) for name in CONFLICTS]
    if not any(value is True or (value and value != 1) for value in values):
        flags.append(f"--fused-linear-cross-entropy --logits-budget-mib MIB{instead}")
    return flags
