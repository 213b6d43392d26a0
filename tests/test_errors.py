"""How errors end a program: a user's mistake in one line, a bug with its traceback."""

from __future__ import annotations

import builtins
import functools
import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest

from megatron_rw.errors import UserError, reported
from tests.program import MODEL, TRAINING, Run, run_program

DATA = "megatron_rw.data."
PREPROCESS, MERGE = f"{DATA}preprocess_data", f"{DATA}merge_datasets"
TRAIN_TOKENIZER, INSPECT = f"{DATA}train_tokenizer", f"{DATA}inspect_dataset"
SPLIT, SCORE = f"{DATA}split_dataset", "megatron_rw.scoring.command"
PREFLIGHT = "megatron_rw.preflight.command"
INSPECT_CHECKPOINT = "megatron_rw.resilience.inspect_checkpoint"
TRAIN = "--train-iters 2 --micro-batch-size 8 --reweight-strategy linupper"
BYTES = "--tokenizer-type ByteLevelTokenizer"

# Program, flags, and what its line names. {out} is no folder yet.
MISTAKES = [
    ("pretrain_gpt_rw", f"{TRAIN} --reweight-temperatur 2", "--reweight-temperatur"),
    ("pretrain_gpt_rw", f"{TRAIN} --reweight-delta 0", "--reweight-delta"),
    ("pretrain_gpt_rw", f"{TRAIN} --data-path /nowhere/text", "/nowhere"),
    ("pretrain_gpt_rw", f"{TRAIN} --num-attention-heads 5", "num_attention_heads"),
    (PREPROCESS, f"--input /nowhere.jsonl --output-dir {{out}} {BYTES}", "/nowhere.jsonl"),
    (PREPROCESS, f"--input {{text}} --output-dir {{text}} {BYTES}", "text.jsonl"),
    (PREPROCESS, f"--input {{text}} --output-dir {{out}} {BYTES} --workerz 2", "--workerz"),
    (PREPROCESS, f"--input {{text}} --output-dir {{out}} {BYTES} --workers 0", "--workers"),
    (PREPROCESS, f"--output-dir {{out}} {BYTES}", "--input"),
    (TRAIN_TOKENIZER, "--input {text} --output-prefix {out}/t --vocab-size many", "--vocab-size"),
    (TRAIN_TOKENIZER, "--input /nowhere --output-prefix {out}/t --vocab-size 300", "/nowhere"),
    (MERGE, "--input-dir /nowhere/text --output-dir {out}/all", "/nowhere/text"),
    (MERGE, "--output-dir {out}/all", "--input-dir"),
    (SPLIT, "--input /nowhere/text --output-dir {out} --valid-fraction 0.1", "/nowhere/text"),
    (
        SPLIT,
        "--input {corpus}/easy_text_document --output-dir {out} --valid-fraction 2",
        "--valid-fraction",
    ),
    (INSPECT, "/nowhere/text", "/nowhere/text"),
    (INSPECT, "{text}", "text.jsonl"),
    (INSPECT, "{corpus}/easy_text_document --verbos", "--verbos"),
    (SCORE, "--load /nowhere --score-dir {out} --micro-batch-size 8", "/nowhere"),
    (PREFLIGHT, f"{TRAIN} --wait-seconds none", "--wait-seconds"),
    (INSPECT_CHECKPOINT, "/nowhere", "/nowhere"),
]
OF_MEGATRON = ("pretrain_gpt_rw", SCORE, PREFLIGHT)

# What is replaced by a function that raises, and what was being done.
BUGS = {
    "parsing": ("megatron_rw.reweighting.config:ReweightConfig.__post_init__", "arguments"),
    "building": ("megatron_rw.training.datasets:Domains.__init__", "preparing"),
    "training": ("megatron_rw.reweighting.scopes:MicrobatchReweighter.weigh", "training"),
}


def run(program: str, directory: Path, flags: list[str], *bug: str) -> Run:
    base = (*MODEL, *TRAINING) if program in OF_MEGATRON else ()
    prepare = functools.partial(plant, *bug) if bug else None
    return run_program(directory, *flags, base=base, module=program, prepare=prepare, metrics=False)


def plant(place: str, error: str) -> None:
    """Lets what is called there, `module:Class.name`, raise an error."""
    module, _, path = place.partition(":")
    *classes, name = path.split(".")
    owner = functools.reduce(getattr, classes, importlib.import_module(module))
    assert hasattr(owner, name)

    def planted(*args: Any, **kwargs: Any) -> NoReturn:
        raise getattr(builtins, error)("planted")

    setattr(owner, name, planted)


@pytest.mark.parametrize(("program", "flags", "named"), MISTAKES)
def test_a_users_mistake_is_one_line(
    program: str, flags: str, named: str, tmp_path: Path, corpus: Path, data_flags: list[str]
) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "some words"}\n' * 9)
    given = flags.format(text=text, out=tmp_path / "out", corpus=corpus).split()
    data = data_flags if program in OF_MEGATRON else []
    ended = run(program, tmp_path / "run", [*data, *given])
    assert ended.status == [2], ended.all_output
    lines = ended.output[0].splitlines()
    assert [line for line in lines if "error" in line.lower()] == [lines[-1]], ended.all_output
    assert lines[-1].startswith("error: ")
    assert named in lines[-1]
    assert "Traceback" not in ended.all_output


@pytest.mark.parametrize("error", ["ValueError", "AssertionError"])
@pytest.mark.parametrize("moment", BUGS)
def test_a_bug_of_ours_shows_its_traceback(
    moment: str, error: str, tmp_path: Path, data_flags: list[str]
) -> None:
    bug, doing = BUGS[moment]
    flags = [*data_flags, *TRAIN.split()]
    ended = run("pretrain_gpt_rw", tmp_path, flags, bug, error)
    assert ended.status == [1], ended.all_output
    [before, *traces] = ended.output[0].split("Traceback (most recent call last):\n")
    # The last line is the test's fork server's own.
    line = before.splitlines()[-2]
    assert line.startswith("error: ")
    assert f"while {doing}" in line or f"while reading the {doing}" in line
    assert traces[-1].splitlines()[-1].strip() == f"{error}: planted"
    assert "in planted" in traces[-1]


@pytest.mark.parametrize("error", [OSError("disk"), BrokenPipeError()])
def test_an_error_of_the_system_is_nobodys_mistake_while_training(
    error: OSError, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(OSError), reported("training", training=True):  # noqa: PT011
        raise error
    assert "unexpected failure while training" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended, reported("reading", alike=True):
        raise FileNotFoundError("no such file: x")
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: no such file: x\n"


def test_rank_0_prints_for_all_what_all_know(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "3")
    for known in (True, False):
        with pytest.raises(SystemExit), reported("reading", alike=True):
            raise UserError("--flag: give it", known_to_all=known)
        assert bool(capsys.readouterr().err) is not known
    with pytest.raises(SystemExit), reported("training", training=True):
        raise UserError("an index is damaged")
    assert capsys.readouterr().err == "error: an index is damaged\n"


def test_a_tool_ends_quietly_where_nobody_reads_its_output() -> None:
    tool = subprocess.Popen(
        [sys.executable, "tools/merge_datasets.py", "--help"],
        cwd=Path(__file__).parents[1],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert tool.stdout is not None
    tool.stdout.close()
    assert tool.stderr is not None
    assert tool.stderr.read() == b""
    assert tool.wait() in (0, 120, 141)


def test_a_tool_without_its_packages_says_how_to_get_them() -> None:
    # Without the site's packages, as any other Python on the machine.
    tool = subprocess.run(
        [sys.executable, "-S", "tools/merge_datasets.py", "--input", "x"],
        cwd=Path(__file__).parents[1],
        env={},
        capture_output=True,
        text=True,
    )
    assert tool.returncode == 1
    assert tool.stderr.startswith("error: megatron_rw is not installed for ")
    assert tool.stderr.endswith(".venv/bin/python tools/merge_datasets.py --input x\n")
