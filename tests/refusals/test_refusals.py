"""Bad flags and data: one message that names the place and the remedy, before any long work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.program import Run, run_program
from tests.refusals.cases import Case
from tests.refusals.run import Ground
from tests.refusals.table import DOCUMENT, GROUPS, read_table, row

STEPS = "--train-iters 1 --micro-batch-size 8".split()


def refused(directory: Path, flags: list[str], processes: int = 1) -> Run:
    return run_program(directory, *flags, processes=processes, metrics=False)


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Ground:
    return Ground(tmp_path_factory.mktemp("refusals"))


@pytest.fixture(scope="module")
def documented() -> dict[str, tuple[str, str]]:
    return read_table(DOCUMENT.read_text())


@pytest.mark.parametrize("case", [pytest.param(c, id=c.what) for cs in GROUPS.values() for c in cs])
def test_refusal(
    case: Case, ground: Ground, documented: dict[str, tuple[str, str]], tmp_path: Path
) -> None:
    run = ground.run(case, tmp_path)
    assert run.status == [2] * case.processes, run.all_output
    message = ground.message(run)
    assert ground.place.stripped(ground.place.filled(case.says)) in message
    # The whole of it, word for word.
    assert documented[case.what] == row(case, message)
    assert "Traceback" not in run.all_output
    assert "building GPT model" not in run.all_output
    # Rank 0 speaks for all.
    assert all(not output.strip() for output in run.output[1:])
    # Nothing of a checkpoint was run.
    assert not (ground.place.empty / "planted").exists()


def test_table_holds_these_cases_and_no_others(documented: dict[str, tuple[str, str]]) -> None:
    cases = [case.what for group in GROUPS.values() for case in group]
    assert list(documented) == cases
    assert len(set(cases)) == len(cases)


@pytest.mark.parametrize("missing", ["--micro-batch-size", "--train-iters"])
def test_required_flags_are_named(missing: str, tmp_path: Path, data_flags: list[str]) -> None:
    steps = {
        "--micro-batch-size": ["--train-iters", "1"],
        "--train-iters": ["--micro-batch-size", "8"],
    }
    run = refused(tmp_path, [*data_flags, *steps[missing]])
    assert run.status == [2]
    assert missing in run.output[0].splitlines()[-1]


def test_small_sets_are_warned_about_once(tmp_path: Path, data_flags: list[str]) -> None:
    flags = "--train-iters 1 --micro-batch-size 2 --reweight-strategy linupper".split()
    run = run_program(tmp_path, *data_flags, *flags, processes=2).check()
    warning = "WARNING: samples compete for weight within --micro-batch-size 2 x 2"
    assert sum(output.count(warning) for output in run.output) == 1


def test_token_beyond_the_vocabulary_is_caught_when_drawn(
    tmp_path: Path, corpus: Path, data_flags: list[str]
) -> None:
    """A `domains.json` that understates the largest id does not let it through."""
    folder = tmp_path / "data"
    folder.mkdir()
    for suffix in (".bin", ".idx"):
        (folder / f"noise_text_document{suffix}").write_bytes(
            (corpus / f"noise_text_document{suffix}").read_bytes()
        )
    record = {"prefix": "noise_text_document", "documents": 200, "tokens": 1, "max_token_id": 7}
    tokenizer = {"type": "NullTokenizer", "model": "none", "sha256": "0" * 64, "vocab_size": 9}
    (folder / "domains.json").write_text(
        json.dumps({"version": 1, "tokenizer": tokenizer, "domains": {"noise": record}})
    )
    run = refused(
        tmp_path,
        [
            *STEPS,
            *["--data-path", str(folder / "noise_text_document"), "--split", "90,5,5"],
            *["--tokenizer-type", "NullTokenizer", "--vocab-size", "9"],
        ],
    )
    assert run.status == [1]
    assert "a sample holds token id" in run.output[0]
    assert "but the model's vocabulary has 16 entries" in run.output[0]
