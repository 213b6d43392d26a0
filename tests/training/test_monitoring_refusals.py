"""Flags that cannot do what they say are refused; one that can is not."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import pytest

from megatron_rw.errors import UserError
from megatron_rw.observability.config import MonitoringConfig
from megatron_rw.platform import Device
from megatron_rw.training.refusals.monitoring import check_monitoring

PROFILE = {"profile": True, "use_pytorch_profiler": True, "tensorboard_dir": "board"}
HISTORY = {"record_memory_history": True}


def check(device: Device, **changed: Any) -> None:
    settings: dict[str, Any] = {
        "profile": False,
        "use_pytorch_profiler": False,
        "tensorboard_dir": None,
        "profile_step_start": 10,
        "profile_step_end": 12,
        "train_iters": 12,
        "record_memory_history": False,
        "memory_snapshot_path": "snapshot.pickle",
    }
    ours = {name: changed[name] for name in changed if name not in settings}
    megatron = {name: changed.get(name, value) for name, value in settings.items()}
    MonitoringConfig(**ours)
    check_monitoring(Namespace(**megatron), device)


@pytest.mark.parametrize(
    ("device", "changed", "message"),
    [
        ("cpu", {"profile": True}, "needs a GPU: add --use-pytorch-profiler"),
        ("cpu", PROFILE | {"tensorboard_dir": None}, "beside --tensorboard-dir: add it"),
        ("cpu", PROFILE | {"profile_step_start": 12}, "12 must be below --profile-step-end 12"),
        ("cpu", PROFILE | {"train_iters": 11}, "12 is beyond --train-iters 11"),
        ("cpu", HISTORY, "--record-memory-history needs a GPU"),
        ("cuda", HISTORY | {"memory_snapshot_path": "/no/m.pickle"}, "there is no folder /no"),
        ("cpu", {"prometheus_address": "0.0.0.0"}, "add --prometheus-port"),
        ("cpu", {"prometheus_port": 65536}, r"must be in \[0, 65535\], not 65536"),
    ],
)
def test_refuses(device: Device, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check(device, **changed)


@pytest.mark.parametrize(
    ("device", "changed"),
    [
        ("cpu", PROFILE | {"train_iters": None}),
        ("cuda", {"profile": True} | HISTORY),
    ],
)
def test_lets_pass(device: Device, changed: dict[str, Any]) -> None:
    check(device, **changed)
