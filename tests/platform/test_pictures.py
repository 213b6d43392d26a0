from pathlib import Path

import pytest
from PIL import Image

from megatron_rw.errors import UserError
from megatron_rw.platform.pictures import check_picture, draw_histograms


def test_a_picture_is_drawn(tmp_path: Path) -> None:
    path = tmp_path / "lengths.png"
    check_picture(path)
    draw_histograms({"a": ([0.2, 0.8], [0, 1, 2]), "b": ([1], [0, 2])}, path, ("x", "y"))
    with Image.open(path) as picture:
        colors = picture.convert("RGB").getcolors(1 << 20)
    # White, black, and a line for each of the two histograms.
    assert sum(count > 500 for count, _ in colors or []) >= 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lengths.png"]


def test_what_cannot_be_drawn_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"lengths\.txt: no kind of picture; name it \."):
        check_picture(tmp_path / "lengths.txt")
    with pytest.raises(UserError, match=r"there is no directory .*gone; make it"):
        check_picture(tmp_path / "gone" / "lengths.png")
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"run: pip install matplotlib$"):
        check_picture(tmp_path / "lengths.png")
