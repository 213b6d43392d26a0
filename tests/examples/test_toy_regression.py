"""The toy regression: a step against autograd, what its picture says, and its command line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from examples import toy_regression as toy
from megatron_rw.reweighting import loss_weights

WEIGHTED = toy.ARMS[1:]
# LinUpper, Quadratic and Extremes at one temperature.
TRIOS = [(toy.LINUPPER, toy.QUADRATIC, toy.EXTREMES), toy.SHARPER]


@pytest.fixture(scope="module")
def runs() -> toy.Runs:
    return toy.study(seeds=8)


def excess(runs: toy.Runs, labels: toy.Labels, steps: toy.Steps, arm: toy.Arm) -> Tensor:
    """The decades by which an arm ends above uniform, `[seeds]`."""
    return (runs[labels, steps, arm].decades() - runs[labels, steps, toy.UNIFORM].decades())[0]


@pytest.mark.parametrize("plain_length", [False, True])
def test_a_step_is_that_of_autograd(plain_length: bool) -> None:
    problem = toy.Problem.draw(toy.OUTLIERS, 3, torch.Generator().manual_seed(1))
    rates = torch.tensor([0.1, 0.3], dtype=torch.float64)
    run = toy.descend(problem, toy.LINUPPER, rates, plain_length)
    for seed in range(3):
        theta = torch.zeros(toy.DIMENSIONS, dtype=torch.float64, requires_grad=True)
        losses = 0.5 * (problem.inputs[0, seed] @ theta - problem.labels[0, seed]).square()
        weights = loss_weights(losses.detach(), "linupper", 1.0)
        [gradient] = torch.autograd.grad(weights @ losses, theta, retain_graph=True)
        [plain] = torch.autograd.grad(losses.mean(), theta)
        length = gradient.norm() / plain.norm()
        step = gradient / length if plain_length else gradient
        left = [0.5 * (problem.optimum[seed] + rate * step).square().sum() for rate in rates]
        torch.testing.assert_close(run.excess[:, seed, 1], torch.stack(left))
        torch.testing.assert_close(run.lengths[:, seed, 0], length.expand(2))


@pytest.mark.parametrize("arm", toy.ARMS, ids=str)
def test_tiny_losses_are_weighted_as_large_ones(arm: toy.Arm) -> None:
    losses = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
    expected = loss_weights(losses, arm.strategy, arm.temperature)
    torch.testing.assert_close(arm.weights(losses * 1e-12), expected)


@pytest.mark.parametrize("labels", toy.LABELS, ids=lambda labels: labels.name)
def test_noise_has_one_variance_in_the_share_that_is_named(labels: toy.Labels) -> None:
    problem = toy.Problem.draw(labels, 8, torch.Generator().manual_seed(0))
    noise = problem.labels - torch.einsum("tsbd,sd->tsb", problem.inputs, problem.optimum)
    assert (noise.abs() > 1e-9).double().mean() == pytest.approx(labels.noisy_share, abs=0.02)
    variance = 0.0 if labels == toy.EXACT else toy.NOISE_VARIANCE
    assert noise.square().mean() == pytest.approx(variance, abs=0.02)


@pytest.mark.parametrize("trio", TRIOS, ids=["r 1", "r 0.4"])
def test_a_low_rate_gives_the_order_of_the_paper(
    runs: toy.Runs, trio: tuple[toy.Arm, toy.Arm, toy.Arm]
) -> None:
    linupper, quadratic, extremes = (excess(runs, toy.EXACT, toy.LOW, arm) for arm in trio)
    assert (linupper < quadratic - 0.2).all()
    assert (quadratic < -0.5).all()
    assert (extremes > 0.5).all()


@pytest.mark.parametrize("labels", toy.LABELS, ids=lambda labels: labels.name)
def test_steps_of_the_plain_length_leave_no_gain(runs: toy.Runs, labels: toy.Labels) -> None:
    assert runs[labels, toy.LOW, toy.LINUPPER].lengths.mean() > 1.4
    assert (excess(runs, labels, toy.LOW, toy.LINUPPER) < 0).all()
    assert all(excess(runs, labels, toy.LOW_PLAIN, arm).mean() > 0 for arm in WEIGHTED)


def test_no_arm_beats_uniform_at_its_own_best_rate(runs: toy.Runs) -> None:
    assert all(excess(runs, toy.EXACT, toy.OWN, arm).mean() > 0.3 for arm in WEIGHTED)
    assert all(excess(runs, toy.ALL_NOISY, toy.OWN, arm).mean() > 0 for arm in WEIGHTED)


@pytest.mark.parametrize("trio", TRIOS, ids=["r 1", "r 0.4"])
@pytest.mark.parametrize("labels", [toy.SOME_NOISY, toy.OUTLIERS], ids=lambda labels: labels.name)
def test_noise_in_few_labels_makes_linupper_the_worst(
    runs: toy.Runs, labels: toy.Labels, trio: tuple[toy.Arm, toy.Arm, toy.Arm]
) -> None:
    linupper, quadratic, extremes = (excess(runs, labels, toy.OWN, arm) for arm in trio)
    assert (linupper > 0.2).all()
    assert linupper.mean() > max(quadratic.mean(), extremes.mean()) + 0.1


def test_its_own_best_rate_suits_linupper_better_than_that_of_uniform(runs: toy.Runs) -> None:
    own, best = (excess(runs, toy.EXACT, steps, toy.LINUPPER) for steps in (toy.OWN, toy.BEST))
    assert (own < best - 1.0).all()


def test_best_rates_lie_within_the_rates_that_are_tried(runs: toy.Runs) -> None:
    best = torch.cat([run.rates for (_, steps, _), run in runs.items() if steps == toy.OWN])
    assert toy.RATES[0] < best.min()
    assert best.max() < toy.RATES[-1]


def test_the_command_writes_what_it_prints(
    runs: toy.Runs,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(toy, "study", {8: runs}.__getitem__)
    toy.main(["--output", f"{tmp_path}/v1.0", "--seeds", "8"])
    printed = capsys.readouterr().out
    assert (tmp_path / "v1.0.txt").read_text() == printed
    assert printed.count("\nlinupper r 0.4 ") == len(toy.LABELS)
    assert (tmp_path / "v1.0.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--output none/toy", "error: --output: there is no directory none; make it\n"),
        ("--seeds 1", "error: --seeds 1: give a number above 1\n"),
    ],
)
def test_a_mistake_is_told_before_the_work(
    flags: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        toy.main(flags.split())
    assert ended.value.code == 2
    assert capsys.readouterr().err == message
