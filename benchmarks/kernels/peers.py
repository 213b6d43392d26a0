"""Other implementations of the cross-entropy behind one call, over a vocabulary that is not cut.

`LOSSES` take logits `[s, b, V]` and labels, `LAYERS` hidden states `[s, b, h]`, the output layer's
weight `[V, h]` and labels, all contiguous; both return the losses `[s, b]`, differentiable. Each
has the place of its function, and a call that takes that function and the tensors.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rw.kernels import vocab_parallel_cross_entropy

Call = Callable[..., Any]
Peers = dict[str, tuple[str, Call]]


def available(device: torch.device, peers: Peers) -> tuple[dict[str, Call], dict[str, str]]:
    """Calls of the peers that can run on the device, and why others cannot.

    `torch.distributed` must be initialised with a world of one: Megatron reduces over it.
    """
    calls: dict[str, Call] = {}
    missing: dict[str, str] = {}
    for name, (place, call) in peers.items():
        if device.type == "cpu" and not place.startswith(("torch.", "megatron.")):
            missing[name] = "needs a GPU"
            continue
        try:
            calls[name] = partial(call, _function(place))
        except Exception as error:  # Whatever a package raises at its import, it is missing.
            missing[name] = f"{type(error).__name__}: {error}"[:300]
    return calls, missing


def _function(place: str) -> Any:
    module, name = place.split(":")
    load = _transformer_engine if module.startswith("transformer_engine") else import_module
    return getattr(load(module), name)


def _transformer_engine(name: str) -> ModuleType:
    """Import a module of Transformer Engine, out of its wheel where it is not installed.

    Its kernels are Triton, but the package imports compiled libraries. It is not to be installed
    without them: Megatron would find the package, and fail to import it.
    """
    try:
        return import_module(name)
    except (ImportError, RuntimeError, OSError) as error:
        wheels = Path(__file__).resolve().parents[1] / "wheels"
        wheel = max(wheels.glob("transformer_engine-*.whl"), default=None)
        if wheel is None:
            raise ImportError(f"{error}; no wheel of it in benchmarks/wheels") from error
    # Packages without their `__init__`, and one decorator out of a module that needs the libraries.
    for package in ("", ".common", ".common.triton", ".pytorch", ".pytorch.triton"):
        stub = ModuleType(f"transformer_engine{package}")
        stub.__path__ = [f"{wheel}/transformer_engine{package.replace('.', '/')}"]
        sys.modules[stub.__name__] = stub
    jit = sys.modules["transformer_engine.pytorch.jit"] = ModuleType("jit")
    vars(jit)["no_torch_dynamo"] = lambda: torch.compiler.disable
    try:
        return import_module(name)
    finally:
        # Megatron would take the stubs for the package.
        for loaded in [key for key in sys.modules if key.split(".")[0] == "transformer_engine"]:
            del sys.modules[loaded]


def _flat(call: Call) -> Call:
    """Of one whose function takes all tokens in one dimension."""

    def flat(function: Any, first: Tensor, *rest: Tensor) -> Any:
        *weight, target = rest
        return call(function, first.flatten(0, 1), *weight, target.flatten()).view_as(target)

    return flat


def _core(function: Any, logits: Tensor, target: Tensor) -> Any:
    return function(logits, target, tp_group=dist.group.WORLD)


def _after_core(loss: Call) -> Call:
    """Core's linear layer, and then a loss of logits."""

    def layer(linear: Any, hidden: Tensor, weight: Tensor, target: Tensor) -> Any:
        # Bias, fused accumulation, all-reduce of the gradient, sequence parallelism.
        logits = linear(hidden, weight, None, False, False, False, tp_group=dist.group.WORLD)
        return loss(logits, target)

    return layer


_EAGER = _flat(lambda f, x, y: f(x.float(), y, reduction="none"))
_CORE = "megatron.core.tensor_parallel"
_LINEAR = f"{_CORE}.layers:linear_with_grad_accumulation_and_async_allreduce"
_UNFUSED = f"{_CORE}.cross_entropy:vocab_parallel_cross_entropy"
_FUSED = "megatron.core.fusions.fused_cross_entropy:fused_vocab_parallel_cross_entropy"
# Ignored label, z-loss, label smoothing and reduction of Liger.
_PLAIN = (-100, 0.0, 0.0, "none")

LOSSES: Peers = {
    "torch eager": ("torch.nn.functional:cross_entropy", _EAGER),
    "torch.compile": ("torch.nn.functional:cross_entropy", torch.compile(_EAGER, dynamic=False)),
    "core": (_UNFUSED, _core),
    "core, native fused": (_FUSED, _core),
    "Liger, vocab-parallel": (
        "liger_kernel.ops.vocab_parallel_cross_entropy:LigerVocabParallelCEFunction",
        # Group, ignored label, label smoothing, its formula and its scope.
        lambda f, x, y: f.apply(x, y, None, -100, 0.0, "megatron", "partition"),
    ),
    # Losses and their gradient are in bf16, and it waits for the GPU.
    "Liger": (
        "liger_kernel.ops.cross_entropy:LigerCrossEntropyFunction",
        _flat(lambda f, x, y: f.apply(x, y, None, *_PLAIN)[0]),
    ),
    "quack": (
        "quack.cross_entropy:cross_entropy",
        _flat(lambda f, x, y: f(x, y, reduction="none", inplace_backward=True)),
    ),
    "Transformer Engine": (
        "transformer_engine.pytorch.cross_entropy:parallel_cross_entropy",
        lambda f, x, y: f(x, y, overwrite_input=True),
    ),
}
LAYERS: Peers = {
    "core, our loss": (_LINEAR, _after_core(lambda *z: vocab_parallel_cross_entropy(*z).losses)),
    "core": (_LINEAR, _after_core(lambda *z: _core(_function(_UNFUSED), *z))),
    "core, native fused": (_LINEAR, _after_core(lambda *z: _core(_function(_FUSED), *z))),
    "Liger": (
        "liger_kernel.ops.fused_linear_cross_entropy:LigerFusedLinearCrossEntropyFunction",
        _flat(lambda f, x, w, y: f.apply(x, w, y, None, None, *_PLAIN)[0]),
    ),
    # Without its filter, which drops probabilities before it knows their weights.
    "cut-cross-entropy": (
        "cut_cross_entropy:linear_cross_entropy",
        _flat(lambda f, x, w, y: f(x, w, y, reduction="none", filter_eps=None)),
    ),
    # A product and its loss: its fused kernel takes one upstream gradient for all tokens.
    "quack": (
        "quack.cross_entropy:cross_entropy",
        _flat(lambda f, x, w, y: f(x @ w.T, y, reduction="none", inplace_backward=True)),
    ),
    "torch": (
        "torch.nn.functional:linear_cross_entropy",
        _flat(lambda f, x, w, y: f(x, w, y, reduction="none")),
    ),
}
