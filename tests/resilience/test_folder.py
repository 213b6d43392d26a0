"""Which checkpoints of a folder are complete, which a run goes on from, and which are kept."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint.state_dict_saver import save

from megatron_rw.errors import UserError
from megatron_rw.resilience.folder import CheckpointFolder, superfluous
from megatron_rw.resilience.resuming import choose_checkpoint


def write_checkpoint(folder: Path, iteration: int) -> Path:
    path = folder / f"iter_{iteration:07d}"
    state = {"weight": torch.arange(1000.0), "step": torch.tensor(iteration)}
    save(state, checkpoint_id=path, no_dist=True)
    (path / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist"}))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two complete checkpoints, the newer one tracked."""
    for iteration in (10, 20):
        write_checkpoint(tmp_path, iteration)
    CheckpointFolder(tmp_path).write_tracker(20)
    return tmp_path


def lines_of(folder: Path | None, save: Path | None = None, **given: Any) -> list[str]:
    paths = {"load": folder and str(folder), "save": str(save or folder)}
    flags = ("ckpt_step", "pretrained_checkpoint", "non_persistent_ckpt_type")
    others = dict.fromkeys(flags) | {"exit_on_missing_checkpoint": False}
    return choose_checkpoint(Namespace(**(paths | others | given)))


def tracker(folder: Path) -> str:
    return (folder / "latest_checkpointed_iteration.txt").read_text()


def damage(path: Path, pattern: str, keep: float | bytes | None) -> None:
    """Deletes a file of a checkpoint, cuts it to a share of its bytes, or writes others."""
    file = next(path.glob(pattern))
    data = file.read_bytes()
    file.unlink()
    if keep is not None:
        file.write_bytes(keep if isinstance(keep, bytes) else data[: int(keep * len(data))])


DEFECTS = {
    ("metadata.json", None): "it has no metadata.json: its writing was not finished",
    ("metadata.json", b""): "its metadata.json is damaged",
    ("metadata.json", b"[]"): "its metadata.json is not one of a checkpoint",
    (".metadata", None): "its index cannot be read: [Errno 2]",
    (".metadata", 0.5): "its index cannot be read",
    ("*.distcp", None): "distcp is missing",
    ("*.distcp", 0.9999): "distcp has ",
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_own_folder_goes_on_from_the_newest_complete_one(folder: Path, defect: Any) -> None:
    """Defects are found without reading the shards."""
    damage(folder / "iter_0000020", *defect)
    old, new = CheckpointFolder(folder).checkpoints()
    assert old.defect() is None
    assert DEFECTS[defect] in (new.defect() or "")
    [line] = lines_of(folder)
    assert "its tracker names iteration 20, which is incomplete" in line
    assert "going on from the newest complete checkpoint, iteration 10" in line
    assert tracker(folder) == "10"
    # The next time there is nothing to repair; the damaged one is left alone, and said to be.
    [line] = lines_of(folder)
    assert "the checkpoint of iteration 20 is left alone" in line


NEWEST = "going on from the newest complete checkpoint, iteration 20"


@pytest.mark.parametrize(
    ("text", "line", "after"),
    [
        # Megatron ends with status 0 at an empty one, and begins anew where there is none.
        ("", f"its tracker names none; {NEWEST}", "20"),
        ("2x", f"its tracker names none; {NEWEST}", "20"),
        (None, f"its tracker names none; {NEWEST}", "20"),
        ("30", f"its tracker names iteration 30, which is not there; {NEWEST}", "20"),
        # Somebody has put it back.
        ("10", "going on from iteration 10, as the tracker says; there is", "10"),
        ("release\n", None, "release\n"),
    ],
)
def test_tracker(folder: Path, text: str | None, line: str | None, after: str) -> None:
    path = folder / "latest_checkpointed_iteration.txt"
    path.unlink()
    if text is not None:
        path.write_text(text)
    lines = lines_of(folder)
    assert len(lines) == (line is not None)
    assert (line or "") in "".join(lines)
    assert tracker(folder) == after


def test_another_folder_is_not_written_to(folder: Path, tmp_path: Path) -> None:
    damage(folder / "iter_0000020", "*.distcp", 0.9999)
    with pytest.raises(UserError, match="add --ckpt-step 10"):
        lines_of(folder, save=tmp_path / "other")
    assert tracker(folder) == "20"
    assert lines_of(folder, save=tmp_path / "other", ckpt_step=10) == []


def test_named_step_must_be_complete(folder: Path) -> None:
    with pytest.raises(UserError, match="no such checkpoint; it has those of iterations 10, 20"):
        lines_of(folder, ckpt_step=15)
    damage(folder / "iter_0000020", "*.distcp", 0.9999)
    with pytest.raises(UserError, match="--ckpt-step names it: give another"):
        lines_of(folder, ckpt_step=20)


def test_nothing_complete(folder: Path) -> None:
    for path in folder.glob("iter_*"):
        damage(path, "metadata.json", None)
    with pytest.raises(UserError, match=r"there is no complete checkpoint\. To begin anew"):
        lines_of(folder)
    (folder / "latest_checkpointed_iteration.txt").unlink()
    [line] = lines_of(folder)
    assert "holds no complete checkpoint: the run begins from nothing" in line
    assert lines_of(None) == []


def test_a_new_run_is_begun_only_from_a_folder_that_is_its_own(tmp_path: Path) -> None:
    """Otherwise the name of the folder is mistyped, and Megatron would train from the start."""
    empty, gone, other = tmp_path / "empty", tmp_path / "gone", tmp_path / "other"
    empty.mkdir()
    for folder, why in (
        (gone, "no such folder"),
        (empty, "it holds no complete checkpoint"),
    ):
        with pytest.raises(UserError, match=f"^--load {folder}: {why}. Give the folder that"):
            lines_of(folder, save=other)
        with pytest.raises(UserError, match=f"^--load {folder}: {why}. Drop --exit-on-missing"):
            lines_of(folder, exit_on_missing_checkpoint=True)
        same = tmp_path / "other" / ".." / folder.name
        assert lines_of(folder) == lines_of(folder, save=same) == []
        assert lines_of(folder, save=other, pretrained_checkpoint="x") == []
        assert lines_of(folder, save=other, non_persistent_ckpt_type="local") == []
        for flag in ("pretrained_checkpoint", "non_persistent_ckpt_type"):
            elsewhere: dict[str, Any] = {flag: "global"}
            with pytest.raises(UserError, match=f"^--load {folder}: {why}"):
                lines_of(folder, exit_on_missing_checkpoint=True, **elsewhere)
    with pytest.raises(UserError, match="--exit-on-missing-checkpoint needs a --load"):
        lines_of(None, exit_on_missing_checkpoint=True)
    (checkpoint := other / "iter_0000050").mkdir(parents=True)
    with pytest.raises(UserError, match=f"is a checkpoint itself. Give its folder, {other}."):
        lines_of(checkpoint, save=gone)


def test_what_a_killed_deletion_left_is_deleted(folder: Path) -> None:
    (folder / "iter_0000010").rename(folder / "deleted-iter_0000010")
    assert lines_of(folder) == []
    assert not (folder / "deleted-iter_0000010").exists()
    assert [c.iteration for c in CheckpointFolder(folder).checkpoints()] == [20]


def test_deletion(folder: Path) -> None:
    old, _ = CheckpointFolder(folder).checkpoints()
    CheckpointFolder(folder).delete(old)
    assert sorted(path.name for path in folder.glob("*iter*")) == [
        "iter_0000020",
        "latest_checkpointed_iteration.txt",
    ]


@given(
    st.sets(st.integers(1, 300), max_size=30), st.integers(1, 10), st.none() | st.integers(1, 50)
)
def test_retention_keeps_what_it_says(
    found: set[int], keep_last: int, keep_every: int | None
) -> None:
    iterations = sorted(found)
    kept = [i for i in iterations if i not in superfluous(iterations, keep_last, keep_every)]
    assert kept[-keep_last:] == iterations[-keep_last:]
    if keep_every is not None:
        assert {i for i in iterations if i % keep_every == 0} <= set(kept)
    assert superfluous(iterations, None, keep_every) == []
    assert len(kept) <= keep_last + sum(i % (keep_every or 1000) == 0 for i in iterations)
