"""The quick start end to end with a model of no size: stages, skipping, failure, report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from examples.quickstart import report, run

TINY = (
    "--num-layers 2 --hidden-size 16 --ffn-hidden-size 32 --num-attention-heads 2 "
    "--num-query-groups 1 --seq-length 32 --max-position-embeddings 32 --train-iters 6 "
    "--lr-warmup-iters 2 --eval-interval 3 --eval-iters 2 --log-interval 1"
).split()


def stages_of(output: str) -> dict[str, bool]:
    """Stage name to whether it was skipped."""
    lines = [line for line in output.splitlines() if line.startswith("[") and "..." not in line]
    return {line.split("] ")[1].split(":")[0]: "skipped" in line for line in lines}


def test_runs_then_skips_then_redoes_what_changed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real stages, with a small model, few steps and little text."""
    monkeypatch.setattr(run, "MODEL_AND_TRAINING", [*run.MODEL_AND_TRAINING, *TINY])
    monkeypatch.setattr(run, "CORPUS", ["--max-bytes-per-domain", "150000"])
    monkeypatch.setattr(run, "VOCAB_SIZE", 600)
    arguments = ["--output-dir", str(tmp_path)]
    assert run.main(arguments) == 0
    first = capfd.readouterr().out
    names = ["corpus", "tokenizer", "tokenize train", "tokenize valid",
             "pretrain none", "pretrain linupper", "report"]  # fmt: skip
    assert stages_of(first) == dict.fromkeys(names, False)
    assert "step 6/6, lm loss" in first
    assert (tmp_path / "report.png").stat().st_size > 20_000
    text = (tmp_path / "report.txt").read_text()
    assert text.splitlines()[0].split() == [
        "validation", "loss", "none", "linupper", "change", "samples", "weight",
    ]  # fmt: skip
    assert {line.split()[0] for line in text.splitlines()[2:-2]} >= {"code", "noise", "prose"}

    # Both runs saw the same batches from the same initialisation.
    runs = [report.Run.load(tmp_path / "runs" / name, name) for name in ("none", "linupper")]
    assert runs[0].train[0]["lm_loss"] == runs[1].train[0]["lm_loss"]

    # What has lost its output is made again, and nothing else.
    (tmp_path / "report.png").unlink()
    assert run.main(arguments) == 0
    again = dict.fromkeys(names, True) | {"report": False}
    assert stages_of(capfd.readouterr().out) == again

    # What changed is redone. A stage that fails says so and stays undone.
    monkeypatch.setattr(run, "CORPUS", ["--max-bytes-per-domain", "none"])
    assert run.main(arguments) == 1
    failed = capfd.readouterr().err
    assert "--max-bytes-per-domain" in failed
    assert "error: stage 'corpus' failed" in failed
    assert not (tmp_path / ".stages" / "corpus").exists()


def test_blend_gives_the_noise_a_tenth(tmp_path: Path) -> None:
    domains = {name: {"prefix": f"{name}_text_document"} for name in ("code", "noise", "prose")}
    (tmp_path / "domains.json").write_text(json.dumps({"domains": domains}))
    words = run.blend(tmp_path)
    assert words[::2] == ["0.450000", "0.100000", "0.450000"]
    assert words[3] == str(tmp_path / "noise_text_document")


def write_metrics(folder: Path, *records: tuple[str, dict[str, Any]]) -> None:
    lines = [json.dumps({"type": kind, "iteration": 1, **fields}) for kind, fields in records]
    (folder / "metrics.jsonl").write_text("\n".join(lines))


def test_report_takes_the_later_of_two_records(tmp_path: Path) -> None:
    validation = {"lm_loss": 3.0, "domains": {"a": {"lm_loss": 3.0}}}
    train = [("train", {"lm_loss": loss}) for loss in (5.0, 4.0)]
    write_metrics(tmp_path, *train, ("validation", validation))
    loaded = report.Run.load(tmp_path, "x")
    assert loaded.curve(loaded.train, "lm_loss") == ([1], [4.0])
    assert loaded.curve(loaded.train, "reweight", "ess") == ([], [])


def test_report_without_metrics_or_validation_says_so(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no such file; train with --log-dir"):
        report.Run.load(tmp_path, "x")
    write_metrics(tmp_path, ("train", {"lm_loss": 5.0}))
    with pytest.raises(SystemExit, match="no validation; train with --eval-interval"):
        report.Run.load(tmp_path, "x")
