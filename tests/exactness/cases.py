"""What is compared: layouts, mask patterns and the steps that every cell of the table runs."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from megatron_rw.reweighting import ReweightConfig
from tests.exactness import oracle

SEQUENCE, SET_SIZE, MICRO_BATCHES, STEPS = 16, 8, 4, 3
SHAPE = (STEPS, MICRO_BATCHES, SET_SIZE, SEQUENCE)


@dataclass(frozen=True)
class Layout:
    """What its name says: sizes, as in TP2, and words for what core's DDP and model shall do."""

    name: str

    def size(self, kind: str) -> int:
        found = re.search(rf"\b{kind}(\d+)", self.name)
        return int(found[1]) if found else 1

    def has(self, word: str) -> bool:
        return word in self.name.split()

    @property
    def processes(self) -> int:
        return math.prod(self.size(kind) for kind in ("DP", "TP", "PP", "CP"))

    @property
    def sizes(self) -> dict[str, Any]:
        """For `initialize_model_parallel` and for core's models."""
        return {
            "tensor_model_parallel_size": self.size("TP"),
            "pipeline_model_parallel_size": self.size("PP"),
            "context_parallel_size": self.size("CP"),
            "virtual_pipeline_model_parallel_size": self.size("VPP") if self.has("VPP2") else None,
        }

    @property
    def loss_scale(self) -> float:
        return 1024.0 if self.has("scale") else 1.0


# With `fused`, output layer and loss are one operation of ours in several splits of the vocabulary.
# It adds to core's gradient buffers itself.
LAYOUTS = (
    "one process",
    "PP2",
    "PP2 VPP2",
    "CP2",
    "CP2 per-token",
    "DP2",
    "DP2 per-token",
    "DP2 distopt",
    "DP2 loss scale",
    "DP4 overlap",
    "DP2 CP2 distopt",
    "TP2 SP CP2 per-token",
    "DP2 TP2 SP PP2 distopt overlap",
    "DP2 overlap fused",
    "TP2 SP fused",
)
LONG_LAYOUTS = (
    "TP2",
    "TP2 SP",
    "PP4",
    "DP2 TP2 distopt overlap",
    "DP2 CP2 PP2 VPP2 per-token",
    "DP2 TP2 PP2 distopt overlap fused",
)

CONFIGS = {
    "microbatch": ReweightConfig(strategy="linupper", temperature=0.4),
    "global": ReweightConfig(strategy="quadratic", temperature=0.5, delta=2.0, scope="global"),
    "deferred": ReweightConfig(
        strategy="extremes", temperature=0.4, scope="deferred", moment_decay=0.25
    ),
}


def _choice(line: str) -> ReweightConfig:
    """A configuration from a line `unit signal normalizer strategy scope` and further settings."""
    unit, signal, normalizer, strategy, scope, *rest = line.split()
    more: dict[str, Any] = {"temperature": 0.6} if "target_ess" not in line else {}
    if strategy == "topk":
        more = {"top_share": 0.6}
    if signal == "excess":
        more["reference_scores"] = ["given"]
    for setting in rest:
        name, value = setting.split("=")
        more[name] = value if name in ("range", "sample_weights") else float(value)
    names = ("unit", "signal", "normalizer", "strategy", "scope")
    given = dict(zip(names, (unit, signal, normalizer, strategy, scope), strict=True))
    return ReweightConfig(**given, **more)  # type: ignore[arg-type]


# Each pair of unit, signal, normaliser, strategy and scope with another occurs, but for those that
# are refused (`uniform` follows no signal); further settings are spread over them.
CHOICES = {
    line: _choice(line)
    for line in (
        "token loss sample linupper microbatch",
        "token entropy token topk global",
        "token excess sample softmax deferred",
        "token loss token extremes deferred range=quantile sample_weights=given",
        "token entropy sample quadratic microbatch target_ess=0.7",
        "token loss sample uniform global sample_weights=given",
        "token excess token linupper global max_weight=1.3",
        "document loss token quadratic global",
        "document entropy sample extremes deferred",
        "document excess token linupper microbatch target_ess=0.8",
        "document loss sample topk microbatch sample_weights=given",
        "document entropy token softmax global range=quantile",
        "document excess sample quadratic deferred max_weight=1.5 moment_decay=0.25",
        "document loss token uniform deferred",
        "sequence entropy token softmax microbatch",
        "sequence excess sample topk deferred",
        "sequence loss token quadratic global max_weight=1.3 sample_weights=given",
        "sequence entropy sample linupper deferred target_ess=0.8",
        "sequence excess token extremes microbatch range=quantile",
        "sequence loss token uniform microbatch",
        "sequence entropy sample extremes global target_ess=0.9",
        "sequence excess sample softmax global",
        "document loss sample topk deferred",
    )
}
CHOICE_LAYOUTS = ("one process", "PP2 VPP2", "CP2", "DP2 distopt", "TP2 SP CP2 per-token")
CHOICE_LONG_LAYOUTS = ("DP2 CP2 distopt", "DP2 TP2 SP PP2 distopt overlap")

# What ragged masks leave empty besides, of steps, micro-batches, samples and tokens.
EMPTY: dict[str, Any] = {
    "empty samples": np.s_[:, :, ::3],
    "empty micro-batch": np.s_[:, 1],
    # Core gives context-parallel rank 0 the first and the last of 2·cp chunks.
    "first shard only": np.s_[..., SEQUENCE // 4 :],
    "empty step": np.s_[1],
}
MASKS = ("full", "padded", "ragged", *EMPTY)
# Precision: dtype and masks. In fp32 one mask stands for all: what masks do is shown in fp64.
PRECISIONS = {"fp64": (torch.float64, MASKS), "fp32": (torch.float32, ("ragged",))}


def _mask(name: str, rng: torch.Generator) -> torch.Tensor:
    if name == "full":
        return torch.ones(SHAPE)
    if name == "padded":
        lengths = torch.randint(1, SEQUENCE + 1, (*SHAPE[:3], 1), generator=rng)
        return (torch.arange(SEQUENCE) < lengths).float()
    mask = (torch.rand(SHAPE, generator=rng) < 0.6).float()
    if name in EMPTY:
        mask[EMPTY[name]] = 0
    return mask


def steps(mask: str) -> list[list[oracle.Samples]]:
    """Every step's micro-batches, each over all data-parallel ranks."""
    rng = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, oracle.VOCAB, SHAPE, generator=rng)
    # A sample's own few labels, so that sample losses spread.
    labels = torch.randint(0, oracle.VOCAB, (*SHAPE[:3], 3), generator=rng).repeat(1, 1, 1, 6)
    return [
        [oracle.Samples(*parts) for parts in zip(*step, strict=True)]
        for step in zip(tokens, labels[..., :SEQUENCE].contiguous(), _mask(mask, rng), strict=True)
    ]


def detailed_steps() -> list[list[oracle.Samples]]:
    """Those of a ragged mask, with documents, reference losses and static weights."""
    rng = torch.Generator().manual_seed(5)
    ends = torch.rand(SHAPE, generator=rng) < 0.2
    documents = ends.cumsum(dim=-1) - ends.long()
    reference = torch.rand(SHAPE, generator=rng) * 4 + 1
    # Some are missing, of the first document all.
    reference[torch.rand(SHAPE, generator=rng) < 0.1] = math.nan
    reference[:, :, ::4][documents[:, :, ::4] == 0] = math.nan
    # Multiples of a power of two, so that histograms of them are exact; some documents have none.
    weights = torch.randint(0, 5, SHAPE, generator=rng).float() / 4
    weights = weights.gather(-1, documents)
    return [
        [oracle.Samples(s.tokens, s.labels, s.mask, *more) for s, *more in zip(*step, strict=True)]
        for step in zip(steps("ragged"), documents, reference, weights, strict=True)
    ]
