"""Megatron's profiler takes the steps that its flags name, also in a run that was resumed."""

from __future__ import annotations

import gzip
import json
import re
from argparse import Namespace
from pathlib import Path

from megatron_rw.training.callbacks.resume import ResumeCallback
from tests.program import run_program


def profiled_steps(directory: Path) -> set[int]:
    """Steps in the trace of rank 0, counted from where its process began."""
    with gzip.open(directory / "torch_profile" / "rank-0.json.gz") as trace:
        names = {event.get("name", "") for event in json.load(trace)["traceEvents"]}
    assert "aten::mm" in names
    return {int(found[1]) for name in names if (found := re.fullmatch(r"ProfilerStep#(\d+)", name))}


def test_profiles_the_steps_that_are_asked_for(tmp_path: Path, data_flags: list[str]) -> None:
    def train(name: str, start: int, end: int, *flags: str) -> set[int]:
        directory = tmp_path / name
        run_program(
            directory,
            *data_flags,
            *"--train-iters 12 --micro-batch-size 8 --save-interval 100".split(),
            *"--profile --use-pytorch-profiler --profile-ranks 0 --profile-step-start".split(),
            *(str(start), "--profile-step-end", str(end)),
            *("--tensorboard-dir", str(directory / "board")),
            *("--save", str(tmp_path / "checkpoints"), *flags),
            processes=2,
        ).check()
        assert not (directory / "torch_profile" / "rank-1.json.gz").exists()
        return profiled_steps(directory)

    assert train("begun", 2, 4, "--exit-interval", "6") == {2, 3}
    # Iterations 8 and 9 of all are 2 and 3 of this process; it stops once 10 is over.
    resumed = train("resumed", 8, 10, "--load", str(tmp_path / "checkpoints"))
    assert {6 + step for step in resumed} == {8, 9, 10}


def test_does_not_profile_what_lies_before_the_resume() -> None:
    args = Namespace(
        profile=True,
        use_pytorch_profiler=True,
        skip_train=True,
        iteration=10,
        profile_step_start=8,
        profile_step_end=10,
    )
    ResumeCallback(args).on_loaded()
    assert not args.profile
