"""Scope x layout x mask: the gradient of every step against the single-process fp64 oracle.

Real processes, real megatron-core: its parallel layers, DDP, pipeline schedules and gradient
finalising, with `attach` round a forward step that knows nothing of it. The network mixes no
tokens, because core has no attention with context parallelism on the CPU; the groups, the cutting
of the sequence and the reductions are core's own.

Tolerances, relative to the norm of the whole gradient: 1e-12 in fp64, where only the order of sums
differs (fp64 rounding is 1e-16), and 1e-6 in fp32 (rounding 6e-8, through some hundred sums); twice
that with the fused output layer, whose factors come from differences of rounded log-sum-exps.
"""

from __future__ import annotations

import math

import pytest

from tests.exactness import cases, oracle, worker
from tests.ranks import run_ranks

TOLERANCE = {"fp64": 1e-12, "fp32": 1e-6}
FUSED_TOLERANCE = {"fp64": 1e-12, "fp32": 2e-6}
LONG = {
    *("TP2", "TP2 SP", "PP4", "DP2 TP2 distopt overlap"),
    *("DP2 CP2 PP2 VPP2 per-token", "DP2 TP2 PP2 distopt overlap fused"),
}


@pytest.fixture(scope="module")
def wanted() -> dict[tuple[str, str], list[oracle.Parameters]]:
    """The oracle's gradients, by scope and mask, one per step: the same in every layout."""
    values = oracle.parameters(0)
    found = {}
    for scope, config in cases.CONFIGS.items():
        for mask in cases.MASKS:
            seen: oracle.Range = None
            gradients = []
            for samples in cases.steps(mask):
                gradient, latest = oracle.step_gradient(values, samples, config, seen)
                seen = oracle.mixed(seen, latest, config.moment_decay)
                gradients.append(gradient)
            found[scope, mask] = gradients
    return found


def relative_error(ranks: list[worker.Sums], key: tuple[str, str], step: int) -> float:
    """Error of the whole gradient; replicated parts count alike above and below."""
    error = math.fsum(rank[key][step][0] for rank in ranks)
    size = math.fsum(rank[key][step][1] for rank in ranks)
    if size == 0:
        # A step without an active token: exactly nothing may flow.
        return 0.0 if error == 0 else math.inf
    return math.sqrt(error / size)


@pytest.mark.parametrize(
    "layout_name",
    [
        pytest.param(name, marks=pytest.mark.long) if name in LONG else name
        for name in cases.LAYOUTS
    ],
)
def test_gradient_is_the_single_process_oracles(
    layout_name: str, wanted: dict[tuple[str, str], list[oracle.Parameters]]
) -> None:
    layout = cases.LAYOUTS[layout_name]
    ranks = run_ranks(layout.processes, worker.errors, layout, wanted, **layout.sizes)
    tolerance = FUSED_TOLERANCE if layout.fused else TOLERANCE
    too_large = []
    for precision, (_, masks) in cases.PRECISIONS.items():
        sums = [rank[precision] for rank in ranks]
        for scope, mask in wanted:
            if mask not in masks:
                continue
            error = max(relative_error(sums, (scope, mask), step) for step in range(cases.STEPS))
            print(f"{scope}, {precision}, mask {mask}: {error:.1e}")
            if not error <= tolerance[precision]:
                too_large.append(f"{scope}, {precision}, mask {mask}: {error:.1e}")
    assert not too_large
