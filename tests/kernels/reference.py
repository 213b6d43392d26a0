"""Cross-entropy in fp64 over the whole vocabulary, as the formula reads; of logits, of a layer."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_rw.kernels import CrossEntropyOptions


def cross_entropy(logits: Tensor, target: Tensor, options: CrossEntropyOptions) -> Tensor:
    """`[s, b]` fp64, with gradient.

    Args:
        logits: `[s, b, V]`, padding included.
        target: `[s, b]`.
        options: as the kernels take them.
    """
    z = logits.double()[..., : options.vocab_size]
    vocab_size = z.shape[-1]
    if options.softcap is not None:
        z = options.softcap * torch.tanh(z / options.softcap)
    lse = torch.logsumexp(z, dim=-1)
    counted = target != options.ignore_index
    own = z.gather(-1, target.where(counted, 0).unsqueeze(-1)).squeeze(-1)
    smoothing = options.label_smoothing * vocab_size / (vocab_size - 1)
    loss = lse - (1 - smoothing) * own + options.z_loss * lse.square()
    if smoothing:
        loss = loss - smoothing * z.mean(dim=-1)
    return loss.where(counted, 0.0)


def gradient(
    logits: Tensor, target: Tensor, upstream: Tensor, options: CrossEntropyOptions
) -> Tensor:
    """Of Σ upstream·loss, `[s, b, V]` fp64."""
    leaf = logits.double().detach().requires_grad_()
    (cross_entropy(leaf, target, options) * upstream.double()).sum().backward()
    assert leaf.grad is not None
    return leaf.grad


def linear(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    upstream: Tensor,
    options: CrossEntropyOptions,
) -> tuple[Tensor, list[Tensor]]:
    """Losses of the logits hidden·weightᵀ + bias, and the gradients of the tensors given.

    Args:
        hidden: `[s, b, h]`.
        weight: `[V, h]`, padding included.
        bias: `[V]`.
        target: `[s, b]`.
        upstream: `[s, b]`, of the losses.
        options: as the kernels take them.

    Returns:
        `[s, b]`, and gradients of hidden, weight and, where there is one, bias, all fp64.
    """
    given = [tensor for tensor in (hidden, weight, bias) if tensor is not None]
    leaves = [tensor.detach().double().requires_grad_() for tensor in given]
    logits = leaves[0] @ leaves[1].T
    if bias is not None:
        logits = logits + leaves[2]
    losses = cross_entropy(logits, target, options)
    gradients = torch.autograd.grad((losses * upstream.double()).sum(), leaves)
    return losses.detach(), list(gradients)
