"""The choices beyond the paper in the real program: token means, dropped tokens, and an end."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.program import Run, run_program

STEPS = 4
FLAGS = f"--train-iters {STEPS} --global-batch-size 16 --log-interval 1".split()


def run(directory: Path, data_flags: list[str], *flags: str, processes: int = 1) -> Run:
    lines = [word for flag in flags for word in flag.split()]
    return run_program(directory, *data_flags, *FLAGS, *lines, processes=processes).check()


def losses(found: Run) -> list[float]:
    return [record["lm_loss"] for record in found.train_metrics()]


@pytest.mark.parametrize(
    ("layout", "tolerance"),
    [
        # Full sequences: Megatron's own loss, bit for bit.
        ("--micro-batch-size 8", 0.0),
        # Masks: on one data-parallel rank, and as a token mean over the whole batch.
        ("--micro-batch-size 8 --eod-mask-loss", 1e-6),
        ("--micro-batch-size 4 --eod-mask-loss --calculate-per-token-loss", 1e-6),
    ],
)
def test_uniform_over_tokens_is_megatrons_loss(
    layout: str, tolerance: float, tmp_path: Path, data_flags: list[str]
) -> None:
    processes = 2 if "per-token" in layout else 1
    scope = "--reweight-scope global" if "per-token" in layout else ""
    plain = run(tmp_path / "none", data_flags, layout, processes=processes)
    uniform = f"--reweight-strategy uniform --reweight-normalizer token {scope}"
    weighted = run(tmp_path / "uniform", data_flags, layout, uniform, processes=processes)
    assert losses(weighted) == pytest.approx(losses(plain), rel=tolerance, abs=0.0)
    # Of the first step, as rounding grows from step to step.
    norms = [r.train_metrics()[0]["grad_norm"] for r in (weighted, plain)]
    assert norms[0] == pytest.approx(norms[1], rel=tolerance, abs=0.0)


@pytest.mark.parametrize("scope", ["microbatch", "global", "deferred"])
def test_random_drop_keeps_its_share_until_it_ends(
    scope: str, tmp_path: Path, data_flags: list[str]
) -> None:
    found = run(
        tmp_path,
        data_flags,
        "--micro-batch-size 4 --reweight-strategy topk --reweight-top-share 0.6",
        f"--reweight-unit token --reweight-control random-drop --reweight-scope {scope}",
        "--reweight-until 3",
        processes=2,
    )
    ess = [record["reweight"]["ess"] for record in found.train_metrics()]
    # The first step of the scope deferred has no threshold; a share of tokens is kept at random.
    assert ess[1:3] == pytest.approx([0.6, 0.6], abs=0.05)
    assert ess[3] == pytest.approx(1.0)


def test_permuted_weights_follow_no_loss(tmp_path: Path, data_flags: list[str]) -> None:
    flags = "--micro-batch-size 8 --reweight-strategy linupper --reweight-temperature 0.2"
    flags += " --reweight-log-samples 16"
    dealt = run(tmp_path / "dealt", data_flags, flags, "--reweight-control permute", processes=2)
    plain = run(tmp_path / "plain", data_flags, flags, processes=2)
    first, other = (r.train_metrics()[0]["reweight"] for r in (dealt, plain))
    assert first["ess"] == pytest.approx(other["ess"], rel=1e-5)
    assert first["max_weight"] == pytest.approx(other["max_weight"], rel=1e-5)
    weights = [
        [sample["weight"] for sample in r.train_metrics()[0]["samples"]] for r in (dealt, plain)
    ]
    assert sorted(weights[0]) == pytest.approx(sorted(weights[1]), rel=1e-5)
    assert weights[0] != pytest.approx(weights[1], rel=1e-3)
