"""The quick start: a corpus, a tokenizer, two pretraining runs and a report, on two CPU cores.

Everything goes to `--output-dir`. A stage is skipped when its output is there and nothing that it
depends on has changed.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from examples.prepare import PROGRAM, ROOT, TOOLS, blend, data_stages
from examples.stages import Stage, StageError, execute, python, run_stages

HERE = Path(__file__).resolve().parent

# Flags for build_corpus.py; its defaults give some 2 MB a domain.
CORPUS: list[str] = []
VOCAB_SIZE = 2048
PROCESSES = 2
NOISE_SHARE = 0.1

SMALL_MODEL = ROOT / "examples" / "small.args"
MODEL_AND_TRAINING = [f"@{SMALL_MODEL}"]
REWEIGHTING = (
    "--reweight-strategy linupper --reweight-temperature 1.0 --reweight-warmup-steps 20 "
    "--reweight-log-samples 32"
).split()
RUNS: dict[str, list[str]] = {"none": ["--reweight-strategy", "none"], "linupper": REWEIGHTING}


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is not current, and print the report."""
    parser = argparse.ArgumentParser(description="Corpus, tokenizer, two runs and a report.")
    parser.add_argument("--output-dir", type=Path, default=ROOT / "quickstart", metavar="DIR")
    args = parser.parse_args(argv)
    out = args.output_dir.resolve()
    started = time.monotonic()
    try:
        run_stages(build_stages(out), out)
    except StageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print((out / "comparison.txt").read_text())
    print(f"picture: {out / 'report.png'}   all stages: {time.monotonic() - started:.0f} s")
    return 0


def build_stages(out: Path) -> list[Stage]:
    """The stages in order, writing below `out`."""
    corpus = out / "corpus"

    make_corpus = Stage(
        "corpus",
        corpus / "valid",
        lambda: python(HERE / "build_corpus.py", "--output-dir", corpus, *CORPUS),
        depends=[HERE / "build_corpus.py"],
        settings=CORPUS,
    )
    tokenizer, data = data_stages(make_corpus, out, ("train", "valid"), VOCAB_SIZE)
    trained = [
        Stage(
            f"pretrain {name}",
            out / "runs" / name / "metrics.jsonl",
            lambda name=name: pretrain(out, name),  # type: ignore[misc]
            depends=[*PROGRAM, SMALL_MODEL],
            after=data,
            settings=[MODEL_AND_TRAINING, RUNS[name], NOISE_SHARE, PROCESSES],
        )
        for name in RUNS
    ]
    report = Stage(
        "report",
        out / "report.png",
        lambda: python(
            HERE / "report.py",
            "--baseline", out / "runs" / "none",
            "--reweighted", out / "runs" / "linupper",
            "--output", out / "report.png",
        ),
        depends=[HERE / "report.py"],
        after=trained,
    )  # fmt: skip
    compare = Stage(
        "comparison",
        out / "comparison.html",
        lambda: execute(
            [
                *[sys.executable, TOOLS / "compare_runs.py"],
                *[f"{name}={out / 'runs' / name}" for name in RUNS],
                *["--output", out / "comparison", "--title", "The quick start"],
            ],
            out / "comparison.txt",
        ),
        depends=sorted((ROOT / "megatron_rw" / "comparison").glob("*.py")),
        after=trained,
    )
    return [make_corpus, tokenizer, *data, *trained, compare, report]


def training_flags(out: Path, run: Path) -> list[str]:
    """The main job's flags, but for the reweighting: model, data, tokenizer and logs.

    Args:
        out: the quick start's folder.
        run: where this run writes.
    """
    return [
        *["--device", "cpu"],
        *MODEL_AND_TRAINING,
        *["--train-data-path", *blend(out / "data" / "train", NOISE_SHARE)],
        *["--valid-data-path", *blend(out / "data" / "valid", NOISE_SHARE)],
        *["--data-cache-path", str(out / "data" / "cache")],
        *["--tokenizer-type", "SentencePieceTokenizer"],
        *["--tokenizer-model", str(out / "tokenizer" / "bpe.model")],
        *["--log-dir", str(run), "--tensorboard-dir", str(run / "tensorboard")],
    ]


def pretrain(out: Path, name: str) -> None:
    """One run of the main job over two data-parallel processes, with its progress on a line."""
    run = out / "runs" / name
    run.mkdir(parents=True, exist_ok=True)
    (run / "metrics.jsonl").unlink(missing_ok=True)
    command = [
        *[sys.executable, "-m", "torch.distributed.run", "--standalone"],
        *["--nproc-per-node", str(PROCESSES)],
        str(ROOT / "pretrain_gpt_rw.py"),
        *training_flags(out, run),
        *RUNS[name],
    ]
    (run / "command.txt").write_text(" ".join(command) + "\n")
    progress = Progress()
    execute(command, run / "train.log", progress.show)
    progress.end()


class Progress:
    """Megatron's log as one line that is rewritten on a terminal, or one now and then elsewhere."""

    _STEP = re.compile(r"iteration +(\d+)/ *(\d+) .*?lm loss: ([0-9.E+-]+)")
    _SECONDS_BETWEEN_LINES = 10.0

    def __init__(self) -> None:
        self._first: tuple[int, float] | None = None
        self._printed = -self._SECONDS_BETWEEN_LINES

    def show(self, line: str) -> None:
        """Print what a line of the log says about the progress, if anything."""
        match = self._STEP.search(line)
        if not match:
            return
        step, steps, loss = int(match[1]), int(match[2]), float(match[3])
        now = time.monotonic()
        if self._first is None:
            self._first = (step, now)
        done, elapsed = step - self._first[0], now - self._first[1]
        left = f", {elapsed / done * (steps - step):.0f} s left" if done else ""
        text = f"      step {step}/{steps}, lm loss {loss:.3f}{left}"
        if sys.stdout.isatty():
            print(f"\r{text:<60}", end="", flush=True)
        elif now - self._printed >= self._SECONDS_BETWEEN_LINES or step == steps:
            print(text, flush=True)
            self._printed = now

    def end(self) -> None:
        """Leave the line."""
        if sys.stdout.isatty():
            print()


if __name__ == "__main__":
    sys.exit(main())
