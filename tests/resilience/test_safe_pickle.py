"""A checkpoint that would run code is refused, and its code does not run."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.state_dict_saver import save

from megatron_rw import patching
from megatron_rw.resilience import safe_pickle
from megatron_rw.resilience.safe_pickle import UnsafeCheckpointError, load_index, read_index
from tests.planted import Planted
from tests.program import run_program


def test_index_that_would_run_code(tmp_path: Path) -> None:
    planted = tmp_path / "planted"
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Planted(planted)))
    with pytest.raises(UnsafeCheckpointError, match=r"posix.mkdir.*Nothing of it was run"):
        read_index(tmp_path)
    assert not planted.exists()


@pytest.mark.parametrize("name", ["builtins eval", "builtins getattr", "torch load"])
def test_functions_are_not_data(name: str) -> None:
    with pytest.raises(UnsafeCheckpointError, match=name.replace(" ", r"\.")):
        load_index(io.BytesIO(f"c{name}\n.".replace(" ", "\n").encode()))


def test_what_is_no_index(tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(UnsafeCheckpointError, match="holds a dict, no index"):
        read_index(tmp_path)
    (tmp_path / ".metadata").write_bytes(b"\x80\x04garbage")
    with pytest.raises(UnsafeCheckpointError, match="is damaged"):
        read_index(tmp_path)


def test_index_of_every_dtype_is_read(tmp_path: Path) -> None:
    dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]
    state: dict[str, Any] = {str(t): torch.zeros(3, dtype=t) for t in dtypes} | {"object": [1, "a"]}
    save(state, checkpoint_id=tmp_path, no_dist=True)
    index = read_index(tmp_path)
    assert set(index.state_dict_metadata) == set(state)


def test_torch_reads_indexes_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(safe_pickle.WEIGHTS_ONLY_VARIABLE, raising=False)
    planted = tmp_path / "planted"
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Planted(planted)))
    safe_pickle.load_weights_only()
    with patching.applied(safe_pickle.patches()), pytest.raises(UnsafeCheckpointError):
        filesystem.FileSystemReader(tmp_path).read_metadata()
    assert not planted.exists()
    # And objects among the tensors, which torch would unpickle.
    buffer = io.BytesIO()
    torch.save(Planted(planted), buffer)
    buffer.seek(0)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(buffer, weights_only=False)
    assert not planted.exists()
    monkeypatch.delenv(safe_pickle.WEIGHTS_ONLY_VARIABLE)


TRAIN = "--train-iters 4 --micro-batch-size 4 --save-interval 2".split()


def test_code_in_the_common_part_of_a_checkpoint_does_not_run(
    tmp_path: Path, data_flags: list[str]
) -> None:
    """The real program on a checkpoint that was tampered with, but is otherwise whole."""
    save = ["--save", str(tmp_path / "checkpoints")]
    run_program(tmp_path, *data_flags, *TRAIN, *save, "--exit-interval", "2").check()
    path = tmp_path / "checkpoints" / "iter_0000002"
    index = read_index(path)
    [name] = [name for name in index.state_dict_metadata if name.startswith("common_state")]
    info = index.storage_data[MetadataIndex(name)]
    planted = tmp_path / "planted"
    buffer = io.BytesIO()
    torch.save([Planted(planted)], buffer)
    code = buffer.getvalue()
    shard = path / info.relative_path
    data = bytearray(shard.read_bytes())
    assert len(code) <= info.length
    data[info.offset : info.offset + len(code)] = code
    shard.write_bytes(data)
    # The object ends where the planted one does.
    index.storage_data[MetadataIndex(name)] = type(info)(
        info.relative_path, info.offset, len(code), info.transform_descriptors
    )
    (path / ".metadata").write_bytes(pickle.dumps(index))
    run = run_program(tmp_path, *data_flags, *TRAIN, *save, "--load", save[1])
    assert run.status != [0]
    assert "posix.mkdir" in run.output[0]
    assert not planted.exists()
