"""What the data tools say while they work."""

import pytest

from megatron_rw.data import progress as progress_module
from megatron_rw.data.progress import Progress, duration

GB = 10**9


def test_a_line_tells_every_five_seconds_what_is_done_and_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 1000.0
    monkeypatch.setattr(progress_module, "monotonic", lambda: now)
    progress = Progress("merge_datasets: writing", 10 * GB)
    for second, line in [
        (4, ""),
        (5, "merge_datasets: writing: 2,000.0 MB, 400.0 MB/s, 20%, 20 s left\n"),
        (9, ""),
        (100, "merge_datasets: writing: 4,000.0 MB, 40.0 MB/s, 40%, 2 min left\n"),
        (110, "merge_datasets: writing: 5,000.0 MB, 45.5 MB/s, 50%, 110 s left\n"),
    ]:
        now = 1000.0 + second
        progress.advance(GB)
        assert capsys.readouterr().err == line
    # What an earlier call did is no speed, and nothing is left of an unknown size.
    progress, unknown = Progress("preprocess_data", 10 * GB), Progress("preprocess_data", 0)
    now += 10
    progress.skip(8 * GB)
    progress.advance(GB, 20_000, 3 * GB)
    unknown.advance(0, 1, GB)
    assert capsys.readouterr().err.splitlines() == [
        "preprocess_data: 20,000 documents, 3,000.0 MB, 300.0 MB/s, 90%, 10 s left",
        "preprocess_data: 1 documents, 1,000.0 MB, 100.0 MB/s",
    ]


def test_durations() -> None:
    seconds = (9.9, 10, 119, 120, 7199, 7200)
    assert list(map(duration, seconds)) == ["9.9 s", "10 s", "119 s", "2 min", "120 min", "2.0 h"]
