"""The model of `tests.program.MODEL` in plain torch, without Megatron: losses of one sequence."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

LAYERS, HEADS, GROUPS, HEAD = 4, 4, 2, 8


def losses(weights: Mapping[str, Tensor], ids: Tensor) -> Tensor:
    """-ln p of `ids[1:]`, each given all ids before it.

    Args:
        weights: of a checkpoint, whole, fp32.
        ids: [tokens].
    """
    x = weights["embedding.word_embeddings.weight"][ids[:-1]]
    for layer in range(LAYERS):
        of = {
            name.removeprefix("decoder.layers."): weight[layer]
            for name, weight in weights.items()
            if name.startswith("decoder.layers.")
        }
        x = x + _attention(of, _norm(x, of["self_attention.linear_qkv.layer_norm_weight"]))
        gate, value = functional.linear(
            _norm(x, of["mlp.linear_fc1.layer_norm_weight"]), of["mlp.linear_fc1.weight"]
        ).chunk(2, dim=-1)
        x = x + functional.linear(functional.silu(gate) * value, of["mlp.linear_fc2.weight"])
    x = _norm(x, weights["decoder.final_layernorm.weight"])
    logits = functional.linear(x, weights["output_layer.weight"])
    return functional.cross_entropy(logits, ids[1:], reduction="none")


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + 1e-5) * weight


def _attention(of: Mapping[str, Tensor], x: Tensor) -> Tensor:
    # By group: its queries, its key, its value.
    mixed = functional.linear(x, of["self_attention.linear_qkv.weight"]).view(
        len(x), GROUPS, HEADS // GROUPS + 2, HEAD
    )
    query, key, value = mixed[:, :, :-2], mixed[:, :, -2:-1], mixed[:, :, -1:]
    query, key = _rotated(query), _rotated(key)
    scores = torch.einsum("sgqd,tgkd->gqst", query, key) / HEAD**0.5
    future = torch.ones(len(x), len(x)).triu(diagonal=1).bool()
    shares = scores.masked_fill(future, float("-inf")).softmax(dim=-1)
    seen = torch.einsum("gqst,tgkd->sgqd", shares, value).reshape(len(x), -1)
    return functional.linear(seen, of["self_attention.linear_proj.weight"])


def _rotated(x: Tensor) -> Tensor:
    half = HEAD // 2
    angles = torch.arange(len(x))[:, None] / 10000 ** (torch.arange(half) / half)
    cos, sin = (f(angles)[:, None, None, :] for f in (torch.cos, torch.sin))
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
