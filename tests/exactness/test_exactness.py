"""Scope x layout x mask: the gradient of every step against the single-process fp64 oracle.

Real processes, real megatron-core: its parallel layers, DDP, pipeline schedules and gradient
finalising, with `attach` round a forward step that knows nothing of it. The network mixes no
tokens, because core has no attention with context parallelism on the CPU; the groups, the cutting
of the sequence and the reductions are core's own.

Tolerances, relative to the norm of the whole gradient: 1e-12 in fp64, where only the order of sums
differs (fp64 rounding is 1e-16), and 1e-6 in fp32 (rounding 6e-8, through some hundred sums).
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tests.exactness import cases, worker
from tests.ranks import run_ranks

TOLERANCE = {"fp64": 1e-12, "fp32": 1e-6}
# In fp32 one pattern stands for all: what masks do is shown in fp64.
MASKS = {"fp64": list(cases.MASKS), "fp32": ["ragged"]}
DTYPE = {"fp64": torch.float64, "fp32": torch.float32}


def relative_error(ranks: list[worker.Sums], key: tuple[str, str], step: int) -> float:
    """Error of the whole gradient; replicated parts count alike above and below."""
    error = math.fsum(rank[key][step][0] for rank in ranks)
    size = math.fsum(rank[key][step][1] for rank in ranks)
    if size == 0:
        # A step without an active token: exactly nothing may flow.
        return 0.0 if error == 0 else math.inf
    return math.sqrt(error / size)


@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("layout_name", cases.LAYOUTS)
def test_gradient_is_the_single_process_oracles(
    layout_name: str, precision: str, exactness_table: dict[tuple[str, str], dict[str, float]]
) -> None:
    layout = cases.LAYOUTS[layout_name]
    arguments: tuple[Any, ...] = (layout, cases.CONFIGS, MASKS[precision], DTYPE[precision])
    ranks = run_ranks(layout.processes, worker.errors, *arguments, **layout.sizes)
    for scope in cases.CONFIGS:
        cell = exactness_table.setdefault((layout_name, f"{scope} {precision}"), {})
        for mask in MASKS[precision]:
            cell[mask] = max(
                relative_error(ranks, (scope, mask), step) for step in range(cases.STEPS)
            )
    for (name, column), cell in exactness_table.items():
        if name == layout_name and column.endswith(precision):
            for mask, error in cell.items():
                assert error <= TOLERANCE[precision], f"{name}, {column}, mask {mask}: {error:.1e}"
