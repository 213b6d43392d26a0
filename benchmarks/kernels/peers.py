"""Other implementations of the cross-entropy behind one call, for timing and for errors.

All of them run over a vocabulary that is not cut (tensor parallel size 1): `LOSSES` on logits that
exist, `LAYERS` on hidden states and the output layer's weight.

Transformer Engine's kernels are Triton, but its package imports compiled libraries. Where those are
missing, `available` reads three files straight out of `benchmarks/wheels/transformer_engine-*.whl`
(`pip download --no-deps --only-binary :all: transformer-engine`). That wheel must not be installed:
without the libraries, Megatron finds the package and its import fails.

Megatron's functions and `torch.compile` specialise to the first shape and may turn to dynamic
shapes at the second: time one shape per process, or call `torch.compiler.reset()` in between.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

Loss = Callable[..., Tensor]
Finder = Callable[[torch.device], tuple[str, Loss]]
WHEELS = Path(__file__).resolve().parents[1] / "wheels"
IGNORE_INDEX = -100


@dataclass(frozen=True)
class Peer:
    """One implementation.

    Attributes:
        name: short, for a table's column.
        version: of its package.
        loss: of `LOSSES`, logits `[s, b, V]` that require a gradient and target `[s, b]` int64 to
            the loss per token `[s, b]`, differentiable; of `LAYERS`, hidden states `[s, b, h]`,
            weight `[V, h]` and target. All contiguous.
        note: what differs from the others.
    """

    name: str
    version: str
    loss: Loss
    note: str = ""


def available(
    device: torch.device, candidates: dict[str, tuple[Finder, str]]
) -> tuple[list[Peer], dict[str, str]]:
    """Peers that can run on the device, and name -> reason for those that cannot.

    `torch.distributed` must be initialised with a world of one: Megatron reduces over it.

    Args:
        device: where they shall run.
        candidates: `LOSSES` or `LAYERS`.
    """
    peers: list[Peer] = []
    missing: dict[str, str] = {}
    for name, (find, note) in candidates.items():
        try:
            peers.append(Peer(name, *find(device), note))
        except (ImportError, AttributeError, OSError, RuntimeError) as error:
            missing[name] = f"{type(error).__name__}: {error}"
    return peers, missing


def _eager(logits: Tensor, target: Tensor) -> Tensor:
    losses = F.cross_entropy(logits.float().flatten(0, 1), target.flatten(), reduction="none")
    return losses.view_as(target)


def _torch_eager(device: torch.device) -> tuple[str, Loss]:
    return str(torch.__version__), _eager


def _torch_compile(device: torch.device) -> tuple[str, Loss]:
    return str(torch.__version__), torch.compile(_eager, dynamic=False)


def _megatron(module: str, function: str, device: torch.device) -> tuple[str, Loss]:
    if not dist.is_initialized():
        raise RuntimeError("torch.distributed is not initialised")
    loss = getattr(import_module(module), function)
    return version("megatron-core"), partial(loss, tp_group=dist.group.WORLD)


def _liger_vocab_parallel(device: torch.device) -> tuple[str, Loss]:
    _require_triton(device)
    function = import_module(
        "liger_kernel.ops.vocab_parallel_cross_entropy"
    ).LigerVocabParallelCEFunction

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        # Group, ignored label, label smoothing, its formula and its scope.
        losses: Tensor = function.apply(
            logits, target, None, IGNORE_INDEX, 0.0, "megatron", "partition"
        )
        return losses

    return version("liger-kernel"), loss


def _liger(device: torch.device) -> tuple[str, Loss]:
    _require_triton(device)
    function = import_module("liger_kernel.ops.cross_entropy").LigerCrossEntropyFunction

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        # Class weights, ignored label, z-loss, label smoothing, reduction. Losses first of four.
        losses: Tensor = function.apply(
            logits.flatten(0, 1), target.flatten(), None, IGNORE_INDEX, 0.0, 0.0, "none"
        )[0]
        return losses.view_as(target)

    return version("liger-kernel"), loss


def _transformer_engine(overwrite_input: bool, device: torch.device) -> tuple[str, Loss]:
    if device.type != "cuda":
        raise RuntimeError("takes CUDA tensors only")
    release, module = transformer_engine()
    return release, partial(module.parallel_cross_entropy, overwrite_input=overwrite_input)


@cache
def transformer_engine() -> tuple[str, ModuleType]:
    """Version and `transformer_engine.pytorch.cross_entropy`, installed or out of the wheel.

    Raises:
        ImportError: neither is there, or the wheel lacks the files.
    """
    name = "transformer_engine.pytorch.cross_entropy"
    try:
        return version("transformer-engine"), import_module(name)
    except (ImportError, RuntimeError, OSError) as error:
        wheel = max(WHEELS.glob("transformer_engine-*.whl"), default=None)
        if wheel is None:
            raise ImportError(f"{error}; no wheel of it in {WHEELS}") from error
    # Packages without their `__init__`, and one decorator out of a module that needs the libraries.
    for package in ("", ".common", ".common.triton", ".pytorch", ".pytorch.triton"):
        stub = ModuleType(f"transformer_engine{package}")
        stub.__path__ = [f"{wheel}/transformer_engine{package.replace('.', '/')}"]
        sys.modules[stub.__name__] = stub
    jit = sys.modules["transformer_engine.pytorch.jit"] = ModuleType("jit")
    vars(jit)["no_torch_dynamo"] = lambda: torch.compiler.disable
    try:
        return wheel.name.split("-")[1], import_module(name)
    finally:
        # Megatron would take the stubs for the package.
        for loaded in [key for key in sys.modules if key.split(".")[0] == "transformer_engine"]:
            del sys.modules[loaded]


def _require_triton(device: torch.device) -> None:
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("needs a GPU, or TRITON_INTERPRET=1 before triton is imported")


def _core_layer(loss: Finder, device: torch.device) -> tuple[str, Loss]:
    """Core's output layer, which has a loss of core's or ours after it."""
    release, of_logits = loss(device)
    linear = import_module(
        "megatron.core.tensor_parallel.layers"
    ).linear_with_grad_accumulation_and_async_allreduce

    def layer(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        # Bias, fused accumulation, all-reduce of the gradient, sequence parallelism.
        logits = linear(hidden, weight, None, False, False, False, tp_group=dist.group.WORLD)
        return of_logits(logits, target)

    return release, layer


def _ours(device: torch.device) -> tuple[str, Loss]:
    return "", import_module("megatron_rw.kernels").vocab_parallel_cross_entropy


def _liger_layer(device: torch.device) -> tuple[str, Loss]:
    _require_triton(device)
    function = import_module(
        "liger_kernel.ops.fused_linear_cross_entropy"
    ).LigerFusedLinearCrossEntropyFunction

    def layer(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        # Bias, class weights, ignored label, z-loss, label smoothing, reduction. First of four.
        given = (hidden.flatten(0, 1), weight, target.flatten(), None, None, IGNORE_INDEX)
        losses: Tensor = function.apply(*given, 0.0, 0.0, "none")[0]
        return losses.view_as(target)

    return version("liger-kernel"), layer


def _cut(device: torch.device) -> tuple[str, Loss]:
    if device.type != "cuda":
        raise RuntimeError("needs a GPU")
    function = import_module("cut_cross_entropy").linear_cross_entropy

    def layer(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        given = (hidden.flatten(0, 1), weight, target.flatten())
        # Without its filter, which drops probabilities before it knows their weights.
        losses: Tensor = function(*given, reduction="none", filter_eps=None)
        return losses.view_as(target)

    return version("cut-cross-entropy"), layer


def _torch_layer(device: torch.device) -> tuple[str, Loss]:
    function = getattr(F, "linear_cross_entropy", None)
    if function is None:
        raise AttributeError(f"torch {torch.__version__} has no linear_cross_entropy")

    def layer(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        given = (hidden.flatten(0, 1), weight, target.flatten())
        losses: Tensor = function(*given, reduction="none")
        return losses.view_as(target)

    return str(torch.__version__), layer


_CORE = "megatron.core.tensor_parallel.cross_entropy"
_CORE_FUSED = "megatron.core.fusions.fused_cross_entropy"
_core = partial(_megatron, _CORE, "vocab_parallel_cross_entropy")
_core_fused = partial(_megatron, _CORE_FUSED, "fused_vocab_parallel_cross_entropy")

LAYERS: dict[str, tuple[Finder, str]] = {
    "core, core's loss": (partial(_core_layer, _core), "keeps an fp32 softmax"),
    "core, native fused loss": (partial(_core_layer, _core_fused), "keeps an fp32 softmax"),
    "core, our loss": (partial(_core_layer, _ours), "gradient written over the logits"),
    "Liger": (_liger_layer, "computes logits again, some tokens at a time"),
    "cut-cross-entropy": (_cut, "computes logits again; exact, without its filter"),
    "torch": (_torch_layer, "computes logits again"),
}
LOSSES: dict[str, tuple[Finder, str]] = {
    "torch eager": (_torch_eager, "fp32 copy of the logits"),
    "torch.compile": (_torch_compile, "compiles at the first call of a shape"),
    "Megatron": (
        _core,
        "keeps an fp32 softmax; three all-reduces over a group of one",
    ),
    "Megatron native fused": (
        _core_fused,
        "compiles; keeps an fp32 softmax; two all-reduces over a group of one",
    ),
    "Liger vocab-parallel": (_liger_vocab_parallel, "keeps exp(logits − max) in fp32"),
    "Liger": (
        _liger,
        "losses and their gradient in bf16; writes the unweighted gradient over the logits in the "
        "forward pass; waits for the GPU",
    ),
    "Transformer Engine": (
        partial(_transformer_engine, False),
        "copies the logits and writes the gradient over the copy",
    ),
    "Transformer Engine in place": (
        partial(_transformer_engine, True),
        "writes the gradient over the logits",
    ),
}
