"""Folders of runs as training leaves them, with chosen losses."""

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Domains = Mapping[str, float]
DEFAULT: Domains = {"code": 3.6, "prose": 4.4, "noise": 4.3}


def write_run(
    folder: Path,
    curve: Mapping[int, Domains],
    strategy: str = "none",
    seed: int = 1,
    extra: Mapping[str, Any] | None = None,
    **arguments: Any,
) -> Path:
    """Writes a run whose validations have these losses of domains, by iteration.

    It begins before the first validation's iteration is over, at iteration 1. `extra` is what the
    validations have besides, and `arguments` those that are not the usual ones.
    """
    folder.mkdir(parents=True)
    lines: list[dict[str, Any]] = []
    for iteration in (1, *curve):
        weights = {
            name: {"weight_ratio": 1.1, "lm_loss": 5.0} for name in next(iter(curve.values()))
        }
        reweight = {"ess": 0.9, "objective": 4.0, "domains": weights}
        train: dict[str, Any] = {
            "type": "train",
            "iteration": iteration,
            "time": 1.0,
            "lm_loss": 4.0,
        }
        lines.append(train if strategy == "none" else {**train, "reweight": reweight})
        if losses := curve.get(iteration):
            found = {name: {"lm_loss": loss} for name, loss in losses.items()}
            mean = sum(losses.values()) / len(losses)
            lines.append({**train, "type": "validation", "lm_loss": mean, "domains": found})
            lines[-1] |= extra or {}
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    known = {
        "seed": seed,
        "lr": 0.003,
        "load": None,
        "save": str(folder / "ckpt"),
        "log_dir": str(folder),
        "global_batch_size": 2,
        "seq_length": 8,
        "tokenizer_model": "a.model",
        "valid_data_path": ["valid"],
        "reweight_strategy": strategy,
        "reweight_temperature": 1.0,
    }
    (folder / "arguments.json").write_text(json.dumps({**known, **arguments}))
    return folder


def flat(losses: Domains, *iterations: int, above: float = 0.0) -> dict[int, Domains]:
    """Returns a curve that falls by 0.1 a validation and ends with these losses, raised."""
    falls = {iteration: 0.1 * place for place, iteration in enumerate(reversed(iterations))}
    return {
        iteration: {name: loss + above + falls[iteration] for name, loss in losses.items()}
        for iteration in iterations
    }


def write_study(folder: Path, effects: Mapping[str, float], trunks: int = 5) -> Path:
    """Writes a run of each arm for each trunk, and two more of the baseline with other seeds."""
    random_numbers = random.Random(1)
    for trunk in range(trunks):
        runs = [(name, 1, effect) for name, effect in effects.items()]
        for arm, seed, effect in [*runs, ("none", 2, 0.0), ("none", 3, 0.0)]:
            losses = {
                name: loss + effect + 0.05 * trunk + random_numbers.gauss(0.0, 0.004)
                for name, loss in DEFAULT.items()
            }
            write_run(
                folder / f"trunk{trunk}" / (arm if seed == 1 else f"{arm}-{seed}"),
                flat(losses, 100, 200, 300, 400),
                strategy=arm,
                seed=seed,
                extra={"logit_scale": 1.0 + effect},
                load=f"trunk{trunk}/ckpt",
            )
    return folder


def edit_arguments(folder: Path, changed: Mapping[str, Any]) -> None:
    """Changes arguments of a run."""
    path = folder / "arguments.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))


def edit_lines(folder: Path, old: str, new: str) -> None:
    """Replaces a text in all of a run's metrics."""
    path = folder / "metrics.jsonl"
    path.write_text(path.read_text().replace(old, new))


def evaluate(*folders: Path) -> None:
    """Writes a run's validations as evaluations, too."""
    for folder in folders:
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        found = [line for line in lines if json.loads(line)["type"] == "validation"]
        text = "\n".join(found).replace('"validation"', '"evaluation"')
        (folder / "evaluation.jsonl").write_text(text + "\n")
