"""Rho-1's selection of tokens, against a program of its own in fp64.

The reference's losses come from a model that runs beside, or from the files of score_dataset. The
two are the same where a training sequence holds what the scorer saw: here one document each, whose
last position, that of the next document's first token, is masked.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from megatron_rw.data.indexed.pair import PairWriter
from tests.corpus import EOD, VOCAB_SIZE
from tests.program import run_program
from tests.scoring.test_score_dataset import run_scoring

SEQ, SHARE, RANKS, MICRO_BATCHES = 32, 0.6, 2, 2
FLAGS = (
    "--train-iters 1 --micro-batch-size 4 --global-batch-size 16 --eod-mask-loss "
    "--reweight-strategy topk --reweight-top-share 0.6 --reweight-unit token "
    "--reweight-signal excess"
).split()


def rho1(losses: NDArray[Any], reference: NDArray[Any]) -> tuple[NDArray[Any], float, float]:
    """Lin et al. 2024 (arXiv 2404.07965), section 2.2, over the tokens of a batch, `[n]` each.

    Returns the gradient of the objective by each loss, the objective, and the excess loss of the
    last token that is selected.
    """
    excess = losses.astype(np.float64) - reference
    count = int(np.ceil(SHARE * len(excess) - 1e-6))
    last = np.sort(excess)[::-1][count - 1]
    selected = excess >= last
    return selected / selected.sum(), float(losses[selected].mean()), float(last)


def record_passes(folder: Path) -> None:
    """Lets a rank leave of each training pass: mask, losses, their gradient, signal, file."""
    from megatron_rw.training.loss import PretrainLoss

    original, notes = PretrainLoss._weighted, []

    def weighted(self: Any, reweighting: Any, batch: Any, mask: Any, losses: Any) -> Any:
        signal = self._signal(reweighting, batch, losses)
        if not reweighting.scoring:
            note = {"mask": mask.clone(), "losses": losses.detach().clone(), "signal": signal}
            if batch.reference is not None:
                note["stored"] = batch.reference.clone()
            notes.append(note)

            def keep(gradient: torch.Tensor) -> None:
                note["gradient"] = gradient.clone()
                torch.save(notes, folder / f"passes{os.environ['RANK']}.pt")

            losses.register_hook(keep)
        return original(self, reweighting, batch, mask, losses)

    PretrainLoss._weighted = weighted  # type: ignore[method-assign, assignment]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents as long as a sequence, half of which repeat themselves."""
    prefix = tmp_path_factory.mktemp("documents") / "all_text_document"
    rng = np.random.default_rng(2)
    with PairWriter(prefix, np.uint16) as writer:
        for number in range(200):
            ids = np.arange(SEQ) % 7 if number % 2 else rng.integers(0, EOD, SEQ)
            ids[-1] = EOD
            writer.write_tokens(ids.astype(np.uint16))
        writer.add_documents(np.full(200, SEQ))
        writer.finalize()
    return prefix


@pytest.fixture(scope="module")
def references(data: Path, data_flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The flags of either kind: a checkpoint, and the files that were scored with it."""
    folder = tmp_path_factory.mktemp("reference")
    save = ["--save", str(folder / "checkpoints"), *"--save-interval 20 --no-save-optim".split()]
    run_program(
        folder, *data_flags, *"--train-iters 20 --micro-batch-size 8".split(), *save
    ).check()
    length = ["--seq-length", str(SEQ), "--max-position-embeddings", str(SEQ)]
    scores = folder / "scores"
    run_scoring(folder / "log", data, folder / "checkpoints", scores, *length).check()
    return {
        "model": ["--reweight-reference-load", str(folder / "checkpoints")],
        "file": ["--reweight-reference-scores", str(scores)],
    }


def passes(directory: Path, data: Path, *flags: str) -> list[dict[str, NDArray[Any]]]:
    """The micro-batches of the first step over all ranks, their tokens in a row."""
    directory.mkdir()
    given = ["--data-path", str(data), "--split", "100,0,0", "--eval-iters", "0"]
    given += ["--tokenizer-type", "NullTokenizer", "--vocab-size", str(VOCAB_SIZE)]
    prepare = functools.partial(record_passes, directory)
    cache = ["--data-cache-path", str(directory / "cache")]
    run_program(directory, *given, *cache, *FLAGS, *flags, processes=RANKS, prepare=prepare).check()
    ranks = [torch.load(directory / f"passes{rank}.pt") for rank in range(RANKS)]
    assert [len(rank) for rank in ranks] == [MICRO_BATCHES] * RANKS
    return [
        {key: torch.cat([note[key].flatten() for note in notes]).numpy() for key in notes[0]}
        for notes in zip(*ranks, strict=True)
    ]


@pytest.mark.parametrize("scope", ["microbatch", "global"])
def test_selection_is_rho1s_with_either_reference(
    scope: str, data: Path, references: Any, tmp_path: Path
) -> None:
    model, file = (
        passes(tmp_path / name, data, "--reweight-scope", scope, *flags)
        for name, flags in references.items()
    )
    for one, other in zip(model, file, strict=True):
        one["stored"] = other["stored"]
    sets = [[each] for run in (model, file) for each in run]
    if scope == "global":
        sets = [model, file]
    for notes in sets:
        joined = {key: np.concatenate([note[key] for note in notes]) for key in notes[0]}
        used = joined["mask"] > 0
        assert used.sum() == len(used) * (SEQ - 1) // SEQ
        losses, stored = joined["losses"][used], joined["stored"][used]
        wanted, objective, last = rho1(losses, stored)
        excess = losses - stored
        # Megatron averages over the ranks, and over the micro-batches of a step.
        found = joined["gradient"][used] / RANKS * MICRO_BATCHES / len(notes)
        # Its threshold is the edge of one of 4,096 bins, so that ties with the last one are kept.
        extra = (found > 0) & (wanted == 0)
        assert (found[wanted > 0] > 0).all()
        assert (excess[extra] > last - 1.02 * np.ptp(excess) / 4095).all()
        assert extra.sum() <= 3
        np.testing.assert_allclose(found, (found > 0) / (found > 0).sum(), rtol=1e-6)
        np.testing.assert_allclose(found @ losses, objective, rtol=extra.mean() + 1e-6)
    for one, other in zip(model, file, strict=True):
        used = one["mask"] > 0
        np.testing.assert_allclose(one["signal"][used], other["signal"][used], atol=1e-5)
        np.testing.assert_allclose(one["gradient"][used], other["gradient"][used], rtol=1e-6)
        # The scorer gives a document's first token no loss.
        assert np.isnan(other["signal"][~used]).all()
