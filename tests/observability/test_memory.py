"""Who runs out of memory says so in one line. No GPU has: the error is raised by the test."""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.training.config import ProfilingConfig
from megatron.training.utils import start_memory_history_recording

from megatron_rw.observability.memory import explaining, remedies
from megatron_rw.resilience.watchdog import Progress
from megatron_rw.training.refusals.method import check_kernels
from megatron_rw.training.settings import KernelConfig
from tests.program import run_program


def test_the_rank_says_where_it_was_and_what_would_help(
    tmp_path: Path, data_flags: list[str]
) -> None:
    run = run_program(
        tmp_path,
        *data_flags,
        *"--train-iters 2 --micro-batch-size 8 --pipeline-model-parallel-size 2".split(),
        processes=2,
        module="tests.observability.disturbed",
        patience=0.5,
        environment={"EXHAUSTED_RANK": "1"},
    )
    assert run.status[1] == 1
    line = next(line for line in run.output[1].splitlines() if line.startswith("error: "))
    assert re.search(r"rank 1 on \S+ is out of memory at iteration 1, a micro-batch, with", line)
    assert "with --micro-batch-size 8: allocated " in line
    assert (
        "Less is needed with a --micro-batch-size below 8, --cross-entropy-impl fused, "
        "--fused-linear-cross-entropy --logits-budget-mib MIB, --recompute-granularity selective, "
        "a --tensor-model-parallel-size above 1, a "
    ) in line
    assert "--record-memory-history would leave a snapshot" in line
    # Torch's own words are there as ever.
    assert "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB." in run.output[1]


def arguments(**changed: Any) -> Namespace:
    args = Namespace(
        rank=3, micro_batch_size=1, eval_micro_batch_size=1, recompute_granularity="selective",
        profile_ranks=[], fused_linear_cross_entropy=False, logits_budget_mib=None,
        cross_entropy_impl="megatron", cross_entropy_loss_fusion=False, mtp_num_layers=None,
        record_memory_history=True, memory_snapshot_path="snapshot.pickle",
        use_distributed_optimizer=False, data_parallel_size=1, tensor_model_parallel_size=2,
        pipeline_model_parallel_size=1, context_parallel_size=1, sequence_parallel=True,
        seq_length=64, padded_vocab_size=64, hidden_size=64, params_dtype=torch.float32,
    )  # fmt: skip
    vars(args).update(changed)
    return args


def explanation(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], **changed: Any
) -> str:
    """What is printed when memory runs out, with 1.5 GiB in each figure."""
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved"):
        monkeypatch.setattr(torch.cuda, name, lambda: 3 << 29)
    args = arguments(**changed)
    with pytest.raises(torch.OutOfMemoryError), explaining(args, Progress()):
        raise torch.OutOfMemoryError("CUDA out of memory.")
    return capsys.readouterr().err


def test_names_the_snapshot_that_megatron_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Megatron's own observer, with torch's part of it replaced: there is no allocator here."""
    observers: list[Callable[..., None]] = []
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda *a, **k: None)
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda path: Path(path).touch())
    monkeypatch.setattr(
        torch._C, "_cuda_attach_out_of_memory_observer", observers.append, raising=False
    )
    monkeypatch.setenv("RANK", "3")
    path = str(tmp_path / "memory.pickle")
    start_memory_history_recording(
        ProfilingConfig(record_memory_history=True, memory_snapshot_path=path)
    )
    written = tmp_path / "memory_oom_rank-3.pickle"
    said = explanation(monkeypatch, capsys, memory_snapshot_path=path)
    assert f"There is no snapshot at {written}." in said
    [observer] = observers
    observer(0, 0, 0, 0)
    said = explanation(monkeypatch, capsys, memory_snapshot_path=path)
    assert f"Snapshot: {written}." in said
    assert "allocated 1.50 GiB (at most 1.50), reserved 1.50 GiB." in said


OURS, THEIRS = "--cross-entropy-impl fused", "--cross-entropy-loss-fusion"
LINEAR = "--fused-linear-cross-entropy --logits-budget-mib MIB"


@pytest.mark.parametrize(
    ("given", "offered"),
    [
        ({}, [OURS, LINEAR]),
        (
            {"cross_entropy_loss_fusion": True},
            [f"{OURS} in place of {THEIRS}", f"{LINEAR} in place of {THEIRS}"],
        ),
        ({"cross_entropy_impl": "fused"}, [f"{LINEAR} in place of {OURS}"]),
        ({"cross_entropy_impl": "fused", "mtp_num_layers": 1}, [LINEAR]),
        ({"fp8_output_proj": True}, [OURS]),
        ({"gtp_weight_remat_size": 2}, [OURS]),
    ],
)
def test_flags_for_the_logits_work_with_those_given(
    given: dict[str, Any], offered: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel_state, "model_parallel_is_initialized", lambda: True)
    monkeypatch.setattr(parallel_state, "is_pipeline_last_stage", lambda ignore_virtual: True)
    args = arguments(**given)
    named = re.findall(r"(?:, |^)(--(?:cross|fused).*?)(?=,| or )", remedies(args))
    assert named == offered
    for flags in offered:
        added, _, dropped = flags.partition(" in place of ")
        ours = OURS in added or (args.cross_entropy_impl == "fused" and dropped != OURS)
        kernels = KernelConfig(
            cross_entropy_impl="fused" if ours else "megatron",
            fused_linear_cross_entropy=LINEAR in added,
            logits_budget_mib=64 if LINEAR in added else None,
        )
        fusion = args.cross_entropy_loss_fusion and dropped != THEIRS
        check_kernels(Namespace(**vars(args) | {"cross_entropy_loss_fusion": fusion}), kernels)


def test_offers_what_is_not_in_use(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = explanation(monkeypatch, capsys, recompute_granularity="full", profile_ranks=[0])
    assert (
        "Less is needed with a --tensor-model-parallel-size above 2 or a "
        "--pipeline-model-parallel-size above 1. --record-memory-history would leave a snapshot"
    ) in said
