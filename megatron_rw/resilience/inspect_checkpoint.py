"""Prints what is in a Megatron checkpoint, whether it is complete, and whether it is intact.

python tools/inspect_checkpoint.py runs/a/checkpoints [--iteration 1000] [--verify]

Takes the folder of checkpoints, which it lists, and looks into the one that a run would go on from,
or into --iteration; or a checkpoint itself. It starts no processes of torch, needs no GPU and runs
nothing that a checkpoint holds. The exit status is 1 if the checkpoint is incomplete or damaged.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_rw.command_line import parse
from megatron_rw.errors import UserError, print_error, reported
from megatron_rw.resilience.folder import (
    SNAPSHOT_PREFIX,
    Checkpoint,
    CheckpointFolder,
    saved_arguments,
)
from megatron_rw.resilience.safe_pickle import read_index

_LAYOUT = {
    "world_size": "processes",
    "tensor_model_parallel_size": "tensor",
    "pipeline_model_parallel_size": "pipeline",
    "context_parallel_size": "context",
    "expert_model_parallel_size": "expert",
    "data_parallel_size": "data",
}
_MODEL = (
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups"),
    *("seq_length", "padded_vocab_size", "num_experts", "params_dtype"),
)


@dataclass(frozen=True)
class InspectCheckpointConfig:
    """What is looked into, and what is printed."""

    path: tyro.conf.Positional[Path]
    """Folder of checkpoints, or a checkpoint."""

    iteration: int | None = None
    """Which checkpoint of the folder; the tracker's by default."""

    verify: bool = False
    """Compare every file with the checksum that Megatron writes with --verify-integrity."""

    arguments: bool = False
    """Print the saved arguments too."""

    json: bool = False
    """Print everything as one JSON object."""


def _chosen(path: Path, iteration: int | None) -> Checkpoint:
    if path.name.startswith("iter_"):
        return Checkpoint(path, int(path.name.removeprefix("iter_")))
    folder = CheckpointFolder(path)
    there = folder.checkpoints()
    if not there:
        raise UserError(f"{path} has no checkpoints (folders iter_0000123).")
    wanted = iteration if iteration is not None else folder.tracked()
    if wanted is None:
        return folder.newest_complete() or there[-1]
    found = folder.of(wanted)
    if found is None:
        known = ", ".join(str(checkpoint.iteration) for checkpoint in there)
        raise UserError(f"{path} has no checkpoint of iteration {wanted}; it has {known}.")
    return found


def _described(checkpoint: Checkpoint) -> dict[str, Any]:
    """Returns what is in a checkpoint, as plain values."""
    index, common = read_index(checkpoint.path), checkpoint.common()
    saved = saved_arguments(common)
    entries = sorted(index.state_dict_metadata.items())
    tensors = {name: e for name, e in entries if isinstance(e, TensorStorageMetadata)}
    files = sorted({info.relative_path for info in index.storage_data.values()})
    return {
        "path": str(checkpoint.path),
        "iteration": common.get("iteration", checkpoint.iteration),
        "samples": saved.get("consumed_train_samples"),
        "layout": {name: saved.get(key) for key, name in _LAYOUT.items()},
        "distributed_optimizer": saved.get("use_distributed_optimizer"),
        "model": {key: _plain(saved[key]) for key in _MODEL if saved.get(key) is not None},
        "reweighting": saved.get("reweight_state"),
        "parameters": sum(
            entry.size.numel()
            for name, entry in tensors.items()
            if not name.startswith(("optimizer.", "rng_state", SNAPSHOT_PREFIX))
        ),
        "tensors": [
            {
                "name": name,
                "shape": list(entry.size),
                "dtype": str(entry.properties.dtype).removeprefix("torch."),
                "chunks": len(entry.chunks),
            }
            for name, entry in tensors.items()
        ],
        "objects": [name for name, _ in entries if name not in tensors],
        "files": {name: (checkpoint.path / name).stat().st_size for name in files},
        "arguments": {key: _plain(value) for key, value in saved.items()},
    }


def _plain(value: Any) -> Any:
    return value if isinstance(value, str | int | float | bool | list | None) else str(value)


def _show(found: dict[str, Any], all_arguments: bool) -> None:
    layout = ", ".join(f"{name} {size}" for name, size in found["layout"].items() if size)
    nbytes = sum(found["files"].values())
    print(f"iteration {found['iteration']}, {found['samples']} samples")
    print(f"saved by: {layout}; distributed optimizer: {found['distributed_optimizer']}")
    print("model: " + ", ".join(f"{key} {value}" for key, value in found["model"].items()))
    print(f"parameters: {found['parameters']:,}; {len(found['files'])} shards, {nbytes:,} bytes")
    reweighting = found["reweighting"]
    if reweighting is None:
        print("reweighting: none, saved by another program")
    else:
        settings = ", ".join(f"{k} {v}" for k, v in reweighting["settings"].items())
        print(f"reweighting: {settings}")
        print(f"  began at iteration {reweighting['first_iteration']}", end="")
        print(f", range of losses {reweighting['moments']}" if reweighting["moments"] else "")
    print("tensors:")
    for tensor in found["tensors"]:
        shape = " x ".join(map(str, tensor["shape"])) or "scalar"
        print(f"  {tensor['name']:70} {tensor['dtype']:9} {shape} ({tensor['chunks']} parts)")
    print(f"objects: {', '.join(found['objects'])}")
    if all_arguments:
        print("arguments:")
        for key, value in found["arguments"].items():
            print(f"  {key} = {value}")


def _list_folder(path: Path) -> None:
    """Prints the checkpoints of a folder, and which one a run would go on from."""
    folder = CheckpointFolder(path)
    tracked = folder.tracked()
    for checkpoint in folder.checkpoints():
        mark = "  <- tracker" if checkpoint.iteration == tracked else ""
        print(f"{checkpoint.path.name}: {checkpoint.defect() or 'complete'}{mark}")
    if tracked is None:
        print("the tracker names no iteration")


def _is_intact(path: Path) -> bool:
    """Prints which files differ from their checksums, and returns whether none does."""
    from megatron.core.dist_checkpointing.core import CheckpointingException
    from megatron.core.dist_checkpointing.validation import (
        INTEGRITY_FNAME,
        verify_integrity_manifest,
    )

    if not (path / INTEGRITY_FNAME).is_file():
        raise UserError(
            f"{path} has no checksums: it was saved without --verify-integrity. By its index no "
            "file is missing or cut."
        )
    try:
        verify_integrity_manifest(str(path))
    except CheckpointingException as error:
        print(error)
        return False
    print("checksums: all files are intact")
    return True


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    with reported("inspecting a checkpoint"):
        config = parse(InspectCheckpointConfig, argv, description=__doc__ or "")
        checkpoint = _chosen(config.path, config.iteration)
        if not config.json and checkpoint.path != config.path:
            _list_folder(config.path)
        defect = checkpoint.defect()
        if defect is not None:
            print_error(f"{checkpoint.path} is incomplete: {defect}.")
            return 1
        found = _described(checkpoint)
        if config.json:
            print(json.dumps(found, indent=2))
        else:
            _show(found, config.arguments)
        return 0 if not config.verify or _is_intact(checkpoint.path) else 1
