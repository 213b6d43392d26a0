"""A run as its folder tells it: validation losses, arguments, and the weights of training."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from statistics import fmean
from typing import Any

from megatron_rw.errors import UserError

LOSS, WORST, NOISE = "loss", "worst domain", "noise"
OF_DOMAIN = "loss of "
# The arguments that are more than compared.
_READ = {
    **dict.fromkeys(("load", "save", "pretrained_checkpoint"), str | None),
    **dict.fromkeys(("seed", "global_batch_size", "seq_length"), int),
}


@dataclass(frozen=True)
class Record:
    """What a validation or an evaluation has measured; losses are unweighted, in nats per token."""

    iteration: int
    values: Mapping[str, float]
    domains: Mapping[str, float]

    def measures(self, noise_domains: str) -> dict[str, float]:
        """Returns all measures by name, of which `LOSS` is the one that decides.

        It is the mean over the clean domains, those whose name the glob `noise_domains` does not
        match, and with a single domain `lm_loss`.
        """
        noise = [v for name, v in self.domains.items() if fnmatchcase(name, noise_domains)]
        clean = [v for name, v in self.domains.items() if not fnmatchcase(name, noise_domains)]
        if self.domains and not clean and len(self.domains) > 1:
            raise UserError(f"--noise-domains {noise_domains}: it leaves no domain to compare")
        if len(self.domains) < 2:
            return {LOSS: self.values["lm_loss"], **self.values}
        found = {LOSS: fmean(clean), WORST: max(clean)}
        if noise:
            found[NOISE] = fmean(noise)
        by_domain = {OF_DOMAIN + name: loss for name, loss in self.domains.items()}
        return {**found, **by_domain, **self.values}


@dataclass(frozen=True)
class Run:
    """A run of training.

    `begin` is the iteration that training began after, and `end` the last that was logged. `ess` is
    the effective sample size and `weight_ratios` the domains' share of the weight over that of the
    samples, means over the logged steps with reweighting. Validations are of the text that is next,
    evaluations all of the same.
    """

    folder: Path
    arguments: Mapping[str, Any]
    begin: int
    end: int
    validations: tuple[Record, ...]
    evaluations: tuple[Record, ...]
    ess: float | None
    weight_ratios: Mapping[str, float]

    @property
    def trunk(self) -> str | None:
        """The checkpoint that the run branched off, or None: its own one is where it resumed."""
        arguments = self.arguments
        own = os.path.normpath(arguments.get("save") or "")
        # Megatron takes the latter where the folder of the former is still empty.
        for name, step in (("load", "ckpt_step"), ("pretrained_checkpoint", None)):
            path = arguments.get(name)
            if path and os.path.normpath(path) != own:
                at = arguments.get(step) if step else None
                return os.path.normpath(path) + (f"@{at}" if at is not None else "")
        return None

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a global batch."""
        return int(self.arguments["global_batch_size"] * self.arguments["seq_length"])

    def records(self, evaluated: bool) -> tuple[Record, ...]:
        """Returns the evaluations, or else the validations."""
        return self.evaluations if evaluated else self.validations


def load_run(folder: Path) -> Run:
    """Reads a run; raises a `UserError` that names the file, or its line, that is wrong."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"{folder}: has no metrics.jsonl; give the --log-dir of a run")
    lines = _lines(path)
    train = {line["iteration"]: line for _, line in lines if line["type"] == "train"}
    validations = _records(lines, "validation")
    evaluations = _records(_lines(folder / "evaluation.jsonl"), "evaluation")
    if not (validations or evaluations):
        raise UserError(f"{path}: has no validation; train with --eval-interval and --eval-iters")
    ess, ratios = _weights(path, list(train.values()))
    return Run(
        folder=folder,
        arguments=_arguments(folder / "arguments.json"),
        begin=min(train, default=1) - 1,
        end=max(train, default=0),
        validations=validations,
        evaluations=evaluations,
        ess=ess,
        weight_ratios=ratios,
    )


def _records(lines: Sequence[tuple[str, Mapping[str, Any]]], kind: str) -> tuple[Record, ...]:
    """Returns the records of a kind by iteration, the later of two of the same."""
    found = {
        line["iteration"]: _record(where, line) for where, line in lines if line["type"] == kind
    }
    return tuple(found[iteration] for iteration in sorted(found))


def _lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Returns the records of a file and where each stands; none if there is no file.

    A last line that is cut, as a run leaves it that is killed, is dropped.
    """
    content = path.read_bytes() if path.exists() else b""
    lines = content.splitlines()
    found = []
    for number, line in enumerate(lines, start=1):
        where = f"{path}:{number}"
        try:
            record = json.loads(line)
        except ValueError as error:
            if number == len(lines) and not content.endswith(b"\n"):
                break
            raise UserError(f"{where}: not JSON; restore the file, or leave the run out") from error
        if not (
            isinstance(record, dict)
            and isinstance(record.get("type"), str)
            and type(record.get("iteration")) is int
        ):
            raise UserError(f"{where}: not a record of training: it has no type and iteration")
        found.append((where, record))
    return found


def _record(where: str, line: Mapping[str, Any]) -> Record:
    values = {
        name: float(value)
        for name, value in line.items()
        if name not in ("iteration", "time") and _is_finite(value)
    }
    try:
        domains = {name: found["lm_loss"] for name, found in (line.get("domains") or {}).items()}
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{where}: 'domains' is not as training writes it") from error
    for name, loss in {"lm_loss": line.get("lm_loss"), **domains}.items():
        if not _is_finite(loss):
            raise UserError(
                f"{where}: the loss {name} is no finite number; a run that has diverged is a "
                "result of its own: report it, and leave its folder out"
            )
    return Record(line["iteration"], values, domains)


def _is_finite(value: object) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value)  # type: ignore[arg-type]


def _weights(
    path: Path, train: Sequence[Mapping[str, Any]]
) -> tuple[float | None, dict[str, float]]:
    try:
        reports = [line["reweight"] for line in train if line.get("reweight")]
        sizes = [report["ess"] for report in reports if report.get("ess") is not None]
        by_domain: dict[str, list[float]] = {}
        for report in reports:
            for name, found in (report.get("domains") or {}).items():
                if found.get("weight_ratio") is not None:
                    by_domain.setdefault(name, []).append(found["weight_ratio"])
        ratios = {name: fmean(values) for name, values in sorted(by_domain.items())}
        return fmean(sizes) if sizes else None, ratios
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{path}: 'reweight' is not as training writes it") from error


def _arguments(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise UserError(f"{path}: no such file; the run is not of this program: leave it out")
    try:
        arguments = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path}: not JSON; restore the file, or leave the run out") from error
    if not isinstance(arguments, dict):
        raise UserError(f"{path}: not an object of arguments; restore it, or leave the run out")
    for name, kind in _READ.items():
        if not isinstance(arguments.get(name), kind):
            raise UserError(f"{path}: {name} {arguments.get(name)}: not as training writes it")
    return arguments
