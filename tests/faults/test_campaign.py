"""A few trials of the fault campaign, one for each kind of place; `make faults` runs them all."""

from __future__ import annotations

import pytest

from tests.faults.campaign import Campaign, Fault

MORE = [
    Fault("asynchronous", "writer", 20, (1,)),
    Fault("asynchronous", "backward", 17, (1,)),
    Fault("distributed optimizer", "write", 40, (0, 1)),
]
TRIALS = [
    # Megatron alone ends at these two with status 0 and without a word, or never starts again.
    Fault("asynchronous", "tracker", 3, (0,)),
    Fault("distributed optimizer", "data index", 3, (0,)),
]


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory, data_flags: list[str]) -> Campaign:
    return Campaign(tmp_path_factory.mktemp("campaign"), data_flags)


@pytest.mark.parametrize(
    "fault", [*TRIALS, *(pytest.param(fault, marks=pytest.mark.long) for fault in MORE)], ids=str
)
def test_nothing_is_lost(fault: Fault, campaign: Campaign) -> None:
    outcome = campaign.trial(fault)
    assert outcome.startswith("ok"), outcome
    assert "not reached" not in outcome


def test_a_wrong_trajectory_is_noticed(campaign: Campaign) -> None:
    expected = campaign.expected("asynchronous")
    assert expected.compared(expected.run) == ("", 0)
    expected.records[1]["lm_loss"] += 1e-7
    assert expected.compared(expected.run)[0].startswith("WRONG: iteration 2 is not")
    expected.records[1]["lm_loss"] = expected.run.train_metrics()[1]["lm_loss"]
