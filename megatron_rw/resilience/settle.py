"""Which checkpoint a run begins with, decided before Megatron looks."""

from __future__ import annotations

from argparse import Namespace

from megatron_rw.resilience.folder import Checkpoint, CheckpointFolder


class CheckpointError(ValueError):
    """There is no checkpoint to go on from; the message names the remedy."""


def settle(args: Namespace) -> list[str]:
    """See that the checkpoint that Megatron will load is a complete one. On one rank.

    Megatron goes by the tracker alone. Where that names no complete checkpoint, because the run
    that wrote it was killed, and the folder is this run's own (`--save` is `--load`), the tracker
    is set to the newest complete one. A tracker that names an older one than there is stays:
    somebody may have put it back on purpose.

    Args:
        args: parsed.

    Returns:
        Lines for the user.

    Raises:
        CheckpointError: what would be loaded is not complete, and nothing else can be.
    """
    if args.load is None or "://" in args.load:
        return []
    folder = CheckpointFolder(args.load)
    if args.load == args.save:
        folder.sweep()
    if folder.is_release():
        return []
    if args.ckpt_step:
        wanted = _of(folder, args.ckpt_step)
        if wanted is None:
            raise CheckpointError(
                f"--ckpt-step {args.ckpt_step}: {args.load} has no such checkpoint{_there(folder)}."
            )
        _check(wanted, "--ckpt-step names it: give another")
        return []
    tracked = folder.tracked()
    named = None if tracked is None else _of(folder, tracked)
    if named is not None and named.defect() is None:
        return _note_newer(folder, named)
    newest = folder.newest_complete()
    if newest is None:
        return _nothing(folder, tracked)
    why = (
        "its tracker names none"
        if tracked is None
        else f"its tracker names iteration {tracked}, which "
        + ("is not there" if named is None else f"is incomplete: {named.defect()}")
    )
    if args.load != args.save:
        raise CheckpointError(
            f"--load {args.load}: {why}. The newest complete checkpoint there is that of iteration "
            f"{newest.iteration}: add --ckpt-step {newest.iteration}."
        )
    folder.write_tracker(newest.iteration)
    return [
        f"{args.load}: {why}; going on from the newest complete checkpoint, iteration "
        f"{newest.iteration}"
    ]


def _note_newer(folder: CheckpointFolder, named: Checkpoint) -> list[str]:
    newest = folder.checkpoints()[-1]
    if newest.iteration == named.iteration:
        return []
    defect = newest.defect()
    if defect is not None:
        return [
            f"{folder.path}: the checkpoint of iteration {newest.iteration} is left alone, {defect}"
        ]
    return [
        f"{folder.path}: going on from iteration {named.iteration}, as the tracker says; there is "
        f"a complete checkpoint of iteration {newest.iteration} (--ckpt-step {newest.iteration})"
    ]


def _nothing(folder: CheckpointFolder, tracked: int | None) -> list[str]:
    unfinished = folder.checkpoints()
    if tracked is not None:
        raise CheckpointError(
            f"--load {folder.path}: its tracker names iteration {tracked}, and there is no "
            f"complete checkpoint{_there(folder)}. To begin anew, give another folder, or delete "
            f"{folder.path / 'latest_checkpointed_iteration.txt'}."
        )
    if unfinished:
        return [
            f"{folder.path} holds no complete checkpoint: the run begins from nothing. That of "
            f"iteration {unfinished[-1].iteration} is incomplete: {unfinished[-1].defect()}"
        ]
    return []


def _of(folder: CheckpointFolder, iteration: int) -> Checkpoint | None:
    for checkpoint in folder.checkpoints():
        if checkpoint.iteration == iteration:
            return checkpoint
    return None


def _check(checkpoint: Checkpoint, remedy: str) -> None:
    defect = checkpoint.defect()
    if defect is not None:
        raise CheckpointError(f"{checkpoint.path} is incomplete: {defect}. {remedy}.")


def _there(folder: CheckpointFolder) -> str:
    complete = [str(c.iteration) for c in folder.checkpoints() if c.defect() is None]
    return f"; it has those of iterations {', '.join(complete[-8:])}" if complete else ""
