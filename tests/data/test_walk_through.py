"""docs/data.md is true: its commands are run as they stand there."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]


def commands() -> str:
    text = (ROOT / "docs" / "data.md").read_text()
    section = text[text.index("## From text") : text.index("## preprocess_data")]
    blocks = re.findall(r"```bash\n(.*?)```", section, re.DOTALL)
    assert len(blocks) == 7
    return "set -euxo pipefail\n" + "".join(blocks)


def test_the_walk_through_ends_in_a_run_and_its_scores(tmp_path: Path) -> None:
    for name in ("tools", "examples", "pretrain_gpt_rw.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    python = Path(sys.executable).parent
    done = subprocess.run(
        ["bash", "-c", commands()],
        cwd=tmp_path,
        env=os.environ | {"PATH": f"{python}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout
    walk = tmp_path / "walk"
    domains = set(json.loads((walk / "all" / "domains.json").read_text())["domains"])
    assert {"code", "prose", "noise"} < domains
    for split in ("train", "valid"):
        assert set(json.loads((walk / split / "domains.json").read_text())["domains"]) == domains
    assert "validation loss at iteration 30" in done.stdout
    for domain in domains:
        losses = np.load(walk / "scores" / f"{domain}_text_document.token_losses.npy")
        assert 2 < np.nanmean(losses) < 9
