"""Compares the gradient of a weighted step with that of the same step under uniform weights."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.tensor_parallel.random import _fork_rng
from megatron.core.utils import get_model_config

from megatron_rw.errors import UserError
from megatron_rw.integrations import groups
from megatron_rw.reweighting.config import flag

_FLAG = flag("gradient_interval")
# By the name of the field, which the arguments share: the flag, and what speaks against it.
_CONFLICTS = {
    "fp16": ("--fp16", "adapts its loss scale to every gradient that it sees"),
    "fp8": ("--fp8-format", "adapts its scaling factors to every pass"),
    "fp4": ("--fp4-format", "adapts its scaling factors to every pass"),
    "moe_router_enable_expert_bias": (
        "--moe-router-enable-expert-bias",
        "counts the tokens of every pass",
    ),
    "use_megatron_fsdp": ("--use-megatron-fsdp", "has other gradient buffers"),
    "use_torch_fsdp2": ("--use-torch-fsdp2", "has no gradient buffers"),
}


@dataclass(frozen=True)
class GradientComparison:
    """The weighted gradient g_w of a step against the uniform one g_u, the same on every rank."""

    ratio: float  # |g_w|/|g_u|
    cosine: float  # Of the angle between the two.


def check_comparison(config: Any) -> None:
    """Refuses what a second run of a step's passes would change, or would not measure.

    `config` is Megatron's `TransformerConfig`, or its parsed arguments.
    """
    found = [why for name, why in _CONFLICTS.items() if getattr(config, name, None)]
    found += [(name, "adds a gradient of its own") for name in groups.other_losses(config)]
    graphs = config.cuda_graph_impl
    if graphs != "none":
        found.append((f"--cuda-graph-impl {graphs}", "records one run of the passes"))
    if found:
        name, why = found[0]
        raise UserError(f"{name} {why}: drop it, or {_FLAG}, which runs a step twice.")


@torch.no_grad()
def compare_gradients(
    model: list[Any], passes: Callable[[bool], Any]
) -> tuple[Any, GradientComparison]:
    """Runs a step's passes with its weights, and again with uniform ones. Collective.

    The weighted gradient and the states of random numbers are left as without the comparison. For
    the time of the second run there is another copy of the gradient buffers.

    Args:
        model: The chunks of this rank, whose configuration has the optimizer's `scale_loss` as
            `grad_scale_func`, as `megatron.training` sets it.
        passes: Runs them and finalises the gradient; takes whether weights are uniform.

    Returns:
        What the weighted run has returned, and the comparison.
    """
    optimizer = getattr(get_model_config(model[0]).grad_scale_func, "__self__", None)
    if optimizer is None or not all(isinstance(chunk, DistributedDataParallel) for chunk in model):
        raise UserError(
            f"{_FLAG} needs core's DistributedDataParallel, and its optimizer's scale_loss as the "
            "model configuration's grad_scale_func: set them, or drop the flag."
        )
    # What comes after the second run is then what would come after the first.
    with torch.enable_grad(), _fork_rng():
        result = passes(False)
    weighted = _norm(optimizer)
    buffers = [
        gradient
        for chunk in model
        for buffer in chunk.buffers + chunk.expert_parallel_buffers
        for gradient in (buffer.grad_data, *buffer.extra_main_grads)
    ]
    kept = [gradient.clone() for gradient in buffers]
    for chunk in model:
        chunk.zero_grad_buffer()
    with torch.enable_grad():
        passes(True)
    uniform = _norm(optimizer)
    torch._foreach_add_(buffers, kept)
    both = _norm(optimizer)
    torch._foreach_copy_(buffers, kept)
    product = weighted * uniform
    if not product > 0:
        return result, GradientComparison(float("nan"), float("nan"))
    cosine = (both**2 - weighted**2 - uniform**2) / (2 * product)
    return result, GradientComparison(weighted / uniform, cosine)


def _norm(optimizer: Any) -> float:
    """Returns the norm of the gradient in the buffers, as Megatron logs it. Collective."""
    _prepare(optimizer)
    norm = float(optimizer.get_grad_norm())
    # Backward passes would add to a gradient that is still there.
    optimizer.zero_grad()
    return norm


def _prepare(optimizer: Any) -> None:
    """Lets the optimizers of a chain take up their gradients."""
    # The chain's own method decides whether the step is taken, which comes later.
    chained = getattr(optimizer, "chained_optimizers", None)
    if chained is None:
        optimizer.prepare_grads()
    for each in chained or ():
        _prepare(each)
