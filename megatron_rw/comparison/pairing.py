"""Which runs are compared with which: arms, pairs, the band of chance, and what else differs."""

import dataclasses
import glob
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rw.comparison.runs import Run, load_run
from megatron_rw.errors import UserError

Arms = Mapping[str, Sequence[Run]]

# Where a run writes, when it ends and what it prints; and what pairs and arms are made of.
_APART = ("reweight_", "save", "log", "tensorboard_", "wandb_", "exit_", "timing_", "load")
_APART_NAMES = "data_cache_path rank local_rank pretrained_checkpoint ckpt_step".split()
_LONGEST = 120  # Characters; blends of data are told by their name alone.
_IDLE: tuple[object, ...] = (None, False, "", [])
# Unless these agree, losses are not in the same unit or not of the same text.
_ESSENTIAL = (
    "domains|final iteration|seq_length|tokenizer_type|tokenizer_model|vocab_file|merge_file|"
    "valid_data_path|per_split_data_args_path"
).split("|")


@dataclass(frozen=True)
class Pair:
    """Two runs that began alike. `unit` is what is replicated: the trunk, or else the seed."""

    unit: str
    baseline: Run
    run: Run


@dataclass(frozen=True)
class Pairing:
    """The pairs of every arm but the baseline; pairs of baseline runs, which differ by chance."""

    pairs: Mapping[str, tuple[Pair, ...]]
    chance: tuple[Pair, ...]
    warnings: tuple[str, ...]


def load_arms(paths: Sequence[str]) -> dict[str, list[Run]]:
    """Reads the runs of arguments of the form `NAME=GLOB` or `GLOB`, by arm.

    A = behind a / belongs to the path. Runs of the latter form are grouped by their `--reweight-*`
    arguments.
    """
    arms: dict[str, dict[Path, Run]] = {}
    for given in paths:
        name, sign, pattern = given.partition("=")
        if not sign or "/" in name or os.path.isdir(given):
            name, pattern = "", given
        elif not name:
            raise UserError(f"{given}: the arm has no name; give NAME=GLOB")
        folders = [Path(path) for path in sorted(glob.glob(pattern)) if os.path.isdir(path)]
        if not folders:
            raise UserError(f"{given}: no folder matches; give folders of runs, or NAME=GLOB")
        for folder in folders:
            run = load_run(folder)
            arms.setdefault(name or _arm_name(run), {})[folder] = run
    return {name: list(runs.values()) for name, runs in arms.items()}


def _arm_name(run: Run) -> str:
    """Returns the strategy and the settings of the method that are not at their default."""
    from megatron_rw.reweighting.config import ReweightConfig  # imports torch

    changed = [
        (field.name.replace("_", " "), run.arguments[f"reweight_{field.name}"])
        for field in dataclasses.fields(ReweightConfig)
        if field.name != "strategy"
        and run.arguments.get(f"reweight_{field.name}", field.default) != field.default
    ]
    strategy = str(run.arguments.get("reweight_strategy", "none"))
    return ", ".join([strategy, *(f"{name} {value}" for name, value in changed)])


def pair_runs(arms: Arms, baseline: str) -> Pairing:
    """Pairs every run with the baseline's of the same trunk and seed.

    Baseline runs of a trunk with another seed, which no arm uses, are compared with the trunk's
    run of the lowest seed that the arms use.
    """
    if baseline not in arms:
        raise UserError(f"--baseline {baseline}: no such arm; there are {', '.join(sorted(arms))}")
    if len(arms) == 1:
        raise UserError(f"there is no arm beside the baseline {baseline}; give its runs as well")
    keyed = {name: _by_key(name, runs) for name, runs in arms.items()}
    bases = keyed.pop(baseline)
    pairs: dict[str, tuple[Pair, ...]] = {}
    alone: list[Run] = []
    for name, runs in keyed.items():
        alone += [run for key, run in runs.items() if key not in bases]
        common = sorted(key for key in runs if key in bases)
        if not common:
            raise UserError(
                f"{name}: no run has a partner in {baseline} of its trunk and seed; run it"
            )
        pairs[name] = tuple(Pair(_unit(key), bases[key], runs[key]) for key in common)
    used = sorted(key for key in bases if any(key in runs for runs in keyed.values()))
    chance = []
    for key in sorted(bases):
        first = next((other for other in used if other[0] == key[0] != ""), None)
        if first is not None and key != first:
            chance.append(Pair(_unit(key), bases[first], bases[key]))
        elif key not in used:
            alone.append(bases[key])
    warnings = tuple(f"{run.folder}: left out, as it has no partner" for run in alone)
    return Pairing(pairs, tuple(chance), warnings)


def _by_key(name: str, runs: Sequence[Run]) -> dict[tuple[str, int], Run]:
    """Returns the runs by trunk, which is empty without one, and seed."""
    keyed: dict[tuple[str, int], Run] = {}
    for run in runs:
        key = (run.trunk or "", run.arguments.get("seed") or 0)
        if key in keyed:
            raise UserError(
                f"{run.folder}: arm {name} has the trunk {key[0] or '(none)'} with seed {key[1]} "
                f"already, in {keyed[key].folder}; give one of the two"
            )
        keyed[key] = run
    return keyed


def _unit(key: tuple[str, int]) -> str:
    return key[0] or f"seed {key[1]}"


def differing(pair: Pair, evaluated: bool) -> tuple[list[str], list[str]]:
    """Returns the arguments that differ beyond the arm, and why losses cannot be compared.

    An argument that only one of the programs knows differs if it is in use there. The final record
    is the evaluation, or else the last validation.
    """
    ours, theirs = (_compared(run, evaluated) for run in (pair.run, pair.baseline))
    essential = {*_ESSENTIAL, *(() if ours.get("valid_data_path") else ("data_path", "split"))}
    other: list[str] = []
    wrong: list[str] = []
    for name in sorted({*ours, *theirs}):
        value, expected = ours.get(name), theirs.get(name)
        if value != expected and not (value in _IDLE and expected in _IDLE):
            found = wrong if name in essential else other
            both = f"{name} {_said(value)} instead of {_said(expected)}"
            found.append(both if len(both) <= _LONGEST else f"another {name}")
    return other, wrong


def _said(value: Any) -> Any:
    return f"{value:g}" if isinstance(value, float) else value


def _compared(run: Run, evaluated: bool) -> dict[str, Any]:
    arguments = {
        name: value
        for name, value in run.arguments.items()
        if not name.startswith(_APART) and name not in _APART_NAMES
    }
    final = run.records(evaluated)[-1]
    measured = {"final iteration": final.iteration, "domains": ", ".join(sorted(final.domains))}
    # A cut metrics.jsonl has other weights, which evaluations do not tell.
    logged = {"last logged iteration": run.end} if evaluated else {}
    return {**arguments, "trunk": run.trunk, **measured, **logged}
