"""What the user sees: the log line, TensorBoard, W&B and metrics.jsonl, from a real run."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_rw.reweighting import DomainReport, ReweightReport, Weighting
from megatron_rw.training import reporting
from tests.program import Run, run_program
from tests.reweighting import oracle

SET_SIZE = 16
FLAGS = (
    "--train-iters 4 --micro-batch-size 8 --global-batch-size 32 --log-interval 2 "
    "--eval-interval 4 --eval-iters 2 --reweight-strategy linupper --reweight-temperature 0.4 "
    f"--reweight-log-samples {SET_SIZE}"
).split()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, data_flags: list[str]) -> Run:
    directory = tmp_path_factory.mktemp("reported")
    board = ["--tensorboard-dir", str(directory / "board")]
    return run_program(directory, *data_flags, *FLAGS, *board, processes=2).check()


HOW = Weighting(strategy="linupper", temperature=0.4)


def test_log_line_names_everything_in_order(run: Run) -> None:
    line = next(line for line in run.log_lines() if re.match(r" iteration +4/", line))
    names = [part.split(":")[0].strip() for part in line.split("|")]
    start = names.index("lm loss")
    ours = "weighted loss|ess|max weight|temperature|lm loss easy|weight easy"
    noise = "weight ratio easy|lm loss noise|weight noise|weight ratio noise"
    assert names[start + 1 : start + 11] == f"{ours}|{noise}".split("|")
    logged = run.train_metrics()[-1]
    assert f"| ess: {logged['reweight']['ess']:.6E} |" in line
    assert f"| temperature: {0.4:.6E} |" in line


def test_metrics_file_has_one_record_per_logged_step(run: Run) -> None:
    assert [(r["type"], r["iteration"]) for r in run.metrics] == [
        ("train", 1),
        ("train", 2),
        ("train", 4),
        ("validation", 4),
        ("validation", 4),
        ("test", 4),
    ]
    record = run.train_metrics()[-1]
    assert record["learning_rate"] == 0.01
    assert record["grad_norm"] > 0
    assert record["reweight"]["set_size"] == SET_SIZE
    domains = record["reweight"]["domains"].values()
    for domain in domains:
        ratio = domain["weight_share"] / domain["sample_share"]
        assert domain["weight_ratio"] == pytest.approx(ratio, rel=1e-6)
    shares = [d["weight_share"] for d in domains]
    assert math.fsum(shares) == pytest.approx(1, rel=1e-5)


def test_logged_samples_have_the_oracles_weights(run: Run) -> None:
    for record in run.train_metrics():
        samples = record["samples"]
        assert len(samples) == SET_SIZE
        expected = oracle.weights([s["loss"] for s in samples], HOW)
        assert [s["weight"] for s in samples] == pytest.approx(expected, rel=1e-5)
        assert {s["domain"] for s in samples} == {"easy", "noise"}


def test_validation_is_reported_by_domain(run: Run) -> None:
    for record in run.metrics[3:]:
        losses = [d["lm_loss"] for d in record["domains"].values()]
        assert len(losses) == 2
        assert min(losses) <= record["lm_loss"] <= max(losses)
    overall = run.metrics[3]["lm_loss"]
    assert f"validation loss at iteration 4 | lm loss value: {overall:.6E}" in run.output[-1]
    assert run.output[-1].count("test loss by domain at iteration 4 |") == 1
    assert "by domain" not in run.output[0]


def test_tensorboard_has_scalars(run: Run) -> None:
    board = EventAccumulator(str(run.directory / "board"))
    board.Reload()
    tags = board.Tags()
    for tag in (
        "lm loss",
        "reweight/ess",
        "reweight/max weight",
        "reweight/max weight x set size",
        "reweight/temperature",
        "reweight/weighted loss",
        "domain lm loss/noise",
        "domain weight share/easy",
        "domain ess/noise",
        "domain validation lm loss/easy",
    ):
        assert tag in tags["scalars"], tag
    assert [e.step for e in board.Scalars("reweight/ess")] == [1, 2, 4]


def test_wandb_gets_the_same_scalars(monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[tuple[dict[str, float], int]] = []
    wandb = SimpleNamespace(log=lambda values, step: logged.append((values, step)))
    monkeypatch.setattr(reporting, "get_wandb_writer", lambda: wandb)
    domains = [DomainReport(1.0, 0.4, 0.5, 0.8, 0.9), DomainReport(None, 0.0, 0.5, 0.0, None)]
    report = ReweightReport(2.0, 0.8, 0.1, 1.6, 0.25, 0.1, 16.0, 0.4, 0, None, 0.5, 4.0, domains)
    reporter = reporting.Reporter(["a", "b"])
    reporter.write_scalars(reporter.weights_scalars(report), 7)
    [(values, step)] = logged
    assert step == 7
    assert values["reweight/ess"] == 0.8
    assert values["reweight/share of sets above 2"] == 0.25
    assert values["reweight/share of samples beyond the range"] == 0.1
    assert values["domain weight share/a"] == 0.4
    assert values["domain weight ratio/a"] == 0.8
    assert "domain lm loss/b" not in values


def test_resumed_run_appends_what_json_can_hold(tmp_path: Path) -> None:
    for loss in (torch.tensor(0.1), torch.tensor(math.inf)):
        reporter = reporting.Reporter(["a"], reporting.MetricsFile(str(tmp_path)))
        reporter.write("train", 1, {"lm_loss": loss, "domains": {"a": [loss]}})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    logged = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    tenth = torch.tensor(0.1).item()
    assert [record["lm_loss"] for record in logged] == [tenth, None]
    assert [record["domains"] for record in logged] == [{"a": [tenth]}, {"a": [None]}]
