"""The logged ratio and cosine of the weighted and the uniform gradient, against the fp64 oracle."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import re
from pathlib import Path

import pytest
import torch
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

from megatron_rw.integrations import attach
from tests.exactness import cases, model, oracle
from tests.program import OVERLAP, VPP2, assert_same_bits, run_program, without_time
from tests.ranks import run_ranks

Pairs = dict[str, list[tuple[float, float]]]
CONFIGS = {
    scope: dataclasses.replace(config, gradient_interval=1)
    for scope, config in cases.CONFIGS.items()
}


@pytest.fixture(scope="module")
def wanted() -> Pairs:
    """By scope, ratio and cosine of every step."""
    values = oracle.parameters(0)
    found: Pairs = {}
    for scope, config in CONFIGS.items():
        found[scope] = []
        oracles = [oracle.Oracle(config)]
        oracles.append(oracle.Oracle(dataclasses.replace(config, strategy="uniform")))
        for sets in cases.steps("ragged"):
            losses = functools.partial(oracle.token_losses, sets=sets)
            gradients = [each.gradient(values, losses, sets) for each in oracles]
            weighted, uniform = (
                torch.cat([each[name].flatten() for name in values]) for each in gradients
            )
            norms = float(weighted.norm()), float(uniform.norm())
            cosine = float(weighted @ uniform) / (norms[0] * norms[1])
            found[scope].append((norms[0] / norms[1], cosine))
    return found


def compared(layout: cases.Layout) -> Pairs:
    """What every step of each scope finds, with an optimizer that never steps."""
    logging.getLogger("megatron.core").setLevel(logging.WARNING)
    found: Pairs = {}
    for scope, config in CONFIGS.items():
        chunks = model.build(layout, torch.float32)
        settings = OptimizerConfig(lr=1.0, use_distributed_optimizer=layout.has("distopt"))
        optimizer = get_megatron_optimizer(settings, chunks)
        chunks[0].config.grad_scale_func = optimizer.scale_loss
        forward_step = attach(model.forward_step, config)
        found[scope] = []
        for samples in cases.steps("ragged"):
            model.run_step(forward_step, chunks, samples)
            assert forward_step.gradients is not None
            found[scope].append((forward_step.gradients.ratio, forward_step.gradients.cosine))
    return found


@pytest.mark.parametrize(
    "name", ["PP2 VPP2", "CP2 per-token", "DP2 TP2 SP PP2 distopt overlap", "DP2 overlap fused"]
)
def test_ratio_and_cosine_are_the_oracles(name: str, wanted: Pairs) -> None:
    layout = cases.Layout(name)
    for found in run_ranks(layout.processes, compared, layout, **layout.sizes):
        for scope, pairs in wanted.items():
            for mine, exact in zip(found[scope], pairs, strict=True):
                assert mine == pytest.approx(exact, rel=1e-5)
    # Far enough from the trivial answer that a mistake would show.
    assert all(abs(ratio - 1) > 0.01 for ratio, _ in wanted["microbatch"])


@pytest.mark.parametrize(("scope", "layout"), [("deferred", VPP2), ("global", OVERLAP)])
def test_training_is_the_same_to_the_last_bit(
    scope: str, layout: str, tmp_path: Path, data_flags: list[str]
) -> None:
    flags = (
        "--train-iters 4 --micro-batch-size 4 --global-batch-size 16 --save-interval 4 "
        "--loss-spike-factor 1.0001 "
        "--dist-ckpt-optim-fully-reshardable "
        f"--reweight-strategy linupper --reweight-scope {scope} --hidden-dropout 0.1 {layout}"
    ).split()
    runs = [
        run_program(
            tmp_path / name,
            *(*data_flags, *flags, *extra),
            *("--save", str(tmp_path / name / "checkpoints")),
            processes=2,
        ).check()
        for name, extra in (("without", ()), ("with", ("--reweight-gradient-interval", "2")))
    ]
    assert_same_bits(runs[1].checkpoint(4), runs[0].checkpoint(4))
    # Each sample is noted once.
    spikes = [
        [without_time(json.loads(line)) for line in path.read_text().splitlines()]
        for path in (run.directory / "spikes.jsonl" for run in runs)
    ]
    assert spikes[1] == spikes[0] != []
    for iteration, (plain, compared) in enumerate(
        zip(runs[0].train_metrics(), runs[1].train_metrics(), strict=True), start=1
    ):
        found = [compared["reweight"].pop(f"gradient_{what}", None) for what in ("ratio", "cosine")]
        assert without_time(compared) == without_time(plain)
        if iteration % 2:
            assert found == [None, None]
        else:
            ratio, cosine = found
            assert 0.5 < ratio < 2
            assert 0.5 < cosine < 1
            line = next(x for x in runs[1].log_lines() if f" {iteration}/" in x)
            logged = dict(re.findall(r"gradient (\w+): (\S+)", line))
            assert float(logged["ratio"]) == pytest.approx(ratio, rel=1e-5)
            assert float(logged["cosine"]) == pytest.approx(cosine, rel=1e-5)
