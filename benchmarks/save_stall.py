"""How long saving a checkpoint stops training: asynchronous against synchronous, on a CPU.

Runs the real program with mock data, without saving, saving synchronously and asynchronously, in
turn. Prints the time of a step after which a checkpoint is saved over that of one after which none
is, and the time of all steps from one checkpoint to the next over that of the run without saving,
which also has what the writer takes from the other processes. Medians over checkpoints and rounds.
Writes both as JSON.

    make bench-save-stall
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch

from benchmarks import measured
from benchmarks.kernels.record import about, results_file

INTERVAL, CHECKPOINTS = 12, 4
# 33 million parameters: a checkpoint of 400 MB with Adam's state in fp32.
MODEL = (
    "--num-layers 8 --hidden-size 512 --ffn-hidden-size 2048 --num-attention-heads 8 "
    "--seq-length 64 --max-position-embeddings 64 --position-embedding-type rope "
    "--untie-embeddings-and-output-weights --micro-batch-size 2 --mock-data "
    "--tokenizer-type NullTokenizer --vocab-size 8191 --lr 1e-4 --lr-decay-style constant "
    f"--train-iters {INTERVAL * CHECKPOINTS + 1} --log-interval 1 --eval-iters 0 "
    "--eval-interval 1000 --num-workers 0 --reweight-strategy linupper"
).split()
SYNCHRONOUS = f"--save-interval {INTERVAL} --keep-last 1".split()
ASYNCHRONOUS = "--async-save --async-strategy mcore --use-persistent-ckpt-worker".split()
MODES = {"none": [], "synchronous": SYNCHRONOUS, "asynchronous": SYNCHRONOUS + ASYNCHRONOUS}


def steps(mode: str) -> list[float]:
    """Seconds from the end of each step to the end of the next; a save is in the one it follows."""
    with tempfile.TemporaryDirectory() as folder:
        save = ["--save", f"{folder}/checkpoints"] if mode != "none" else []
        command = [sys.executable, str(ROOT / "pretrain_gpt_rw.py"), *MODEL, *MODES[mode], *save]
        measured.run([*command, "--log-dir", folder], os.environ, Path(folder), watch_memory=False)
        lines = Path(folder, "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    ends = [record["time"] for record in records if record["type"] == "train"]
    return [after - before for before, after in itertools.pairwise(ends)]


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    at_save: dict[str, list[float]] = defaultdict(list)
    cycle: dict[str, list[float]] = defaultdict(list)
    for number in range(options.rounds):
        order = list(MODES)[number % 3 :] + list(MODES)[: number % 3]
        seconds = {mode: steps(mode) for mode in order}
        undisturbed = statistics.median(seconds["none"])
        for mode in MODES:
            # Step i is seconds[i - 1]'s beginning. The first cycle warms up.
            for first in range(2 * INTERVAL - 1, len(seconds[mode]) - INTERVAL + 1, INTERVAL):
                at_save[mode].append(seconds[mode][first] / undisturbed)
                whole = sum(seconds[mode][first : first + INTERVAL])
                cycle[mode].append(whole / (INTERVAL * undisturbed))
    cpu = torch.device("cpu")
    result = about(cpu) | {
        "benchmark": "save stall, 33 million parameters, one process",
        "command": "make bench-save-stall",
        "rounds": options.rounds,
        "steps_between_checkpoints": INTERVAL,
        "median_step_s_without_saving": undisturbed,
        "step_with_save_over_step": {m: statistics.median(at_save[m]) for m in MODES},
        "cycle_over_cycle_without_saving": {m: statistics.median(cycle[m]) for m in MODES},
        "raw_step_with_save_over_step": dict(at_save),
        "raw_cycle_over_cycle_without_saving": dict(cycle),
    }
    results_file("save_stall", cpu).write_text(json.dumps(result, indent=2) + "\n")
    for mode in MODES:
        print(
            f"{mode:13} step with a save / step: {statistics.median(at_save[mode]):6.2f}   "
            f"{INTERVAL} steps / {INTERVAL} steps without saving: "
            f"{statistics.median(cycle[mode]):.3f}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
