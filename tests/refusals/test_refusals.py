"""Bad flags and data: one message that names the place and the remedy, before any long work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.program import run_program
from tests.refusals.ground import Ground
from tests.refusals.spoil import SPOILERS
from tests.refusals.table import Case, read_cases

CASES = {case.what: case for case in read_cases()}


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Ground:
    return Ground(tmp_path_factory.mktemp("refusals"))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_refusal(case: Case, ground: Ground, tmp_path: Path) -> None:
    run = ground.run(case, tmp_path)
    assert set(run.status) == {2}, run.all_output
    assert ground.message(run) == case.message
    assert "Traceback" not in run.all_output
    assert "building GPT model" not in run.all_output
    # Rank 0 speaks for all.
    assert all(not output.strip() for output in run.output[1:])
    # Nothing of a checkpoint was run.
    assert not (ground.place.empty / "planted").exists()


def test_every_case_has_a_title_of_its_own() -> None:
    assert len(list(read_cases())) == len(CASES) > 90
    assert SPOILERS.keys() < CASES.keys()


@pytest.mark.parametrize(
    ("given", "missing"),
    [("--micro-batch-size 8", "--train-iters"), ("--train-iters 1", "--micro-batch-size")],
)
def test_required_flags_are_named(
    given: str, missing: str, tmp_path: Path, data_flags: list[str]
) -> None:
    run = run_program(tmp_path, *data_flags, *given.split())
    assert run.status == [2]
    assert missing in run.output[0].splitlines()[-1]


def test_small_sets_are_warned_about_once(tmp_path: Path, data_flags: list[str]) -> None:
    flags = "--train-iters 1 --micro-batch-size 2 --reweight-strategy linupper".split()
    run = run_program(tmp_path, *data_flags, *flags, processes=2).check()
    warning = "WARNING: samples compete for weight within --micro-batch-size 2 x 2"
    assert sum(output.count(warning) for output in run.output) == 1


def test_token_beyond_the_vocabulary_is_caught_when_drawn(tmp_path: Path, corpus: Path) -> None:
    """A `domains.json` that understates the largest id does not let it through."""
    prefix = tmp_path / "noise_text_document"
    for suffix in (".bin", ".idx"):
        source = corpus / f"noise_text_document{suffix}"
        prefix.with_suffix(suffix).write_bytes(source.read_bytes())
    record = {"prefix": prefix.name, "documents": 200, "tokens": 1, "max_token_id": 7}
    tokenizer = {"type": "NullTokenizer", "model": "none", "sha256": "0" * 64, "vocab_size": 9}
    content = {"version": 1, "tokenizer": tokenizer, "domains": {"noise": record}}
    (tmp_path / "domains.json").write_text(json.dumps(content))
    flags = "--train-iters 1 --micro-batch-size 8 --split 90,5,5 --tokenizer-type NullTokenizer"
    data = ["--data-path", str(prefix), "--vocab-size", "9"]
    run = run_program(tmp_path / "run", *flags.split(), *data)
    assert run.status == [2]
    assert "error: a sample holds token id" in run.output[0]
    assert "but the model's vocabulary has 16 entries" in run.output[0]
