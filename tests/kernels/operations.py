"""Both operations, called alike: from logits, so that one reference and one test serve both.

The reference is the formula in fp64 over the whole vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from megatron_rw import kernels
from megatron_rw.kernels import CrossEntropyOptions, logits_plan
from tests.kernels import DEVICE

# The cross-entropy with its gradient written over the logits and apart from them; the fused layer.
OPERATIONS = ["in place", "apart", "layer"]
SHAPE = (5, 3, 130)
PLAIN = CrossEntropyOptions()
VARIANTS = {
    "plain": PLAIN,
    "padded": CrossEntropyOptions(vocab_size=107),
    "all": CrossEntropyOptions(vocab_size=107, entropy=True),
}
# Of the gradient, which is rounded to the logits' dtype, and of losses, sums and entropy.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float64: 1e-12}
FP32 = TOLERANCE[torch.float32]


class Found(NamedTuple):
    """An operation's results, and the gradient that reaches whoever made the logits."""

    losses: Tensor
    gradient: Tensor
    entropy: Tensor | None = None
    sums: kernels.SampleSums | None = None


def inputs(
    dtype: torch.dtype = torch.float32,
    shape: tuple[int, int, int] = SHAPE,
    options: CrossEntropyOptions = PLAIN,
    seed: int = 0,
    device: str = DEVICE,
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, labels with some ignored, upstream gradients: signed, other for every token, some 0.

    Sample weights make them so.
    """
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(shape, generator=generator) * 4).to(dtype)
    target = torch.randint(0, options.vocab_size or shape[2], shape[:2], generator=generator)
    upstream = torch.randn(shape[:2], generator=generator)
    target.view(-1)[::5] = PLAIN.ignore_index
    upstream.view(-1)[1::7] = 0
    return logits.to(device), target.to(device), upstream.to(device)


def budget(hidden: Tensor, columns: int, most: int, gathers: bool = False) -> int:
    """Bytes that allow `most` columns of logits at a time."""
    tokens, size = hidden[..., 0].numel(), hidden.dtype.itemsize
    whole = kernels.plan_logits(
        tokens, columns, hidden.shape[2], hidden.dtype, 1 << 60, gathers=gathers
    )
    return whole.nbytes - max(columns - most, 0) * tokens * size


def call(
    logits: Tensor, target: Tensor, name: Any, operation: str = "in place", **how: Any
) -> kernels.CrossEntropy:
    """The operation, on logits that autograd follows. The fused layer cuts them at 48 columns.

    The layer has a hidden unit a token, 1 there and 0 elsewhere, and the logits as its weight: the
    weight's gradient is theirs, with all digits. They must be finite.
    """
    how["backend_name"] = name
    if operation != "layer":
        inplace = operation == "in place"
        return kernels.vocab_parallel_cross_entropy(logits, target, inplace_backward=inplace, **how)
    weight = logits.flatten(0, 1).T
    hidden = torch.eye(weight.shape[1], dtype=logits.dtype, device=logits.device)
    hidden = hidden.view(*logits.shape[:2], -1)
    with mock.patch.object(logits_plan, "FEWEST_COLUMNS", 1):
        how["logits_budget"] = budget(hidden, len(weight), 48)
        return kernels.linear_weighted_cross_entropy(hidden, weight, target, **how)


def run_on(logits: Tensor, target: Tensor, upstream: Tensor, *how: Any, **options: Any) -> Found:
    """Forward and backward on these logits themselves, whose memory may be overwritten."""
    of_sums = options.pop("of_sums", None)
    made = logits.detach().requires_grad_().view_as(logits)
    losses, sums, entropy = call(made, target, *how, **options)
    outputs, upstreams = [losses], [upstream.to(losses.dtype)]
    if sums is not None:
        outputs, upstreams = [losses, sums.loss_sum], [*upstreams, of_sums]
    [gradient] = torch.autograd.grad(outputs, made, upstreams)
    return Found(losses.detach(), gradient, entropy, sums)


def run(logits: Tensor, *others: Any, **options: Any) -> Found:
    """The same on a copy of them."""
    return run_on(logits.detach().clone(), *others, **options)


def exact(*given: Tensor, options: CrossEntropyOptions = PLAIN) -> Found:
    """All in fp64, of logits `[s, b, V]`, labels and upstream gradients, as `inputs` gives them."""
    logits, target, upstream = given
    leaf = logits.detach().double().requires_grad_()
    z = leaf[..., : options.vocab_size]
    lse = torch.logsumexp(z, dim=-1)
    counted = target != options.ignore_index
    own = z.gather(-1, target.long().where(counted, 0).unsqueeze(-1)).squeeze(-1)
    losses = (lse - own).where(counted, 0.0)
    [gradient] = torch.autograd.grad(losses, leaf, upstream.double())
    entropy = torch.special.entr(torch.softmax(z.detach(), dim=-1)).sum(dim=-1)
    return Found(losses.detach(), gradient, entropy)


def compare(found: Found, *given: Tensor, options: CrossEntropyOptions = PLAIN) -> None:
    """Losses, gradient and, where it is asked for, entropy are the reference's of what is given."""
    wanted = exact(*given, options=options)
    dtype = torch.promote_types(found.gradient.dtype, torch.float32)
    assert found.losses.dtype == dtype
    close(found.losses, wanted.losses, TOLERANCE[dtype])
    close(found.gradient, wanted.gradient, TOLERANCE[found.gradient.dtype])
    assert (found.entropy is not None) == options.entropy
    if found.entropy is not None and wanted.entropy is not None:
        close(found.entropy, wanted.entropy, TOLERANCE[dtype])


def close(found: Tensor, wanted: Tensor, tolerance: float = FP32) -> None:
    """Relative to `wanted`, or absolute where that is below 1."""
    torch.testing.assert_close(found.double(), wanted.double(), rtol=tolerance, atol=tolerance)
