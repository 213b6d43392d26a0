"""Scope x layout x mask: the gradient of every step against the single-process fp64 oracle.

Real processes, real megatron-core: its parallel layers, DDP, pipeline schedules and gradient
finalising, with `attach` round a forward step that knows nothing of it. The network mixes no
tokens, because core has no attention with context parallelism on the CPU; the groups, the cutting
of the sequence and the reductions are core's own.

Tolerances, relative to the norm of the whole gradient: 1e-12 in fp64, where only the order of sums
differs (fp64 rounding is 1e-16), and 1e-6 in fp32 (rounding 6e-8, through some hundred sums).
"""

from __future__ import annotations

import functools
import logging
import math

import pytest

from megatron_rw.integrations import attach
from tests.exactness import cases, model, oracle
from tests.ranks import run_ranks

# By scope and mask, the oracle's gradients, one per step.
Wanted = dict[tuple[str, str], list[oracle.Parameters]]
# By precision, scope and mask, one pair per step.
Sums = dict[tuple[str, str, str], list[tuple[float, float]]]


@pytest.fixture(scope="module")
def wanted() -> Wanted:
    """The same in every layout."""
    values = oracle.parameters(0)
    found: Wanted = {}
    for scope, config in cases.CONFIGS.items():
        for mask in cases.MASKS:
            gradients = oracle.Oracle(config)
            found[scope, mask] = [
                gradients.gradient(
                    values,
                    functools.partial(oracle.token_losses, sets=sets),
                    sets,
                )
                for sets in cases.steps(mask)
            ]
    return found


def errors(layout: cases.Layout, wanted: Wanted) -> Sums:
    """Squared error and squared size of this rank's part of every step's gradient."""
    logging.getLogger("megatron.core").setLevel(logging.WARNING)
    sums: Sums = {}
    for precision, (dtype, masks) in cases.PRECISIONS.items():
        for (scope, mask), gradients in wanted.items():
            if mask not in masks:
                continue
            chunks = model.build(layout, dtype)
            forward_step = attach(model.forward_step, cases.CONFIGS[scope])
            sums[precision, scope, mask] = []
            for samples, gradient in zip(cases.steps(mask), gradients, strict=True):
                model.run_step(forward_step, chunks, samples)
                found = model.gradients(chunks, layout)
                sums[precision, scope, mask].append(compare(found, gradient))
    return sums


def compare(found: oracle.Parameters, wanted: oracle.Parameters) -> tuple[float, float]:
    """Squared error and squared size over this rank's parameters."""
    error = size = 0.0
    for name, gradient in found.items():
        part = model.own_part(name, wanted[name])
        error += float((gradient.double() - part).square().sum())
        size += float(part.square().sum())
    return error, size


def relative_error(ranks: list[tuple[float, float]]) -> float:
    """Error of a step's whole gradient; replicated parts count alike above and below."""
    error, size = (math.fsum(sums) for sums in zip(*ranks, strict=True))
    if size == 0:
        # A step without an active token: exactly nothing may flow.
        return 0.0 if error == 0 else math.inf
    return math.sqrt(error / size)


@pytest.mark.parametrize(
    "name",
    [*cases.LAYOUTS, *(pytest.param(name, marks=pytest.mark.long) for name in cases.LONG_LAYOUTS)],
)
def test_gradient_is_the_single_process_oracles(name: str, wanted: Wanted) -> None:
    layout = cases.Layout(name)
    ranks = run_ranks(layout.processes, errors, layout, wanted, **layout.sizes)
    tolerance = {"fp64": 1e-12, "fp32": 1e-6}
    too_large = []
    for precision, scope, mask in ranks[0]:
        steps = zip(*(rank[precision, scope, mask] for rank in ranks), strict=True)
        found = [relative_error(list(step)) for step in steps]
        line = f"{scope}, {precision}, mask {mask}: {max(found):.1e}"
        print(line)
        # Not so where one is not a number, either.
        if not all(error <= tolerance[precision] for error in found):
            too_large.append(line)
    assert not too_large
