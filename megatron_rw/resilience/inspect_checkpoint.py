r"""Print what is in a Megatron checkpoint, whether it is complete, and whether it is intact.

    python tools/inspect_checkpoint.py runs/a/checkpoints [--iteration 1000] [--verify]

Takes the folder of checkpoints, which it lists, and looks into the one that a run would go on from,
or into --iteration; or a checkpoint itself. Starts no processes of torch, needs no GPU and runs
nothing that a checkpoint holds. --verify compares every file with its checksum, which Megatron
writes with --verify-integrity. Exit status 1 when something is wrong.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_rw.resilience.contents import MANIFEST, Contents, arguments, verify
from megatron_rw.resilience.folder import Checkpoint, CheckpointFolder
from megatron_rw.resilience.safe_pickle import UnsafeCheckpointError

LAYOUT = {
    "world_size": "processes",
    "tensor_model_parallel_size": "tensor",
    "pipeline_model_parallel_size": "pipeline",
    "context_parallel_size": "context",
    "expert_model_parallel_size": "expert",
    "data_parallel_size": "data",
}
MODEL = (
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups"),
    *("seq_length", "padded_vocab_size", "num_experts", "params_dtype"),
)


class InspectionError(ValueError):
    """There is nothing to look into; the message says what there is."""


def chosen(path: Path, iteration: int | None) -> Checkpoint:
    """The checkpoint that is meant.

    Raises:
        InspectionError: there is none.
    """
    if path.name.startswith("iter_"):
        return Checkpoint(path, int(path.name.removeprefix("iter_")))
    folder = CheckpointFolder(path)
    there = folder.checkpoints()
    if not there:
        raise InspectionError(f"{path} has no checkpoints (folders iter_0000123).")
    wanted = iteration if iteration is not None else folder.tracked()
    if wanted is None:
        newest = folder.newest_complete()
        return newest or there[-1]
    for checkpoint in there:
        if checkpoint.iteration == wanted:
            return checkpoint
    known = ", ".join(str(checkpoint.iteration) for checkpoint in there)
    raise InspectionError(f"{path} has no checkpoint of iteration {wanted}; it has {known}.")


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """What is in it, as plain values.

    Raises:
        UnsafeCheckpointError: it cannot be read safely.
    """
    contents = Contents(checkpoint.path)
    common = contents.common()
    saved = arguments(common)
    tensors = contents.tensors()
    parameters = [t for t in tensors if not t.name.startswith(("optimizer.", "rng_state"))]
    return {
        "path": str(checkpoint.path),
        "iteration": common.get("iteration", checkpoint.iteration),
        "samples": saved.get("consumed_train_samples"),
        "layout": {name: saved.get(key) for key, name in LAYOUT.items()},
        "distributed_optimizer": saved.get("use_distributed_optimizer"),
        "model": {key: _plain(saved[key]) for key in MODEL if saved.get(key) is not None},
        "reweighting": saved.get("reweight_state"),
        "parameters": sum(t.elements for t in parameters),
        "tensors": [vars(t) for t in tensors],
        "objects": contents.objects(),
        "files": contents.files(),
        "arguments": {key: _plain(value) for key, value in saved.items()},
    }


def _plain(value: Any) -> Any:
    return value if isinstance(value, str | int | float | bool | list | None) else str(value)


def show(found: dict[str, Any], all_arguments: bool) -> None:
    """Print it for people."""
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


def list_folder(path: Path) -> None:
    """Print the checkpoints of a folder, and which one a run would go on from."""
    folder = CheckpointFolder(path)
    tracked = folder.tracked()
    for checkpoint in folder.checkpoints():
        mark = "  <- tracker" if checkpoint.iteration == tracked else ""
        print(f"{checkpoint.path.name}: {checkpoint.defect() or 'complete'}{mark}")
    if tracked is None:
        print("the tracker names no iteration")


def check_files(path: Path) -> bool:
    """Print what is wrong with its files; whether nothing is.

    Raises:
        InspectionError: it has no checksums.
    """
    if not (path / MANIFEST).is_file():
        raise InspectionError(
            f"{path} has no checksums: it was saved without --verify-integrity. By its index no "
            "file is missing or cut."
        )
    results = list(verify(path))
    wrong = [(name, problem) for name, problem in results if problem is not None]
    for name, problem in wrong:
        print(f"{path / name} {problem}")
    print(f"checksums: {len(results) - len(wrong)} of {len(results)} files intact")
    return not wrong


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tool."""
    parser = argparse.ArgumentParser(
        prog="inspect_checkpoint.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("path", type=Path, help="folder of checkpoints, or a checkpoint")
    parser.add_argument("--iteration", type=int, help="which one; the tracker's when left away")
    parser.add_argument("--verify", action="store_true", help="compare all files with checksums")
    parser.add_argument("--arguments", action="store_true", help="print the saved arguments too")
    parser.add_argument("--json", action="store_true", help="print everything as one JSON object")
    options = parser.parse_args(arguments)
    try:
        checkpoint = chosen(options.path, options.iteration)
        if not options.json and checkpoint.path != options.path:
            list_folder(options.path)
        defect = checkpoint.defect()
        if defect is not None:
            print(f"error: {checkpoint.path} is incomplete: {defect}.", file=sys.stderr)
            return 1
        found = describe(checkpoint)
        if options.json:
            print(json.dumps(found, indent=2))
        else:
            show(found, options.arguments)
        return 0 if not options.verify or check_files(checkpoint.path) else 1
    except (InspectionError, UnsafeCheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
