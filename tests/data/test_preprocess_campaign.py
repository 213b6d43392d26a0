"""A few trials of the campaign; `python -m tests.data.preprocess_campaign` runs many."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.data.datasets import write_directory
from tests.data.preprocess_campaign import Campaign, Kill, differences, incomplete

# As many parts as files: the text is less than a chunk in each.
MEGABYTES = 1.0


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory, model: str) -> Campaign:
    return Campaign(tmp_path_factory.mktemp("campaign"), model, MEGABYTES)


@pytest.mark.parametrize(
    "kill",
    [
        Kill("one field", "rename", 9, "group"),
        Kill("one field", "part", 1, "worker"),
        Kill("one field", "parts", 1, "parent"),
        pytest.param(Kill("one field", "join", 2, "group"), marks=pytest.mark.long),
    ],
    ids=str,
)
def test_repeating_the_call_completes_it(kill: Kill, campaign: Campaign) -> None:
    outcome = campaign.trial(kill)
    assert outcome.startswith("ok, 2 attempts"), outcome
    reused = int(outcome.split(", ")[2].split()[0])
    assert reused >= (3 if kill.point in ("join", "rename") else 1), outcome


def test_what_is_wrong_is_noticed(tmp_path: Path) -> None:
    expected, found = tmp_path / "expected", tmp_path / "found"
    for folder in (expected, found):
        write_directory(folder, {"code": [[[1, 2]], [[3]]]})
    assert differences(expected, found) is incomplete(expected, found) is None
    (found / "left.bin").touch()
    assert differences(expected, found) == "left.bin is left behind"
    (found / "left.bin").unlink()
    index = found / "code_text_document.idx"
    index.write_bytes(index.read_bytes()[:-1] + b"?")
    assert differences(expected, found) == "code_text_document.idx differs"
    assert "is not that of the undisturbed run" in str(incomplete(expected, found))
    index.unlink()
    assert differences(expected, found) == "code_text_document.idx is missing"
    assert "code_text_document.idx, which is not there" in str(incomplete(expected, found))
