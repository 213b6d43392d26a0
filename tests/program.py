"""Run the real program, `pretrain_gpt_rw.py`, in real processes over gloo, and read its results.

A fork server imports torch and Megatron once; every rank is a fork of it that calls `main()` with
its own environment, as torchrun would start it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import multiprocessing
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from tests.ports import free_port

# A Llama shape small enough to step in milliseconds, with everything the layouts cut: heads and
# key-value groups for TP, layers for PP, a vocabulary that needs padding.
MODEL = (
    "--num-layers 4 --hidden-size 32 --ffn-hidden-size 64 --num-attention-heads 4 "
    "--group-query-attention --num-query-groups 2 --seq-length 32 --max-position-embeddings 32 "
    "--swiglu --normalization RMSNorm --disable-bias-linear --position-embedding-type rope "
    "--untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0 "
    "--make-vocab-size-divisible-by 8 --no-create-attention-mask-in-dataloader"
).split()
TRAINING = (
    "--lr 1e-2 --lr-decay-style constant --clip-grad 1.0 --weight-decay 0.1 "
    "--log-interval 1 --eval-iters 1 --eval-interval 1000 --num-workers 0 --seed 7"
).split()
TP2, PP2 = "--tensor-model-parallel-size 2", "--pipeline-model-parallel-size 2"
# Four stages of one layer each, of which a rank holds two.
VPP2 = f"{PP2} --num-virtual-stages-per-pipeline-rank 2"
OVERLAP = "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"

TIMEOUT_S = 240
# Scripts that know --log-dir.
OURS = (
    "pretrain_gpt_rw",
    "tests.exactness.program_with_oracle",
    "tests.faults.injected",
    "tests.training.watched",
    "tests.training.watched_reference",
)


@dataclass(frozen=True)
class Run:
    """A finished run: exit status and output by rank, and where it wrote."""

    status: list[int | None]
    output: list[str]
    directory: Path
    seconds: float = field(compare=False, default=0.0)
    # Whether a rank had to be killed long after another had failed, or after all time was up.
    hung: bool = False

    @property
    def all_output(self) -> str:
        return "\n".join(f"--- rank {i}\n{text}" for i, text in enumerate(self.output))

    def check(self) -> Run:
        """Fail the test with the output unless every rank ended with status 0."""
        assert all(status == 0 for status in self.status), f"{self.status}\n{self.all_output}"
        return self

    @functools.cached_property
    def metrics(self) -> list[dict[str, Any]]:
        lines = (self.directory / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def train_metrics(self) -> list[dict[str, Any]]:
        return [record for record in self.metrics if record["type"] == "train"]

    def log_lines(self) -> list[str]:
        """Megatron's own lines on iterations and evaluations, without what differs between runs.

        Those are the wall-clock stamps and the step time.
        """
        kept = []
        for line in self.output[-1].splitlines():
            if re.search(r"^ \[.*\] iteration +\d+/|^ validation loss at ", line):
                line = re.sub(r"^ \[[^\]]*\]", "", line)
                kept.append(re.sub(r"elapsed time per iteration \(ms\): [0-9.]+", "", line))
        return kept

    def checkpoint(self, iteration: int) -> dict[str, torch.Tensor]:
        """Every tensor of a checkpoint, whole, by name: the same names in every layout."""
        return read_checkpoint(self.directory / "checkpoints" / f"iter_{iteration:07d}")


def steps_so_far(directory: Path) -> int:
    """How many a run has logged, those that were done twice counted twice."""
    metrics = directory / "metrics.jsonl"
    return metrics.read_text().count('"type": "train"') if metrics.exists() else 0


def without_time(record: dict[str, Any]) -> dict[str, Any]:
    """A record of metrics.jsonl, without what differs between equal runs."""
    return {key: value for key, value in record.items() if key not in ("time", "speed")}


def assert_same_bits(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(mine[name], tensor), name


def read_checkpoint(path: Path) -> dict[str, torch.Tensor]:
    reader = FileSystemReader(path)
    entries = reader.read_metadata().state_dict_metadata
    state: dict[str, Any] = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    load(state, storage_reader=reader, no_dist=True)
    return state


def run_program(
    directory: Path,
    *flags: str,
    processes: int = 1,
    base: Sequence[str] = (*MODEL, *TRAINING),
    module: str = "pretrain_gpt_rw",
    prepare: Callable[[], object] | None = None,
    metrics: bool = True,
    disturb: Callable[[Sequence[int]], bool] | None = None,
    patience: float = 5.0,
    environment: Mapping[str, str | None] | None = None,
) -> Run:
    """Run `main()` of a module with the small model and our paths, and wait for it.

    Flags win over those of `base`. Every rank calls `prepare` before `main()`, to replace what is
    to go wrong; it must pickle. `disturb` is called with the process ids of all ranks, again and
    again until it returns True. Once a rank has failed, the others may go on for `patience`
    seconds. In the environment of every rank, None unsets a variable.
    """
    directory.mkdir(parents=True, exist_ok=True)
    argv = [*base, *flags]
    if metrics and module in OURS:
        argv += ["--log-dir", str(directory)]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.preload"])
    port = free_port()
    outputs = [directory / f"rank{rank}.log" for rank in range(processes)]
    ranks = [
        context.Process(
            target=_rank_main,
            args=(
                module,
                argv,
                {**_environment(rank, processes, port), **(environment or {})},
                outputs[rank],
                prepare,
            ),
        )
        for rank in range(processes)
    ]
    start = time.perf_counter()
    for rank in ranks:
        rank.start()
    hung = _wait(ranks, disturb, patience)
    return Run(
        [rank.exitcode for rank in ranks],
        [path.read_text() if path.exists() else "" for path in outputs],
        directory,
        time.perf_counter() - start,
        hung,
    )


def _environment(rank: int, processes: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _rank_main(
    module: str,
    argv: Sequence[str],
    env: Mapping[str, str | None],
    output: Path,
    prepare: Callable[[], object] | None,
) -> None:
    os.setpgid(0, 0)
    log = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    for name, value in env.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    sys.argv = [module, *argv]
    torch.set_num_threads(1)
    # As in a program that was started by itself: Megatron's data loaders cannot be pickled.
    multiprocessing.set_start_method("fork", force=True)
    if prepare is not None:
        prepare()
    sys.exit(importlib.import_module(module).main())


def kill_when(reached: Callable[[], bool]) -> Callable[[Sequence[int]], bool]:
    """A disturbance: SIGKILL to all ranks once something is the case."""
    return signal_when(reached, signal.SIGKILL)


def signal_when(
    reached: Callable[[], bool], number: signal.Signals, ranks: Sequence[int] | None = None
) -> Callable[[Sequence[int]], bool]:
    """A disturbance: a signal to some ranks, or to all, once something is the case."""

    def disturb(pids: Sequence[int]) -> bool:
        if not reached():
            return False
        for rank, pid in enumerate(pids):
            if ranks is None or rank in ranks:
                os.kill(pid, number)
        return True

    return disturb


def in_turn(*disturbances: Callable[[Sequence[int]], bool]) -> Callable[[Sequence[int]], bool]:
    """A disturbance: several, each once the one before has happened."""
    left = list(disturbances)

    def disturb(pids: Sequence[int]) -> bool:
        if left[0](pids):
            del left[0]
        return not left

    return disturb


def _wait(
    ranks: Sequence[Any], disturb: Callable[[Sequence[int]], bool] | None, patience: float
) -> bool:
    """Wait for all; once one has failed, give the others a moment, then kill them and say so."""
    deadline = time.monotonic() + TIMEOUT_S
    while any(rank.is_alive() for rank in ranks) and time.monotonic() < deadline:
        if disturb is not None and disturb([rank.pid for rank in ranks]):
            disturb = None
        if any(rank.exitcode not in (None, 0) for rank in ranks):
            deadline = min(deadline, time.monotonic() + patience)
        time.sleep(0.002 if disturb else 0.01)
    hung = any(rank.is_alive() for rank in ranks) and time.monotonic() >= deadline
    for rank in ranks:
        # With its whole process group: a killed rank leaves the process that manages its
        # checkpoint writer behind.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(rank.pid, signal.SIGKILL)
        rank.kill()
        rank.join()
    return hung
