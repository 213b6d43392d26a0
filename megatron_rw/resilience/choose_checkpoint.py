"""Chooses the checkpoint that a run begins with, before Megatron looks."""

from __future__ import annotations

from megatron_rw.errors import UserError
from megatron_rw.resilience.folder import TRACKER, Checkpoint, CheckpointFolder


def choose_checkpoint(load: str | None, save: str | None, ckpt_step: int | None) -> list[str]:
    """Makes sure that the checkpoint that Megatron will load is complete. Called on one rank.

    Megatron trusts the tracker alone. Where that names no complete checkpoint, because the run
    that wrote it was killed, and the folder is this run's own (`--save` is `--load`), the tracker
    is set to the newest complete one. A tracker that names an older checkpoint than the newest is
    obeyed: somebody may have put it back on purpose.

    Returns:
        Lines for the user.

    Raises:
        UserError: If what would be loaded is not complete, and nothing else can be.
    """
    if load is None or "://" in load:
        return []
    folder = CheckpointFolder(load)
    if load == save:
        folder.sweep()
    if folder.is_release():
        return []
    if ckpt_step:
        wanted = folder.of(ckpt_step)
        if wanted is None:
            raise UserError(
                f"--ckpt-step {ckpt_step}: {load} has no such checkpoint{_complete(folder)}."
            )
        if (defect := wanted.defect()) is not None:
            raise UserError(
                f"{wanted.path} is incomplete: {defect}. --ckpt-step names it: give another."
            )
        return []
    tracked = folder.tracked()
    named = None if tracked is None else folder.of(tracked)
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
    if load != save:
        raise UserError(
            f"--load {load}: {why}. The newest complete checkpoint there is that of iteration "
            f"{newest.iteration}: add --ckpt-step {newest.iteration}."
        )
    folder.write_tracker(newest.iteration)
    return [
        f"{load}: {why}; going on from the newest complete checkpoint, iteration {newest.iteration}"
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
        raise UserError(
            f"--load {folder.path}: its tracker names iteration {tracked}, and there is no "
            f"complete checkpoint{_complete(folder)}. To begin anew, give another folder, or "
            f"delete {folder.path / TRACKER}."
        )
    if unfinished:
        return [
            f"{folder.path} holds no complete checkpoint: the run begins from nothing. That of "
            f"iteration {unfinished[-1].iteration} is incomplete: {unfinished[-1].defect()}"
        ]
    return []


def _complete(folder: CheckpointFolder) -> str:
    complete = [str(c.iteration) for c in folder.checkpoints() if c.defect() is None]
    return f"; it has those of iterations {', '.join(complete[-8:])}" if complete else ""
