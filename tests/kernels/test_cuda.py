"""What is special to the CUDA kernels: how they are compiled and started, and what may be missing.

Where there is a GPU the other tests run on it; here `cuda.core`'s driver is stood in.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import cuda.core
import pytest
import torch
from cuda.pathfinder import DynamicLibNotFoundError

from megatron_rw.kernels import cuda_launch
from megatron_rw.kernels.options import BackendError


def test_no_gpu() -> None:
    """The CPU would do for the tests alone, which put the emulation there."""
    with pytest.raises(BackendError, match=r"need a GPU.* meta: use --reweight-kernels torch"):
        cuda_launch.launcher(torch.device("meta"))


def no_nvrtc(*_: Any) -> None:
    raise DynamicLibNotFoundError("libnvrtc.so")


BREAK: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    r"cuda\.core.*pip install cuda-core": lambda patch: patch.setitem(
        sys.modules, "cuda.core", None
    ),
    "NVRTC.*not found.*pip install": lambda patch: patch.setattr(cuda.core, "Program", no_nvrtc),
    "expected a declaration": lambda patch: patch.setattr(cuda_launch, "source", lambda: "not C++"),
}


@pytest.mark.parametrize("message", BREAK)
def test_kernels_that_cannot_be_compiled(message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without cuda.core, without NVRTC, with a source that is wrong: one line with the remedy."""
    BREAK[message](monkeypatch)
    with pytest.raises(BackendError, match=f"^.*{message}.*--reweight-kernels torch.*$"):
        cuda_launch.compile_kernels("sm_90a")


CALLS: list[Any] = []


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second GPU of compute capability 9.0, whose current stream is 7."""
    CALLS.clear()
    compiled = cuda_launch.compile_kernels

    def loaded(architecture: str) -> Any:
        code = compiled(architecture)
        CALLS.append(architecture)
        return SimpleNamespace(get_kernel=lambda name: code.symbol_mapping[name])

    def device(index: int) -> Any:
        return SimpleNamespace(set_current=lambda: CALLS.append(f"context of {index}"))

    stream = SimpleNamespace(cuda_stream=7)
    monkeypatch.setattr(cuda_launch, "_launchers", {})
    monkeypatch.setattr(cuda_launch, "compile_kernels", loaded)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(cuda.core, "Device", device)
    monkeypatch.setattr(cuda.core, "launch", lambda *what: CALLS.append(what))


def test_compiled_once_and_started_on_torchs_stream(hopper: None) -> None:
    launcher = cuda_launch.launcher(torch.device("cuda", 1))
    assert cuda_launch.launcher(torch.device("cuda", 1)) is launcher
    assert CALLS == ["sm_90a", "context of 1"]
    CALLS.clear()
    launcher("gradient<bf16>", (8192, 3), 256, 1 << 40, -100, 0.5)
    launcher("combine", (1, 1), 32)
    [(stream, config, kernel, *arguments), (again, *_)] = CALLS
    assert stream.__cuda_stream__() == (0, 7)
    assert again is stream
    assert (config.grid, config.block) == ((8192, 3, 1), (256, 1, 1))
    assert b"gradient" in kernel
    assert arguments == [1 << 40, -100, 0.5]
    # A thread of autograd has no context yet.
    CALLS.clear()
    thread = threading.Thread(target=launcher, args=("combine", (1, 1), 32))
    thread.start()
    thread.join()
    assert CALLS[0] == "context of 1"
    assert len(CALLS) == 2
