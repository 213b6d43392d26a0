"""The second model: its token losses are those of the model itself, and a snapshot outlives a run.

The scope `global` makes a scoring and a training pass, and both are given the same losses.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_rw.resilience.folder import SNAPSHOT_PREFIX
from tests.program import MODEL, OVERLAP, TP2, TRAINING, VPP2, Run, assert_same_bits, run_program
from tests.training.watched_reference import Note

# Embeddings that are tied, and a setting without a tensor that could tell.
OTHER = [
    *(flag for flag in MODEL if flag != "--untie-embeddings-and-output-weights"),
    *"--num-layers 8 --hidden-size 48 --ffn-hidden-size 80 --norm-epsilon 1e-2".split(),
]
BASE = [*OTHER, *TRAINING]
STEP = "--micro-batch-size 4 --global-batch-size 16 --train-iters 1 --finetune".split()
WEIGHTED = "--reweight-strategy linupper --reweight-scope global --cross-entropy-impl fused".split()
SNAPSHOTS = "--reweight-signal progress --reweight-snapshot-interval 2".split()


def watched(directory: Path, *flags: str, **how: Any) -> tuple[Run, list[Note]]:
    """A run, and what the loss function of its last rank was given."""
    how["module"] = "tests.training.watched_reference"
    run = run_program(directory, *flags, **how).check()
    path = directory / f"reference-{how.get('processes', 1) - 1}.pt"
    return run, torch.load(path) if path.exists() else []


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, data_flags: list[str]) -> Path:
    folder = tmp_path_factory.mktemp("reference")
    save = ["--save", str(folder / "checkpoints"), *"--save-interval 20 --no-save-optim".split()]
    flags = [*data_flags, *"--train-iters 20 --micro-batch-size 8 --hidden-dropout 0.1".split()]
    run_program(folder, *flags, *save, base=BASE).check()
    return folder / "checkpoints"


def test_reference_of_another_shape_gives_the_losses_of_the_model_itself(
    reference: Path, tmp_path: Path, data_flags: list[str]
) -> None:
    excess = ["--reweight-signal", "excess", "--reweight-reference-load", str(reference)]
    flags = [*data_flags, *STEP, *WEIGHTED]
    itself = ["--load", str(reference), *excess]
    _, direct = watched(tmp_path / "one", *flags, *itself, base=BASE)
    assert [scoring for scoring, *_ in direct] == [True] * 4 + [False] * 4
    for _, _, given, own in direct:
        assert torch.equal(given, own)

    layout = f"{TP2} {VPP2}".split()
    # With dropout in training, which a reference is without.
    dropout = "--hidden-dropout 0.3 --attention-dropout 0.3".split()
    cut = [*layout, *dropout]
    run, notes = watched(tmp_path / "cut", *flags, *excess, *cut, processes=4)
    # Data and random numbers are those of a run without a reference.
    plain, _ = watched(tmp_path / "plain", *data_flags, *STEP, *cut, processes=4)
    found, wanted_loss = (each.train_metrics()[0]["lm_loss"] for each in (run, plain))
    assert found == pytest.approx(wanted_loss, rel=1e-6)
    assert len(notes) == len(direct)
    for (_, labels, given, own), (_, wanted_labels, _, wanted) in zip(notes, direct, strict=True):
        assert torch.equal(labels, wanted_labels)
        torch.testing.assert_close(given, wanted, rtol=2e-6, atol=2e-6)
        assert not torch.allclose(given, own, rtol=1e-2)


def snapshot(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        name.removeprefix(SNAPSHOT_PREFIX): tensor
        for name, tensor in state.items()
        if name.startswith(SNAPSHOT_PREFIX)
    }


def test_snapshot_is_resumed_in_another_layout(tmp_path: Path, data_flags: list[str]) -> None:
    def run(name: str, *flags: str) -> tuple[Run, list[Note]]:
        given = [*data_flags, *STEP[:-1], *WEIGHTED, *SNAPSHOTS, *OVERLAP.split(), *flags]
        given.append("--dist-ckpt-optim-fully-reshardable")
        save = ["--save", str(tmp_path / name / "checkpoints")]
        return watched(tmp_path / name, *given, *save, processes=4)

    whole, notes = run("whole", *TP2.split(), *"--save-interval 3 --train-iters 4".split())
    states = whole.checkpoint(3), whole.checkpoint(4)
    names = {n for n in states[0] if not n.startswith(("optimizer.", "rng", SNAPSHOT_PREFIX))}
    assert snapshot(states[0]).keys() == names
    assert_same_bits(snapshot(states[1]), snapshot(states[0]))
    # In the step that takes it, the losses of the snapshot are the model's.
    assert len(notes) == 16
    for step in range(4):
        for scoring, _, given, own in notes[4 * step :][:2]:
            assert scoring
            assert torch.equal(given, own) == (step % 2 == 0)

    load = ["--load", str(tmp_path / "whole" / "checkpoints"), *"--ckpt-step 3".split()]
    again, _ = run("again", *VPP2.split(), *load, *"--save-interval 1 --train-iters 4".split())
    assert_same_bits(snapshot(again.checkpoint(4)), snapshot(states[0]))
    assert "the checkpoint has no snapshot" not in again.output[0]


def test_a_checkpoint_without_a_snapshot_is_told_of(
    reference: Path, tmp_path: Path, data_flags: list[str]
) -> None:
    flags = "--micro-batch-size 8 --train-iters 21 --no-load-optim --load".split()
    given = [*data_flags, *flags, str(reference), *WEIGHTED, *SNAPSHOTS]
    run, notes = watched(tmp_path, *given, base=BASE)
    assert run.output[0].count("> the checkpoint has no snapshot: ") == 1
    # With one micro-batch nothing is scored beforehand.
    assert len(notes) == 1
    assert all(torch.equal(given, own) for _, _, given, own in notes)


@pytest.mark.parametrize(
    ("layout", "why"),
    [
        (f"{VPP2} --num-layers 12 --num-virtual-stages-per-pipeline-rank 3", "8 layers, which"),
        ("--num-experts 2 --expert-model-parallel-size 2", "does not fit its model: num_moe_exp"),
    ],
)
def test_layouts_that_a_reference_cannot_have_are_refused(
    layout: str, why: str, reference: Path, tmp_path: Path, data_flags: list[str]
) -> None:
    """Rank 0 alone reads the checkpoint, and ends the job."""
    excess = ["--reweight-signal", "excess", "--reweight-reference-load", str(reference)]
    flags = [*data_flags, *STEP, *WEIGHTED, *excess, *layout.split()]
    run = run_program(tmp_path, *flags, processes=2, patience=0.1)
    assert run.status[0] == 2, run.all_output
    assert why in run.output[0].splitlines()[-1]
