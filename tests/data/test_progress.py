"""What the data tools say while they work."""

from collections.abc import Callable

import pytest

from megatron_rw.data import progress as progress_module
from megatron_rw.data.progress import Progress, duration

GB = 10**9


@pytest.fixture
def after(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets the clock to so many seconds from its start."""
    now = [1000.0]
    monkeypatch.setattr(progress_module, "monotonic", lambda: now[0])

    def set_clock(seconds: float) -> None:
        now[0] = 1000.0 + seconds

    return set_clock


def test_a_line_tells_every_five_seconds_what_is_done_and_left(
    after: Callable[[float], None], capsys: pytest.CaptureFixture[str]
) -> None:
    progress = Progress("merge_datasets: writing", 10 * GB)
    for second, line in [
        (4, ""),
        (5, "merge_datasets: writing: 2,000.0 MB, 400.0 MB/s, 20%, 20 s left\n"),
        (9, ""),
        (100, "merge_datasets: writing: 4,000.0 MB, 40.0 MB/s, 40%, 2 min left\n"),
        (110, "merge_datasets: writing: 5,000.0 MB, 45.5 MB/s, 50%, 110 s left\n"),
    ]:
        after(second)
        progress.advance(GB)
        assert capsys.readouterr().err == line


def test_an_earlier_call_is_no_speed_and_nothing_is_left_of_an_unknown_size(
    after: Callable[[float], None], capsys: pytest.CaptureFixture[str]
) -> None:
    progress = Progress("preprocess_data", 10 * GB)
    progress.skip(8 * GB)
    after(10)
    progress.advance(GB, 20_000, 3 * GB)
    assert capsys.readouterr().err == (
        "preprocess_data: 20,000 documents, 3,000.0 MB, 300.0 MB/s, 90%, 10 s left\n"
    )
    unknown = Progress("preprocess_data", 0)
    after(20)
    unknown.advance(0, 1, GB)
    assert capsys.readouterr().err == "preprocess_data: 1 documents, 1,000.0 MB, 100.0 MB/s\n"


def test_durations() -> None:
    seconds = (9.9, 10, 119, 120, 7199, 7200)
    assert list(map(duration, seconds)) == ["9.9 s", "10 s", "119 s", "2 min", "120 min", "2.0 h"]
