"""The study's own questions: arms against each other, as one family of tests."""

from __future__ import annotations

import dataclasses
import glob
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from examples.study.study import CONTRASTS, MARGIN
from megatron_rw.comparison.inference import decide, holm
from megatron_rw.comparison.pairing import load_arms
from megatron_rw.comparison.results import compare, signed
from megatron_rw.comparison.settings import Settings
from megatron_rw.comparison.tables import interval, text


def write(folders: Mapping[str, Sequence[Path]], path: Path) -> str:
    """Tests the contrasts whose arms were run, and writes their numbers.

    Args:
        folders: the runs of each arm.
        path: the file for the numbers.

    Returns:
        A table of the contrasts, or nothing if no contrast had both its arms.
    """
    asked = [c for c in CONTRASTS if c[0] in folders and c[1] in folders]
    found = []
    for arm, other, _ in asked:
        arms = load_arms(
            [f"{name}={glob.escape(str(run))}" for name in (arm, other) for run in folders[name]]
        )
        found.append(compare(arms, Settings(baseline=other)).arms[0].summary.loss)
    adjusted = holm([each.p_value for each in found])
    rows = [["question", "arm", "against", "loss", "95 % interval", "p (Holm)", "verdict"]]
    numbers = []
    for (arm, other, question), each, p_value in zip(asked, found, adjusted, strict=True):
        verdict = decide(each, p_value, MARGIN)
        shown = "" if p_value is None else f"{p_value:.3g}"
        rows.append([question, arm, other, signed(each.mean), interval(each), shown, verdict])
        about = {"question": question, "arm": arm, "against": other, "verdict": verdict}
        numbers.append({**about, "p_holm": p_value, **dataclasses.asdict(each)})
    path.write_text(json.dumps(numbers, indent=1) + "\n")
    if not asked:
        return ""
    return f"\nThe questions, a family of {len(asked)} tests by the same rule:\n\n{text(rows)}\n"
