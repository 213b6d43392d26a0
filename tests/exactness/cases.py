"""What is compared: layouts, mask patterns and the steps that every cell of the table runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from megatron_rw.reweighting import ReweightConfig
from tests.exactness import oracle

SEQUENCE, SET_SIZE, MICRO_BATCHES, STEPS = 16, 8, 4, 3


@dataclass(frozen=True)
class Layout:
    """Sizes for `initialize_model_parallel`, and what core's DDP and model shall do."""

    processes: int
    sizes: dict[str, int] = field(default_factory=dict)
    sequence_parallel: bool = False
    per_token: bool = False
    loss_scale: float = 1.0
    # Output layer and loss in one operation of ours, which adds to core's gradient buffers itself.
    fused: bool = False
    ddp: dict[str, Any] = field(default_factory=dict)


def _layout(
    processes: int, *, tp: int = 1, pp: int = 1, cp: int = 1, vpp: int = 0, **rest: Any
) -> Layout:
    sizes = {
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "context_parallel_size": cp,
    }
    if vpp:
        sizes["virtual_pipeline_model_parallel_size"] = vpp
    return Layout(processes, sizes, **rest)


DISTOPT = {"use_distributed_optimizer": True}
OVERLAP = {"overlap_grad_reduce": True, "bucket_size": 200}
LAYOUTS = {
    "one process": _layout(1),
    "TP2": _layout(2, tp=2),
    "TP2 SP": _layout(2, tp=2, sequence_parallel=True),
    "PP2": _layout(2, pp=2),
    "PP2 VPP2": _layout(2, pp=2, vpp=2),
    "CP2": _layout(2, cp=2),
    "CP2 per-token": _layout(2, cp=2, per_token=True),
    "DP2": _layout(2),
    "DP2 per-token": _layout(2, per_token=True),
    "DP2 distopt": _layout(2, ddp=DISTOPT),
    "DP2 loss scale": _layout(2, loss_scale=1024.0),
    "DP4 overlap": _layout(4, ddp=OVERLAP),
    "DP2 TP2 distopt overlap": _layout(4, tp=2, ddp=DISTOPT | OVERLAP),
    "PP4": _layout(4, pp=4),
    "DP2 CP2 distopt": _layout(4, cp=2, ddp=DISTOPT),
    "TP2 SP CP2 per-token": _layout(4, tp=2, cp=2, sequence_parallel=True, per_token=True),
    "DP2 CP2 PP2 VPP2 per-token": _layout(8, cp=2, pp=2, vpp=2, per_token=True),
    "DP2 TP2 SP PP2 distopt overlap": _layout(
        8, tp=2, pp=2, sequence_parallel=True, ddp=DISTOPT | OVERLAP
    ),
    "DP2 overlap fused": _layout(2, ddp=OVERLAP, fused=True),
    "TP2 SP fused": _layout(2, tp=2, sequence_parallel=True, fused=True),
    "DP2 TP2 PP2 distopt overlap fused": _layout(8, tp=2, pp=2, ddp=DISTOPT | OVERLAP, fused=True),
}  # fmt: skip

CONFIGS = {
    "microbatch": ReweightConfig(strategy="linupper", temperature=0.4),
    "global": ReweightConfig(strategy="quadratic", temperature=0.5, delta=2.0, scope="global"),
    "deferred": ReweightConfig(
        strategy="extremes", temperature=0.4, scope="deferred", moment_decay=0.25
    ),
}


def _ragged(rng: torch.Generator) -> torch.Tensor:
    shape = (STEPS, MICRO_BATCHES, SET_SIZE, SEQUENCE)
    return (torch.rand(shape, generator=rng) < 0.6).float()


def _padded(rng: torch.Generator) -> torch.Tensor:
    lengths = torch.randint(1, SEQUENCE + 1, (STEPS, MICRO_BATCHES, SET_SIZE, 1), generator=rng)
    return (torch.arange(SEQUENCE) < lengths).float()


def _with_empty_samples(rng: torch.Generator) -> torch.Tensor:
    mask = _ragged(rng)
    mask[:, :, ::3] = 0
    return mask


def _with_empty_micro_batch(rng: torch.Generator) -> torch.Tensor:
    mask = _ragged(rng)
    mask[:, 1] = 0
    return mask


def _on_first_shard(rng: torch.Generator) -> torch.Tensor:
    # Core gives context-parallel rank 0 the first and the last of 2·cp chunks.
    mask = _ragged(rng)
    mask[..., SEQUENCE // 4 :] = 0
    return mask


def _with_empty_step(rng: torch.Generator) -> torch.Tensor:
    mask = _ragged(rng)
    mask[1] = 0
    return mask


MASKS = {
    "full": lambda rng: torch.ones_like(_ragged(rng)),
    "ragged": _ragged,
    "padded": _padded,
    "empty samples": _with_empty_samples,
    "empty micro-batch": _with_empty_micro_batch,
    "first shard only": _on_first_shard,
    "empty step": _with_empty_step,
}


def steps(mask_name: str) -> list[list[oracle.Samples]]:
    """Every step's micro-batches, each over all data-parallel ranks."""
    rng = torch.Generator().manual_seed(3)
    shape = (STEPS, MICRO_BATCHES, SET_SIZE, SEQUENCE)
    tokens = torch.randint(0, oracle.VOCAB, shape, generator=rng)
    # A sample's own few labels, so that sample losses spread.
    labels = torch.randint(0, oracle.VOCAB, (*shape[:3], 3), generator=rng).repeat(1, 1, 1, 6)
    mask = MASKS[mask_name](rng)
    return [
        [oracle.Samples(*parts) for parts in zip(*step, strict=True)]
        for step in zip(tokens, labels[..., :SEQUENCE].contiguous(), mask, strict=True)
    ]


# Precision: dtype and masks. In fp32 one mask stands for all: what masks do is shown in fp64.
PRECISIONS = {
    "fp64": (torch.float64, tuple(MASKS)),
    "fp32": (torch.float32, ("ragged",)),
}
