"""tools/score_dataset.py on checkpoints of the real program, against a model in plain torch."""

from __future__ import annotations

import contextlib
import functools
import json
import shutil
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_rw.command_line import parse_known
from megatron_rw.data.indexed.domains import DomainRecord, DomainsFile, TokenizerRecord
from megatron_rw.data.indexed.pair import Index, PairWriter
from megatron_rw.errors import UserError
from megatron_rw.scoring.command import ScoreConfig, expanded, job_flags
from megatron_rw.scoring.folder import ARRAYS
from megatron_rw.scoring.job import UNSUPPORTED, check_scoring
from megatron_rw.scoring.plan import MicroBatch
from megatron_rw.scoring.scorer import to_samples
from tests.corpus import EOD, VOCAB_SIZE
from tests.program import Run, kill_when, read_checkpoint, run_program
from tests.scoring import llama

SEQ = 128
NAMES = ("easy_text_document", "noise_text_document")
TOKENIZER = ["--tokenizer-type", "NullTokenizer", "--vocab-size", str(VOCAB_SIZE)]
LENGTHS = [2, 1, 64, 65, 66, 128, 129, 130, 300, 0, 20, 33, 257, 0]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents about as long as rows are, and empty ones, with a domains.json."""
    folder = tmp_path_factory.mktemp("scored")
    rng = np.random.default_rng(1)
    for name in NAMES:
        with PairWriter(folder / name, np.uint16) as writer:
            lengths = rng.permutation(LENGTHS)
            for length in lengths:
                ids = rng.integers(0, EOD if name.startswith("noise") else 8, length)
                writer.write_tokens(ids.astype(np.uint16))
            writer.add_documents(lengths)
            writer.finalize()
    domains = {
        name[:5].rstrip("_"): DomainRecord(name, len(LENGTHS), sum(LENGTHS), EOD) for name in NAMES
    }
    tokenizer = TokenizerRecord("NullTokenizer", "none", "0" * 64, VOCAB_SIZE)
    DomainsFile(tokenizer, domains).save(folder / "domains.json")
    return folder


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory, data_flags: list[str]) -> Path:
    folder = tmp_path_factory.mktemp("reference")
    save = ["--save", str(folder / "checkpoints"), "--save-interval", "20", "--no-save-optim"]
    flags = [*data_flags, "--train-iters", "20", "--micro-batch-size", "8"]
    return run_program(folder, *flags, *save).check().directory / "checkpoints"


Score = Callable[..., Run]


def run_scoring(
    log: Path, data: Path, checkpoints: Path, out: Path, *flags: str, **how: Any
) -> Run:
    """Score the data; flags given here win."""
    given = ["--data-path", str(data), "--load", str(checkpoints), "--score-dir", str(out)]
    rows = ["--seq-length", str(SEQ), "--max-position-embeddings", str(SEQ)]
    # Dropout is of training alone.
    sizes = "--micro-batch-size 2 --block-tokens 400 --hidden-dropout 0.3".split()
    how |= {"module": "megatron_rw.scoring.command", "metrics": False}
    return run_program(log, *TOKENIZER, *given, *rows, *sizes, *flags, **how)


@pytest.fixture
def score(tmp_path: Path, data: Path, checkpoints: Path) -> Score:
    return functools.partial(run_scoring, tmp_path / "log", data, checkpoints)


@pytest.fixture(scope="module")
def whole(
    tmp_path_factory: pytest.TempPathFactory, data: Path, checkpoints: Path
) -> tuple[Path, str]:
    """Scores of one process, and what it printed."""
    folder = tmp_path_factory.mktemp("whole")
    run = run_scoring(folder / "log", data, checkpoints, folder / "scores").check()
    return folder / "scores", run.output[0]


def arrays(out: Path) -> dict[str, bytes]:
    """All that the arrays hold, headers included."""
    files = {path.name: path.read_bytes() for path in sorted(out.glob("*.npy"))}
    assert len(files) == len(NAMES) * len(ARRAYS)
    return files


def reference(data: Path, checkpoints: Path, name: str, stride: int) -> np.ndarray:
    """The losses that `token_losses` should hold, from each document by itself."""
    weights = read_checkpoint(checkpoints / "iter_0000020")
    index, ids = Index.open(data / name), np.fromfile(data / f"{name}.bin", np.uint16)
    wanted = np.full(len(ids), np.nan, np.float32)
    for offset, length in zip(index.offsets // 2, index.lengths, strict=True):
        document = torch.from_numpy(ids[offset : offset + length].astype(np.int64))
        for start in range(0, max(1, length - 1 - (SEQ - stride)), stride):
            row = document[start : start + SEQ + 1]
            if len(row) > 1:
                skipped = SEQ - stride if start else 0
                made = llama.losses(weights, row)[skipped:]
                first = offset + start + 1 + skipped
                wanted[first : first + len(made)] = made.numpy()
    return wanted


@pytest.mark.parametrize("stride", [SEQ, 48])
def test_scores_are_those_of_another_model_implementation(
    stride: int, whole: tuple[Path, str], score: Score, tmp_path: Path, data: Path,
    checkpoints: Path,
) -> None:  # fmt: skip
    out = whole[0]
    if stride != SEQ:
        out = tmp_path / "scores"
        score(out, "--score-stride", str(stride)).check()
    for name in NAMES:
        losses = np.load(out / f"{name}.token_losses.npy", mmap_mode="r")
        wanted = reference(data, checkpoints, name, stride)
        assert np.isfinite(wanted).sum() == sum(max(0, n - 1) for n in LENGTHS)
        np.testing.assert_allclose(losses, wanted, atol=1e-5, rtol=0)


def test_what_is_recorded_and_printed(whole: tuple[Path, str], checkpoints: Path) -> None:
    found = json.loads((whole[0] / "scores.json").read_text())
    assert found["checkpoint"] == {"path": str(checkpoints), "iteration": 20}
    assert found["model"]["num_layers"] == 4
    assert len(found["datasets"][NAMES[0]]["fingerprint"]) == 16
    means = [np.load(whole[0] / f"{name}.token_losses.npy") for name in NAMES]
    for domain, losses in zip(("easy", "noise"), means, strict=True):
        assert found["domains"][domain]["loss"] == pytest.approx(np.nanmean(losses), rel=1e-5)
        assert f"{np.nanmean(losses):.4f}" in whole[1]
    assert "documents by loss in nats per token" in whole[1]


LAYOUTS = {
    "tp2": "--tensor-model-parallel-size 2",
    "pp2-fused": "--pipeline-model-parallel-size 2 --fused-linear-cross-entropy "
    "--logits-budget-mib 16",
    "pp2-vpp2": "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2",
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_another_layout_is_close(
    layout: str, whole: tuple[Path, str], score: Score, tmp_path: Path
) -> None:
    score(tmp_path / "scores", *LAYOUTS[layout].split(), processes=2).check()
    arrays(tmp_path / "scores")
    for name in NAMES:
        mine, other = (
            np.load(out / f"{name}.token_losses.npy") for out in (whole[0], tmp_path / "scores")
        )
        np.testing.assert_allclose(mine, other, atol=1e-5, rtol=0)


def test_killed_and_resumed_on_more_ranks_is_bitwise_the_same(
    whole: tuple[Path, str], score: Score, tmp_path: Path
) -> None:
    out = tmp_path / "scores"

    def done() -> int:
        path = out / "progress.json"
        return sum(json.loads(path.read_text())["scored"].values()) if path.exists() else 0

    killed = score(out, disturb=kill_when(lambda: done() >= 4))
    assert killed.status == [-9]
    assert not list(out.glob("*.npy")), "it was complete before it was killed"
    assert done() >= 4
    # What is there is not computed again: a mark put into the first block stays.
    first = f"{NAMES[0]}.token_losses.npy"
    marked = np.load(out / f"{first}.partial", mmap_mode="r+")
    marked[1] = 77
    score(out, processes=2).check()
    finished = np.load(out / first, mmap_mode="r+")
    assert finished[1] == 77
    finished[1] = np.load(whole[0] / first)[1]
    assert arrays(out) == arrays(whole[0])
    assert sorted(p.name for p in out.iterdir()) == sorted([*arrays(out), "scores.json"])
    assert (out / "scores.json").read_bytes() == (whole[0] / "scores.json").read_bytes()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({}, None),
        ({"mock_data": True}, "--mock-data has no dataset to score: drop it."),
        ({"fp16_lm_cross_entropy": True}, "--fp16-lm-cross-entropy rounds the losses to 16 bits"),
        ({"context_parallel_size": 2}, "--context-parallel-size above 1 cuts rows"),
        ({"gtp_weight_remat_size": 2}, "--tensor-parallel-num-weight-shards was not tried"),
        ({"cuda_graph_impl": "local"}, "--cuda-graph-impl wants one shape"),
        ({"seq_length": 99}, "--score-stride 100 would leave tokens out: give at most"),
    ],
)
def test_flags_of_a_job_that_scoring_refuses(changed: dict[str, Any], message: str | None) -> None:
    supported = dict.fromkeys(UNSUPPORTED) | {"context_parallel_size": 1, "seq_length": 100}
    supported |= {"gtp_weight_remat_size": 1, "cuda_graph_impl": "none"}
    config = ScoreConfig(load="c", score_dir="s", score_stride=100)
    refused = (
        contextlib.nullcontext() if message is None else pytest.raises(UserError, match=message)
    )
    with refused:
        check_scoring(config, Namespace(**(supported | changed)))


def test_a_micro_batch_is_what_a_loader_would_give() -> None:
    rows = np.array([[1, 0, 3], [4, 2, 4], [0, 0, 0]])
    drawn = to_samples("some", np.arange(10, 20), MicroBatch(5, rows), vocab_size=20)
    assert drawn["tokens"].tolist() == [[11, 12, 13, 0, 0], [14, 15, 16, 17, 0], [0] * 5]
    assert drawn["labels"].tolist() == [[12, 13, 14, 0, 0], [15, 16, 17, 18, 0], [0] * 5]
    assert drawn["loss_mask"].tolist() == [[1, 1, 1, 0, 0], [0, 0, 1, 1, 0], [0] * 5]
    assert drawn["position_ids"].tolist() == [[0, 1, 2, 3, 4]] * 3
    with pytest.raises(UserError, match=r"some.bin: holds token id 18, but the model's"):
        to_samples("some", np.arange(10, 20), MicroBatch(5, rows), vocab_size=18)


def test_flags(tmp_path: Path, data: Path) -> None:
    prefixes = [str(data / name) for name in NAMES]
    assert expanded([str(data)]) == prefixes
    assert expanded(["0.3", str(data), "0.7", "x/y"]) == [*prefixes, "x/y"]
    shutil.copytree(data, tmp_path / "cached")
    # Megatron's cache of a dataset, without --data-cache-path.
    (cached := tmp_path / "cached" / NAMES[0]).mkdir()
    assert expanded([str(cached)]) == [str(cached)]
    with pytest.raises(UserError, match=r"a folder without a domains.json"):
        expanded([str(tmp_path)])
    of_a_job = "--save there --async-save --split 98,1,1 --global-batch-size 7 --lr 1".split()
    # Megatron would take these in place of --load.
    of_a_job += "--pretrained-checkpoint p --non-persistent-ckpt-type global".split()
    argv = ["--load", "c", "--score-dir", "s", *of_a_job]
    flags = job_flags(*parse_known(ScoreConfig, argv, ""))
    assert flags[:4] == ["--lr", "1", "--load", "c"]
    assert not {"--save", "--async-save", "--global-batch-size", "98,1,1"} & set(flags)
    with pytest.raises(UserError, match="--score-dir '': give a folder to write to"):
        ScoreConfig(load="c", score_dir="")
    with pytest.raises(UserError, match=r"Missing .*: --load STR --score-dir STR"):
        parse_known(ScoreConfig, [], "")
    with pytest.raises(UserError, match="--score-stride 0: give a number of at least 1"):
        parse_known(ScoreConfig, [*argv, "--score-stride", "0"], "")
