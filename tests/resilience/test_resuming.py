"""A run under another schedule than its checkpoint's is refused with the flags that differ."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_rw.errors import UserError
from megatron_rw.resilience import resuming

SAMPLES = {"train_iters": None, "lr_warmup_iters": 0, "train_samples": 800}


def flags(**given: Any) -> Namespace:
    """A run's arguments once they are validated."""
    args: dict[str, Any] = dict.fromkeys((*resuming.SHAPING, *resuming._SCHEDULE_FLAGS))
    off = ("use_checkpoint_args", "finetune", "skip_train", "no_load_optim", "ckpt_step")
    overrides = ("override_opt_param_scheduler", "use_checkpoint_opt_param_scheduler")
    args |= dict.fromkeys((*off, *overrides, "group_query_attention"), False)
    args |= {"load": "x", "position_embedding_type": "rope", "expert_model_parallel_size": 1}
    args |= {"train_iters": 100, "global_batch_size": 8, "lr": 0.1, "min_lr": 0.0}
    args |= {"lr_warmup_iters": 10, "lr_warmup_samples": 0, "weight_decay_incr_style": "constant"}
    return Namespace(**(args | {"data_fingerprints": {}} | given))


@pytest.mark.parametrize(
    ("there", "here", "message"),
    [
        ({}, {}, None),
        ({}, {"train_iters": 200}, "--train-iters 100 there, 200 here"),
        ({}, {"global_batch_size": 16}, "--global-batch-size 8 there, 16 here"),
        ({"lr_decay_iters": 50}, {}, "--lr-decay-iters 50 there, not given here"),
        ({"lr_decay_iters": 100}, {}, None),
        ({"lr_warmup_iters": 0, "lr_warmup_fraction": 0.1}, {}, None),
        (SAMPLES, {}, "--train-iters not given there, 100 here; --train-samples 800 there, not"),
        (SAMPLES, SAMPLES | {"train_samples": 900}, "--train-samples 800 there, 900 here. Add"),
        ({"max_lr": 0.2}, {}, "schedule: --use-checkpoint-opt_param-scheduler there. Add"),
    ],
)
def test_flags_of_the_schedule(
    there: dict[str, Any],
    here: dict[str, Any],
    message: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    saved = flags(**there)
    schedule = resuming._schedule(saved) | {k: v for k, v in there.items() if k == "max_lr"}
    common = {"args": saved, "opt_param_scheduler": schedule}
    checkpoint = SimpleNamespace(path=Path("x"), common=lambda: common)
    monkeypatch.setattr(resuming, "_loaded", lambda args: checkpoint)
    if message is None:
        resuming.check_resume(flags(**here), False)
    else:
        with pytest.raises(UserError, match=message):
            resuming.check_resume(flags(**here), False)
