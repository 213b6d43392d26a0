"""Static weights, stored losses and document numbers in the real program, in every layout."""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_rw.data import inspect_dataset
from megatron_rw.data.indexed.integrity import fingerprint
from megatron_rw.data.indexed.pair import Index
from megatron_rw.data.indexed.scores import SCORES, score_path
from megatron_rw.data.tokenizers.tokenizer import load_tokenizer
from megatron_rw.data.tokenizers.tokenizer_flags import TokenizerFlags
from tests.corpus import EOD
from tests.data.datasets import call
from tests.program import PP2, TP2, Run, run_program

BYTES = TokenizerFlags(tokenizer_type="ByteLevelTokenizer")
NAMES = ("easy_text_document", "noise_text_document")
FLAGS = (
    "--train-iters 2 --micro-batch-size 4 --global-batch-size 8 --reweight-strategy linupper "
    "--reweight-unit document --reweight-signal excess"
).split()


def write_values(corpus: Path, folder: Path) -> None:
    """A weight for every document that tells it, and a loss for every token that tells its place.

    Those of the second dataset are negative, and a first token has no loss.
    """
    datasets = {}
    for base, name in enumerate(NAMES):
        lengths = Index.open(corpus / name).lengths
        np.save(folder / f"{name}.npy", np.arange(1000 * base, 1000 * base + 200, dtype=np.float32))
        losses = np.arange(lengths.sum(), dtype=np.float32) * (1 - 2 * base)
        losses[np.cumsum(lengths) - lengths] = np.nan
        np.save(score_path(folder, name, "token_losses"), losses)
        datasets[name] = {"fingerprint": fingerprint(str(corpus / name)), "tokens": len(losses)}
    (folder / SCORES).write_text(json.dumps({"datasets": datasets}))


def record_batches(folder: Path) -> None:
    """Lets a rank leave what it read of its training batches."""
    from megatron_rw.training.batch import Batch, BatchReader

    original, kept = BatchReader.__call__, []

    @functools.wraps(original)
    def read(self: Any, iterator: Any, vp_stage: int | None, training: bool) -> Batch:
        batch = original(self, iterator, vp_stage, training)
        names = ("labels", "loss_mask", "sample_weights", "reference", "documents", "places")
        kept.append({name: getattr(batch, name) for name in names} | {"training": training})
        torch.save(kept, folder / f"batches{os.environ['RANK']}.pt")
        return batch

    BatchReader.__call__ = read  # type: ignore[method-assign, assignment]


@pytest.fixture(scope="module")
def values(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    folder = tmp_path_factory.mktemp("values")
    write_values(corpus, folder)
    return folder


def run(
    directory: Path, data_flags: list[str], values: Path, processes: int = 1, flags: str = ""
) -> tuple[Run, list[list[dict[str, torch.Tensor]]]]:
    """The run, and the training batches of each rank."""
    directory.mkdir()
    given = ["--reweight-sample-weights", str(values), "--reweight-reference-scores", str(values)]
    prepare = functools.partial(record_batches, directory)
    done = run_program(
        directory, *data_flags, *FLAGS, *given, *flags.split(), processes=processes, prepare=prepare
    ).check()
    batches = [torch.load(directory / f"batches{rank}.pt") for rank in range(processes)]
    for batch in batches[-1]:
        assert batch["training"] or batch["sample_weights"] is batch["documents"] is None
    return done, [[batch for batch in own if batch["training"]] for own in batches]


def test_all_ranks_with_the_loss_have_the_values_of_their_labels(
    tmp_path: Path, data_flags: list[str], corpus: Path, values: Path
) -> None:
    _, (single,) = run(tmp_path / "one", data_flags, values)
    assert len(single) == 4
    check_batches(single, corpus)
    _, tensor = run(tmp_path / "tp2", data_flags, values, 2, TP2)
    _, (first, last) = run(tmp_path / "pp2", data_flags, values, 2, PP2)
    for wanted, *ranks, early, late in zip(single, *tensor, first, last, strict=True):
        assert early["sample_weights"] is early["reference"] is early["documents"] is None
        for found in (*ranks, late):
            for name, value in wanted.items():
                if name not in ("training", "places"):
                    assert torch.equal(found[name].nan_to_num(-1), value.nan_to_num(-1)), name


def check_batches(batches: list[dict[str, torch.Tensor]], corpus: Path) -> None:
    """Every label against the document that its loss, and so its place, is of."""
    ids = [np.fromfile(corpus / f"{name}.bin", np.uint16).tolist() for name in NAMES]
    lengths = [Index.open(corpus / name).lengths for name in NAMES]
    of_token = [np.repeat(np.arange(len(each)), each).tolist() for each in lengths]
    missing, parts = 0, set()
    for batch in batches:
        for labels, weights, losses, documents in zip(
            *(batch[k].tolist() for k in ("labels", "sample_weights", "reference", "documents")),
            strict=True,
        ):
            member, number = int(weights[0] >= 1000), 0
            for label, weight, loss, document in zip(
                labels, weights, losses, documents, strict=True
            ):
                assert document == number
                number += label == EOD
                if loss != loss:
                    missing += 1
                    continue
                place = int(abs(loss))
                assert ids[member][place] == label
                assert weight == 1000 * member + of_token[member][place]
                parts.add((member, document))
    assert missing > 3
    assert {(0, 0), (0, 1), (1, 0), (1, 1)} <= parts


def test_extreme_weights_are_written_with_their_documents(
    tmp_path: Path, data_flags: list[str], corpus: Path, values: Path
) -> None:
    flags = "--reweight-scope global --micro-batch-size 2 --reweight-unit sequence"
    dump = "--reweight-dump-samples 3 --reweight-log-samples 8"
    done, batches = run(tmp_path / "dp2", data_flags, values, 2, f"{flags} {dump}")
    lines = [json.loads(line) for line in (done.directory / "samples.jsonl").open()]
    assert [(line["iteration"], line["which"]) for line in lines] == [
        (iteration, which) for iteration in (1, 2) for which in ["highest"] * 3 + ["lowest"] * 3
    ]
    base = {
        place[0]: float((weights * mask).double().sum() / mask.sum())
        for batch in (batch for own in batches for batch in own)
        for place, weights, mask in zip(
            batch["places"].tolist(), batch["sample_weights"], batch["loss_mask"], strict=True
        )
    }
    for record in done.train_metrics():
        mine = [line for line in lines if line["iteration"] == record["iteration"]]
        # Of eight samples six are written; a weight is told over what it is without a strategy.
        first = 8 * (record["iteration"] - 1)
        whole = sum(base[place] for place in range(first, first + 8))
        for line in mine:
            # Two samples can have the same loss.
            share = line["weight"] * base[line["sequence"]] / whole
            assert (line["loss"], line["domain"], pytest.approx(share, rel=1e-4)) in [
                (sample["loss"], sample["domain"], sample["weight"]) for sample in record["samples"]
            ]
        weights = [line["weight"] for line in mine]
        assert weights[:3] == sorted(weights[:3], reverse=True)
        assert weights[3:] == sorted(weights[3:])
        assert weights[2] >= weights[5]
        assert len({line["sequence"] for line in mine}) == 6
    # The loss of the first label that has one tells where it is, and so where the first one is.
    place_of = {}
    for batch in (batch for own in batches for batch in own):
        for place, losses in zip(batch["places"].tolist(), batch["reference"], strict=True):
            known = int(losses.isfinite().nonzero()[0])
            place_of[place[0]] = (place[1], abs(int(losses[known])) - known)
    for line in lines:
        member, token = place_of[line["sequence"]]
        lengths = Index.open(corpus / NAMES[member]).lengths
        starts = np.cumsum(lengths) - lengths
        assert line["dataset"] == str(corpus / NAMES[member])
        assert starts[line["document"]] + line["offset"] == token
        assert line["tokens"] == min(32, lengths[line["document"]] - line["offset"])
    shown = ("--samples", done.directory / "samples.jsonl")
    bytes_of = ("--tokenizer-type", "ByteLevelTokenizer", "--json")
    for line, text in zip(
        lines, call(inspect_dataset.main, *shown, *bytes_of).out.splitlines(), strict=True
    ):
        ids = np.fromfile(f"{line['dataset']}.bin", np.uint16)
        begin = place_of[line["sequence"]][1]
        wanted_text = load_tokenizer(BYTES).detokenize(ids[begin : begin + line["tokens"]].tolist())
        told = json.loads(text)
        assert bool(told.pop("before")) == (line["tokens"] == 1)
        assert told == {**line, "text": wanted_text}
