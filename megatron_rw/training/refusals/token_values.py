"""Refusals of files with a value for every document or token: static weights and stored losses.

All checks run on one rank.
"""

import os
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_rw.data.indexed.pair import Index, idx_path
from megatron_rw.data.indexed.scores import PROGRESS, SCORES, read_record, score_path
from megatron_rw.errors import UserError
from megatron_rw.reweighting import ReweightConfig
from megatron_rw.reweighting.config import flag
from megatron_rw.training.refusals.base import refuse_flags
from megatron_rw.training.refusals.data import tokenizer_record, training_prefixes
from megatron_rw.training.token_values import weights_path

_WITHOUT_DOCUMENTS = {
    "mock_data": "makes samples up, which are of no document",
    "sft": "reads conversations and not .bin and .idx files",
    "fim_data": "moves the tokens of a document about",
}
_AGAIN = "score the data again with tools/score_dataset.py"


def check_token_values(args: Namespace, config: ReweightConfig) -> None:
    """Checks the files with weights and losses against the training data and its tokenizer.

    `args` have `data_fingerprints`.
    """
    names = ("sample_weights", "reference_scores", "dump_samples")
    given = [flag(name) for name in names if getattr(config, name)]
    if not given:
        return
    refuse_flags(args, _WITHOUT_DOCUMENTS, f"drop it, or {given[0]}")
    prefixes = training_prefixes(args)
    if config.sample_weights:
        _check_weights(config.sample_weights, prefixes)
    for folder in config.reference_scores or []:
        _check_scores(args, Path(folder), prefixes)


def _check_weights(given: str, prefixes: Sequence[str]) -> None:
    where = f"{flag('sample_weights')} {given}"
    if len(prefixes) > 1 and not os.path.isdir(given):
        raise UserError(
            f"{where}: a file is for a single dataset, and there are {len(prefixes)}: give a "
            "folder with a NAME.npy for every NAME.idx."
        )
    of_path: dict[Path, str] = {}
    for prefix in prefixes:
        path = weights_path(given, prefix)
        other = of_path.setdefault(path, prefix)
        if os.path.abspath(other) != os.path.abspath(prefix):
            raise UserError(
                f"{where}: {other} and {prefix} would both have the weights {path.name}: rename "
                "one of them."
            )
        documents = len(Index.open(prefix).lengths)
        weights = _array(where, path, documents, f"documents of {idx_path(prefix)}")
        # A NaN is the smallest and the largest.
        low, high = float(weights.min()), float(weights.max())
        if not (low >= 0 and 0 < high < np.inf):
            raise UserError(
                f"{where}: {path} goes from {low:g} to {high:g}: weights must be finite, at least "
                "0, and above 0 for some document."
            )


def _check_scores(args: Namespace, folder: Path, prefixes: Sequence[str]) -> None:
    where = f"{flag('reference_scores')} {folder}"
    record = read_record(folder / SCORES)
    if record is None:
        raise UserError(
            f"{where}: is not complete; start tools/score_dataset.py again with the same flags."
            if (folder / PROGRESS).exists()
            else f"{where}: has no {SCORES}; give a folder that tools/score_dataset.py has written."
        )
    mine = tokenizer_record(args)
    theirs = record.get("tokenizer", mine)
    if theirs != mine:
        raise UserError(
            f"{where}: its tokenizer is {_text(theirs)}, and that of this run {_text(mine)}: "
            f"{_AGAIN}."
        )
    for prefix in prefixes:
        name = os.path.basename(prefix)
        # Data in object storage has no fingerprint.
        here = args.data_fingerprints.get(os.path.abspath(prefix))
        facts = record.get("datasets", {}).get(name)
        if facts is None:
            raise UserError(f"{where}: has no losses of {name}: {_AGAIN}.")
        if facts["fingerprint"] != here:
            raise UserError(
                f"{where}: is not of the data that is in {prefix}: fingerprint "
                f"{facts['fingerprint']} there, {here} here; {_AGAIN}."
            )
        _array(where, score_path(folder, name, "token_losses"), facts["tokens"], "tokens")


def _array(where: str, path: Path, count: int, what: str) -> NDArray[np.float32]:
    """Maps an array of `count` float32, one for each of `what`."""
    try:
        array: NDArray[Any] = np.lib.format.open_memmap(path, mode="r")
    except FileNotFoundError:
        raise UserError(f"{where}: there is no {path}.") from None
    except ValueError as error:
        raise UserError(f"{where}: {path} is no .npy file ({error}).") from error
    if array.dtype != np.float32 or array.shape != (count,):
        raise UserError(
            f"{where}: {path} has {array.dtype} {list(array.shape)}, and must have one float32 for "
            f"each of the {count:,} {what}: [{count}]."
        )
    return array


def _text(tokenizer: dict[str, Any]) -> str:
    return f"{tokenizer['type']} of sha256 {tokenizer['sha256']}"
