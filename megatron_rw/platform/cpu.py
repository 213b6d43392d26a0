"""Runs the released Megatron, unmodified, on the CPU over gloo.

Megatron names CUDA in device literals, streams, events, memory statistics and random-number state.
Each name is redirected here, with the code of Megatron that needs it. The random state of the "CUDA
generator" becomes that of torch's CPU generator, because here dropout draws from that one.

Nothing here is imported on a GPU.
"""

import contextlib
import functools
import os
import resource
import types
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import DataLoader

from megatron_rw.patching import Around, Patch, apply
from megatron_rw.platform.quiet import silence

# Megatron flags, by destination, whose CUDA defaults cannot work here. They replace the parser's
# defaults, so that what a user passes is kept, and is then checked.
ARGUMENT_DEFAULTS: dict[str, object] = {
    "distributed_backend": "gloo",
    "transformer_impl": "local",
    "apply_rope_fusion": False,
    "gradient_accumulation_fusion": False,
    "masked_softmax_fusion": False,
    "bias_gelu_fusion": False,
    "bias_swiglu_fusion": False,
    "bias_dropout_fusion": False,
    "no_persist_layer_norm": True,
    "use_cpu_initialization": True,
    # The rerun state machine would save a checkpoint to repeat a bad step "on a different GPU".
    # Disabled, it raises at once.
    "rerun_mode": "disabled",
}

_FACTORIES = (
    "arange", "empty", "empty_like", "full", "full_like", "ones", "ones_like",
    "rand", "randn", "randint", "tensor", "zeros", "zeros_like",
)  # fmt: skip

_active = False


def activate(*, asked_for: bool = False) -> None:
    """Redirects Megatron's CUDA names to the CPU in this process. Idempotent.

    A visible CUDA device is a RuntimeError unless the user asked for the CPU, because the redirects
    would hide the device.
    """
    global _active
    if _active:
        return
    if torch.cuda.is_available() and not asked_for:
        raise RuntimeError(
            "the CPU platform was activated beside a CUDA device; pass --device cpu to mean it"
        )
    # Megatron's modules decorate functions with torch.compile. On two cores compilation takes
    # longer than the quick start itself.
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    # arguments.py demands it under tensor parallelism, although there is no device queue here.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    silence("cpu")
    redirect_torch()
    apply(_megatron_patches())
    _active = True


def redirect_torch() -> None:
    """Redirects only torch's names, which is enough for a process that writes checkpoints."""
    apply(_torch_patches())


def _cpu_for_cuda(device: Any) -> Any:
    """Returns `"cpu"` for a CUDA device in any spelling, and anything else unchanged."""
    if isinstance(device, torch.device) and device.type == "cuda":
        return "cpu"
    if isinstance(device, str) and device.startswith("cuda"):
        return "cpu"
    return device


def _without_cuda(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        kwargs = {name: _cpu_for_cuda(value) for name, value in kwargs.items()}
        return function(*(_cpu_for_cuda(value) for value in args), **kwargs)

    return wrapper


class _Done:
    """A stream on which everything has already happened, or an event that has."""

    cuda_stream = 0

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def wait(self, other: object = None) -> None:
        pass

    wait_stream = wait_event = synchronize = record = wait

    def record_event(self, event: "_Done | None" = None) -> "_Done":
        return event or _Done()

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: object) -> float:
        return 0.0


def _resident_bytes(*_: object) -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize()


def _peak_resident_bytes(*_: object) -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _cuda_type_name(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    result = _tensor_type(tensor, *args, **kwargs)
    if isinstance(result, str):
        return result.replace("torch.", "torch.cuda.", 1)
    return result


def _without_drawing(proceed: Callable[[], Any], call: dict[str, Any]) -> Any:
    with torch.random.fork_rng(devices=[]):
        return proceed()


_tensor_type = torch.Tensor.type


def _copy_tensors(write_buckets: list[Any], non_blocking: bool = True) -> list[Any]:
    return [
        (file, key, (objects, [(item, tensor.clone()) for item, tensor in tensors]))
        for file, key, (objects, tensors) in write_buckets
    ]


def _torch_patches() -> list[Patch]:
    def nothing(*args: object, **kwargs: object) -> None:
        return None

    properties = types.SimpleNamespace(
        name="CPU", major=0, minor=0, multi_processor_count=os.cpu_count(), total_memory=0
    )
    cuda = torch.cuda
    patches = [
        Patch(torch, name, _without_cuda(getattr(torch, name)), "device='cuda' literals")
        for name in _FACTORIES
    ]
    patches += [
        Patch(torch.Tensor, "cuda", lambda self, *a, **k: self, "batches, grad_scaler"),
        Patch(torch.Tensor, "pin_memory", lambda self, *a, **k: self, "param_and_grad_buffer"),
        Patch(torch.Tensor, "type", _cuda_type_name, "optimizer.py: 'torch.cuda.FloatTensor'"),
        Patch(torch.nn.Module, "cuda", lambda self, *a, **k: self, "models/dist_utils.py"),
        Patch(torch.nn.Module, "to", _without_cuda(torch.nn.Module.to), "models/dist_utils.py"),
        # A string, so that `device=torch.cuda.current_device()` needs no redirect.
        Patch(cuda, "current_device", lambda: "cpu", "206 places"),
        Patch(cuda, "device_count", lambda: 1, "initialize.py: no model parallel groups at 0"),
        Patch(cuda, "set_device", nothing, "initialize.py"),
        Patch(cuda, "synchronize", nothing, "timers.py, schedules.py"),
        Patch(cuda, "empty_cache", nothing, "training.py"),
        Patch(cuda, "Stream", _Done, "distributed/, pipeline_parallel/"),
        Patch(cuda, "Event", _Done, "distributed/, async_utils.py"),
        Patch(cuda, "current_stream", lambda *a: _Done(), "param_and_grad_buffer.py"),
        Patch(cuda, "default_stream", lambda *a: _Done(), "param_and_grad_buffer.py"),
        Patch(cuda, "stream", contextlib.nullcontext, "param_and_grad_buffer.py"),
        Patch(cuda, "is_current_stream_capturing", lambda: False, "cuda_graphs.py"),
        Patch(cuda, "get_rng_state", lambda *a, **k: torch.get_rng_state(), "checkpointing.py"),
        Patch(cuda, "set_rng_state", lambda s, *a, **k: torch.set_rng_state(s), "checkpointing.py"),
        Patch(cuda, "manual_seed", torch.manual_seed, "tensor_parallel/random.py"),
        # Megatron restores random states before it starts the data loaders, each of which draws a
        # seed from the CPU generator. Dropout draws from another one only on a GPU.
        Patch(DataLoader, "__iter__", Around(_without_drawing), "load_checkpoint"),
        Patch(cuda, "get_device_properties", lambda *a: properties, "common_utils.py"),
        Patch(cuda, "get_device_capability", lambda *a: (0, 0), "arguments.py"),
        Patch(cuda, "memory_stats", lambda *a: defaultdict(int), "report_memory"),
    ]
    for name in ("memory_allocated", "memory_reserved", "device_memory_used"):
        patches.append(Patch(cuda, name, _resident_bytes, "report_memory"))
    for name in ("max_memory_allocated", "max_memory_reserved"):
        patches.append(Patch(cuda, name, _peak_resident_bytes, "report_memory"))
    return patches


def _megatron_patches() -> list[Patch]:
    from megatron.core import optimizer
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
    from megatron.core.optimizer import distrib_optimizer
    from megatron.core.tensor_parallel import random
    from megatron.training import training

    from megatron_rw.platform.cpu_adam import CPUAdam

    tracker = "CudaRNGStatesTracker, activation recomputation"
    return [
        Patch(
            training,
            "initialize_megatron",
            functools.partial(training.initialize_megatron, allow_no_cuda=True),
            "training.pretrain, which does not pass the argument on",
        ),
        Patch(random, "_get_cuda_rng_state", lambda *a, **k: torch.get_rng_state(), tracker),
        Patch(random, "_set_cuda_rng_state", lambda s, *a, **k: torch.set_rng_state(s), tracker),
        # The distributed optimizer's checkpoint wants the step count in the parameter group,
        # as apex's FusedAdam has it; torch's AdamW keeps one per parameter.
        Patch(optimizer, "Adam", CPUAdam, "get_megatron_optimizer"),
        Patch(optimizer, "USING_PYTORCH_OPTIMIZER", False, "get_megatron_optimizer"),
        Patch(distrib_optimizer, "Adam", CPUAdam, "DistributedOptimizer"),
        Patch(
            FileSystemWriterAsync,
            "preload_tensors",
            staticmethod(_copy_tensors),
            "asynchronous saving, which copies from the GPU while the rank waits, and shares what "
            "is on the host with a rank that goes on",
        ),
        Patch(distrib_optimizer, "HAVE_APEX_OR_TE", True, "DistributedOptimizer.state_dict"),
        Patch(distrib_optimizer, "USING_APEX_OPTIMIZER", True, "DistributedOptimizer"),
    ]
