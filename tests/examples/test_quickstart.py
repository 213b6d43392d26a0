"""The quick start end to end with a model of no size: stages, skipping, failure, report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from examples import prepare
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
             "pretrain none", "pretrain linupper", "comparison", "report"]  # fmt: skip
    assert stages_of(first) == dict.fromkeys(names, False)
    assert "step 6/6, lm loss" in first
    assert (tmp_path / "report.png").stat().st_size > 20_000
    text = (tmp_path / "comparison.txt").read_text()
    assert text.startswith("1 arm against none, one run each: this cannot tell better from luck.")
    by_domain = next(line for line in text.splitlines() if line.startswith("by domain"))
    assert {"code", "noise", "prose"} < set(by_domain.split())
    assert "differs in more" not in text

    # Both runs saw the same batches from the same initialisation.
    runs = [report.records(tmp_path / "runs" / name) for name in ("none", "linupper")]
    assert runs[0]["train"][1]["lm_loss"] == runs[1]["train"][1]["lm_loss"]

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
    words = prepare.blend(tmp_path, run.NOISE_SHARE)
    assert words[::2] == ["0.450000", "0.100000", "0.450000"]
    assert words[3] == str(tmp_path / "noise_text_document")


def test_report_takes_the_later_of_two_records(tmp_path: Path) -> None:
    lines = [{"type": "train", "iteration": 1, "lm_loss": loss} for loss in (5.0, 4.0)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert report.records(tmp_path)["train"][1]["lm_loss"] == 4.0
