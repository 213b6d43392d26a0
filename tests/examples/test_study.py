"""The study: its data, its probes on models whose answers are known, and the whole of it, small."""

from __future__ import annotations

import dataclasses
import gzip
import json
import math
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks import study as results
from examples.stages import StageError
from examples.study import corpus, evaluate, run, study

VOCAB = 50


def uniform(tokens: Tensor) -> Tensor:
    return torch.zeros(*tokens.shape, VOCAB)


def counting(tokens: Tensor) -> Tensor:
    """Expects the next number."""
    return 6.0 * torch.nn.functional.one_hot((tokens + 1) % VOCAB, VOCAB).float()


def copying(tokens: Tensor) -> Tensor:
    """Expects what followed a token's last occurrence, and nothing after a new one."""
    logits = torch.zeros(*tokens.shape, VOCAB)
    for row in range(tokens.shape[0]):
        last: dict[int, int] = {}
        for at, token in enumerate(tokens[row].tolist()):
            if token in last:
                logits[row, at, tokens[row, last[token] + 1]] = 6.0
            last[token] = at
    return logits


@pytest.fixture
def examination(monkeypatch: pytest.MonkeyPatch) -> evaluate.Examination:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")
    rng = np.random.default_rng(1)
    texts = {
        "numbers": np.arange(4000) % VOCAB,
        "more": (np.arange(4000) + 7) % VOCAB,
        "noise-random": rng.integers(0, VOCAB, 4000),
    }
    return evaluate.Examination(texts, length=32, vocab_size=VOCAB, rows=40, items=50)


def test_a_model_that_knows_nothing(examination: evaluate.Examination) -> None:
    found = examination.losses(uniform) | examination.probes(uniform)
    losses = [found["lm_loss"], *(each["lm_loss"] for each in found["domains"].values())]
    assert losses == pytest.approx([math.log(VOCAB)] * 4)
    assert found["lm_loss_at_scale"] == pytest.approx(math.log(VOCAB))
    assert found["copy_gain"] == 0.0


def test_a_model_that_knows_the_text(examination: evaluate.Examination) -> None:
    found = examination.losses(counting) | examination.probes(counting)
    right = math.log(1 + (VOCAB - 1) * math.exp(-6))
    assert found["domains"]["numbers"]["lm_loss"] == pytest.approx(right, rel=1e-4)
    assert found["domains"]["noise-random"]["lm_loss"] > math.log(VOCAB)
    # It is never wrong on clean text, so that it could be surer: the noise is not fitted to.
    assert found["logit_scale"] == 1.6
    assert found["lm_loss_at_scale"] < right / 5
    assert found["choice_accuracy"] > 0.9
    # A model that is too sure is to be told so.
    flatter = examination.probes(lambda tokens: counting(tokens) * 0.1 + 2 * uniform(tokens))
    assert flatter["choice_accuracy"] == found["choice_accuracy"]


def test_a_model_that_copies(examination: evaluate.Examination) -> None:
    assert examination.probes(copying)["copy_gain"] > 1.0


def test_choices_have_one_text_and_four_ends() -> None:
    text = np.arange(1000)
    found = evaluate.choices(text, 12, 4, 20, np.random.default_rng(0)).reshape(20, 4, 16)
    assert (found[:, :, :12] == found[:, :1, :12]).all()
    assert (np.diff(found[:, 0], axis=1) == 1).all()
    for item in found:
        assert not {tuple(item[0, 12:])} & {tuple(wrong[12:]) for wrong in item[1:]}


def test_rows_are_evenly_spaced_and_do_not_overlap() -> None:
    assert evaluate.evenly(np.arange(100), 10, 4)[:, 0].tolist() == [0, 30, 60, 90]
    assert evaluate.evenly(np.arange(25), 10, 4).shape == (2, 10)


def test_kinds_of_noise_become_domains(tmp_path: Path) -> None:
    kinds = ("x_y", "z", "z", "z", "z", "z")
    lines = [
        {"text": str(number) * 10, "source": f"synthetic:{kind} #1"}
        for number, kind in enumerate(kinds)
    ]
    for split in ("train", "valid"):
        (tmp_path / split).mkdir()
        with gzip.open(tmp_path / split / "noise.jsonl.gz", "wt") as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines))
        for name in ("wiki", "books.en"):
            text = json.dumps({"text": "b"}) + "\n"
            (tmp_path / split / f"{name}.jsonl").write_text(text * 2)
    flags = ["--corpus", str(tmp_path), "--output-dir", str(tmp_path / "out")]
    assert corpus.main([*flags, "--train-bytes", "15"]) == 0

    def documents(part: str) -> list[str]:
        path = tmp_path / "out" / part / "noise.jsonl"
        records = [json.loads(line) for line in path.read_text().splitlines()]
        return [f"{record['domain']} {record['text'][0]}" for record in records]

    # Every second one is for branches, and each part has up to 15 bytes of a domain.
    assert documents("trunk") == ["noise-x-y 0", "noise-z 1"]
    assert documents("branch") == ["noise-z 2"]
    assert documents("valid") == ["noise-x-y 0", *(f"noise-z {n}" for n in range(1, 6))]


BROKEN: dict[str, tuple[str, bytes, str]] = {
    "json": ("train/a.jsonl", b'{"text": "x"}\n{"te', "a.jsonl:2: no document, JSONDecodeError"),
    "blank": ("train/a.jsonl", b"\n", "a.jsonl:1: no document, JSONDecodeError"),
    "key": ("train/a.jsonl", b'{"body": "x"}\n', "a.jsonl:1: no document, KeyError: 'text'"),
    "list": ("train/a.jsonl", b"[1]\n", "a.jsonl:1: no document, TypeError"),
    "null": ("train/a.jsonl", b'{"text": null}\n', "a.jsonl:1: no document, AttributeError"),
    "surrogate": ("train/a.jsonl", b'{"text": "\\ud800"}\n', "a.jsonl:1: no document, Unicode"),
    "encoding": ("train/a.jsonl", b'{"text": "\xff"}\n', "a.jsonl:0: no document, Unicode"),
    "gzip": ("train/b.jsonl.gz", gzip.compress(b"x" * 99)[:-9], "b.jsonl.gz:0: no document, EOFE"),
    "empty": ("train/a.jsonl", b"", "a.jsonl: no document for trunk"),
    "other": ("train/c.jsonl", b"", "train/ and valid/ have other domains"),
    "twice": ("train/a.jsonl.gz", b"", "a.jsonl.gz: name the file DOMAIN.jsonl or .jsonl.gz, once"),
    "name": ("train/a b.jsonl", b"", "a b.jsonl: name the file DOMAIN.jsonl or .jsonl.gz, once"),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_corpus_is_refused(
    broken: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for split in ("train", "valid"):
        (tmp_path / split).mkdir()
        for name in ("a.jsonl", "b.jsonl.gz", "noise.jsonl"):
            content = b'{"text": "x"}\n' * 4
            content = gzip.compress(content) if name.endswith("gz") else content
            (tmp_path / split / name).write_bytes(content)
    name, content, message = BROKEN[broken]
    (tmp_path / name).write_bytes(content)
    assert corpus.main(["--corpus", str(tmp_path), "--output-dir", str(tmp_path / "out")]) == 2
    said = capfd.readouterr().err
    assert said.startswith("error: ")
    assert message in said
    assert said.count("\n") == 1


def test_a_corpus_without_domains_is_refused(capfd: pytest.CaptureFixture[str]) -> None:
    assert corpus.main(["--corpus", "gone", "--output-dir", "unused"]) == 2
    assert "error: --corpus gone: train/ has fewer than two domains" in capfd.readouterr().err


@pytest.mark.parametrize("size", study.SIZES)
def test_arms_have_names_of_their_own_and_what_they_build_on(size: str) -> None:
    chosen = study.SIZES[size]
    assert set(chosen.arms) <= {arm.name for arm in study.ARMS}
    for noise in chosen.noise:
        names = [arm.name for arm in chosen.selected(noise)]
        assert len(set(names)) == len(names)
        assert names[0] == study.BASELINE
        for arm in chosen.selected(noise):
            assert arm.shares_of is None or names.index(arm.shares_of) < names.index(arm.name)


def test_an_arm_that_is_run_with_more_noise_keeps_its_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made_from() -> dict[str, str]:
        stages = run.Plan(study.SIZES["cpu"], tmp_path, None).stages()
        return {stage.name: stage.fingerprint for stage in stages}

    before = made_from()
    more = [dataclasses.replace(arm, noise=study.EVERYWHERE) for arm in study.ARMS]
    monkeypatch.setattr(study, "ARMS", more)
    after = made_from()
    kept = {name: after[name] for name in before if not re.search("report|evaluation", name)}
    assert kept.items() <= before.items()
    assert len(after) > len(before) > len(kept)


def test_weight_shares_are_means_over_the_steps(tmp_path: Path) -> None:
    def step(**shares: float) -> str:
        domains = {name: {"weight_share": share} for name, share in shares.items()}
        return json.dumps({"type": "train", "iteration": 30, "reweight": {"domains": domains}})

    first = step(b=1.0)  # Of a step alone, where the others are means over an interval.
    lines = [first, step(a=0.75, b=0.25), step(a=1.0), '{"type": "validation"}']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert run.weight_shares(tmp_path, 30) == {"a": 0.875, "b": 0.125}
    with pytest.raises(StageError, match="it does not end at step 40; delete"):
        run.weight_shares(tmp_path, 40)


def smoke(out: Path) -> list[str]:
    flags = ["--size", "smoke", "--output-dir", str(out)]
    return [sys.executable, "-m", "examples.study.run", *flags]


def test_the_whole_study(tmp_path: Path) -> None:
    """What `make study-smoke` runs: arms, a reference, a blend from a run, probes and the page."""
    done = subprocess.run(smoke(tmp_path), check=True, stdout=subprocess.PIPE, text=True)
    assert "Of 5 arms against none over 2 trunks," in done.stdout
    assert "does a reference choose good tokens?  top tokens by excess" in done.stdout
    found = json.loads((tmp_path / "noise-10.json").read_text())
    assert found["chance"]["pairs"] == 2
    arms = {arm["name"]: arm for arm in found["arms"]}
    assert set(arms) == set(study.SIZES["smoke"].arms) - {"none", "none, order 2"}
    # On whole sequences uniform weights are Megatron's own loss, bit for bit.
    same = arms["uniform"]["summary"]["differences"].values()
    assert all(each["mean"] == each["sd"] == 0.0 for each in same)
    # A checkpoint a step, of 8 rows of 32 tokens.
    curve = arms["linupper 0.4"]["summary"]["curve"]
    assert list(curve) == [str(8 * 32 * steps) for steps in (1, 2, 3, 4)]
    measured = set(found["arms"][0]["summary"]["differences"])
    assert {"noise", "logit_scale", "choice_accuracy", "copy_gain", "worst domain"} <= measured
    assert {name for name in measured if name.startswith("loss of noise-")}
    # Only the blend differs in more than its arm.
    others = [text for text in found["warnings"] if not text.endswith("another train_data_path")]
    assert not others
    # What is published names no folder of this machine.
    published = tmp_path / "published.json"
    assert results.main([str(tmp_path), "--output", str(published)]) == 0
    arms_of = json.loads(published.read_text())["conditions"]["noise-10"]["arms"]
    assert arms_of.keys() == arms.keys() - {study.BASELINE}
    assert all(len(arm["loss_by_trunk"]) == 2 for arm in arms_of.values())
    assert str(tmp_path) not in published.read_text()
    # All is done, so that another call does nothing but print.
    begun = time.monotonic()
    again = subprocess.run(smoke(tmp_path), check=True, stdout=subprocess.PIPE, text=True)
    assert time.monotonic() - begun < 10
    first, rest = again.stdout.split("\n", 1)
    assert re.fullmatch(r"all \d+ stages are current", first)
    assert done.stdout.endswith(rest)


@pytest.mark.long
def test_a_study_that_was_killed_twice_gives_the_same_page(tmp_path: Path) -> None:
    out = tmp_path / "study"
    for ending in (signal.SIGKILL, signal.SIGTERM):
        runner = subprocess.Popen(smoke(out))
        time.sleep(random.uniform(15, 30))
        runner.send_signal(ending)
        runner.wait()
        time.sleep(15)  # What SIGKILL leaves behind ends.
    subprocess.run(smoke(out), check=True)
    resumed = [(out / f"noise-10.{kind}").read_bytes() for kind in ("html", "png", "json")]
    out.rename(tmp_path / "resumed")
    subprocess.run(smoke(out), check=True)
    assert [(out / f"noise-10.{kind}").read_bytes() for kind in ("html", "png", "json")] == resumed
