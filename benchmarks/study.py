"""Puts the numbers of a finished study into one file, and prints its tables in Markdown.

Trains nothing: it reads the pages of `make study` for the figures of docs/evidence.md, and writes
`benchmarks/results/study_cpu.json` without the folders of this machine.

    make study CORPUS=DIR && .venv/bin/python benchmarks/study.py study
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch

from benchmarks.kernels.record import about, results_file
from megatron_rw.comparison.results import signed

COMMAND = "make study CORPUS=DIR && .venv/bin/python benchmarks/study.py study"
DIGITS = 6
HEAD = "arm|loss − `none`|95 % interval|verdict|worst domain|noise|logit scale|ESS".split("|")
ASKED = ["question", "arms", "difference", "95 % interval", "verdict"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    parser = argparse.ArgumentParser(description="The numbers of a finished study, in one file.")
    parser.add_argument("study", type=Path, metavar="DIR", help="the study's output folder")
    parser.add_argument("--output", type=Path, help="default: below benchmarks/results")
    args = parser.parse_args(argv)
    pages = sorted(args.study.glob("noise-*.json"), key=lambda path: int(path.stem[6:]))
    if not pages:
        parser.error(f"{args.study}: has no noise-*.json; give the folder of a finished study")
    found = {page.stem: condition(page) for page in pages}
    cpu = torch.device("cpu")
    ended = datetime.fromtimestamp(max(page.stat().st_mtime for page in pages), UTC)
    head = {"command": COMMAND, "date": ended.date().isoformat(), "conditions": found}
    text = json.dumps(about(cpu) | head, indent=1, ensure_ascii=False)
    (args.output or results_file("study", cpu)).write_text(f"{text}\n")
    for name, numbers in found.items():
        print(f"\n{name}: {numbers['headline']}\n")
        print(markdown(HEAD, rows(numbers)))
        if numbers["questions"]:
            print(f"\n{markdown(ASKED, questions(numbers))}")
    return 0


def condition(page: Path) -> dict[str, Any]:
    """The numbers of one share of noise, of which each arm has the losses of every trunk."""
    numbers = json.loads(page.read_text())
    asked = json.loads(page.with_name(f"contrasts-{page.stem[6:]}.json").read_text())
    arms = {}
    for arm in numbers["arms"]:
        summary = arm["summary"]
        arms[arm["name"]] = {
            "verdict": arm["verdict"],
            "p_holm": arm["p_value"],
            "tokens_to_baseline": summary["tokens_to_baseline"],
            "reached": summary["reached"],
            "ess": summary["values"].get("ess"),
            "differences": summary["differences"],
            "weight_ratios": summary["weight_ratios"],
            "loss_by_trunk": [
                [pair[whose]["loss"] for whose in ("measures", "baseline_measures")]
                for pair in summary["pairs"]
            ],
        }
    found = {
        "headline": page.with_suffix(".txt").read_text().splitlines()[0],
        "baseline": numbers["baseline_values"],
        "chance": numbers["chance"],
        "arms": arms,
        "questions": asked,
    }
    rounded: dict[str, Any] = _rounded(found)
    return rounded


def rows(numbers: Mapping[str, Any]) -> list[list[str]]:
    """The baseline's own values, and a row for each arm, the lowest loss first."""
    base = numbers["baseline"]
    kinds = ("worst domain", "noise", "logit_scale")
    head, *rest = (f"{base[kind]:.3f}" for kind in ("loss", *kinds))
    table = [["`none`, itself", head, "", "", *rest, ""]]
    for name, arm in sorted(numbers["arms"].items(), key=_loss):
        found = arm["differences"]
        table.append(
            [
                *(name, signed(found["loss"]["mean"]), _interval(found["loss"]), arm["verdict"]),
                *(signed(found[kind]["mean"], 3) for kind in kinds[:2]),
                f"{base['logit_scale'] + found['logit_scale']['mean']:.3f}",
                "" if arm["ess"] is None else f"{arm['ess']:.2f}",
            ]
        )
    return table


def questions(numbers: Mapping[str, Any]) -> list[list[str]]:
    """A row for each question."""
    return [
        [
            *(each["question"], f"{each['arm']} − {each['against']}"),
            *(signed(each["mean"]), _interval(each), each["verdict"]),
        ]
        for each in numbers["questions"]
    ]


def markdown(head: Sequence[str], table: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *table))


def _loss(arm: tuple[str, Mapping[str, Any]]) -> float:
    return float(arm[1]["differences"]["loss"]["mean"])


def _interval(found: Mapping[str, float]) -> str:
    return f"{signed(found['low'])} to {signed(found['high'])}"


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_rounded(each) for each in value]
    return round(value, DIGITS) if isinstance(value, float) else value


if __name__ == "__main__":
    sys.exit(main())
