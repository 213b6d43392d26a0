"""The quick start: a corpus, a tokenizer, two pretraining runs and a report, on two CPU cores.

Everything goes to `--output-dir`. A stage is skipped when its output is there and nothing that it
depends on has changed.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from examples.stages import Stage, StageError, execute, python, run_stages

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]

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
    corpus, tokenizer, data = out / "corpus", out / "tokenizer", out / "data"
    package = sorted((ROOT / "megatron_rw" / "data").rglob("*.py"))
    program = [ROOT / "pretrain_gpt_rw.py", *sorted((ROOT / "megatron_rw").rglob("*.py"))]

    make_corpus = Stage(
        "corpus",
        corpus / "valid",
        lambda: python(HERE / "build_corpus.py", "--output-dir", corpus, *CORPUS),
        depends=[HERE / "build_corpus.py"],
        settings=CORPUS,
    )
    train_tokenizer = Stage(
        "tokenizer",
        tokenizer / "bpe.model",
        lambda: python(
            ROOT / "tools" / "train_tokenizer.py",
            "--vocab-size", VOCAB_SIZE,
            "--output-prefix", tokenizer / "bpe", "--overwrite",
            "--input", *sorted((corpus / "train").glob("*.jsonl")),
        ),
        depends=package,
        after=[make_corpus],
        settings=[VOCAB_SIZE],
    )  # fmt: skip
    tokenize = [
        Stage(
            f"tokenize {split}",
            data / split / "domains.json",
            lambda split=split: python(  # type: ignore[misc]
                ROOT / "tools" / "preprocess_data.py",
                "--tokenizer-model", tokenizer / "bpe.model",
                "--append-eod", "--overwrite",
                "--domain-key", "domain",
                "--output-dir", data / split,
                "--input", *sorted((corpus / split).glob("*.jsonl")),
            ),
            depends=package,
            after=[train_tokenizer],
        )
        for split in ("train", "valid")
    ]  # fmt: skip
    trained = [
        Stage(
            f"pretrain {name}",
            out / "runs" / name / "metrics.jsonl",
            lambda name=name: pretrain(out, name),  # type: ignore[misc]
            depends=[*program, SMALL_MODEL],
            after=tokenize,
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
                *[sys.executable, ROOT / "tools" / "compare_runs.py"],
                *[f"{name}={out / 'runs' / name}" for name in RUNS],
                *["--output", out / "comparison", "--title", "The quick start"],
            ],
            out / "comparison.txt",
        ),
        depends=sorted((ROOT / "megatron_rw" / "comparison").glob("*.py")),
        after=trained,
    )
    return [make_corpus, train_tokenizer, *tokenize, *trained, compare, report]


def blend(folder: Path) -> list[str]:
    """Weights and prefixes for Megatron: the noise a tenth, the other domains alike."""
    domains = json.loads((folder / "domains.json").read_text())["domains"]
    share = (1 - NOISE_SHARE) / (len(domains) - 1)
    return [
        word
        for name, domain in domains.items()
        for word in (
            f"{NOISE_SHARE if name == 'noise' else share:.6f}",
            str(folder / domain["prefix"]),
        )
    ]


def training_flags(out: Path, run: Path) -> list[str]:
    """The main job's flags, but for the reweighting: model, data, tokenizer and logs.

    Args:
        out: the quick start's folder.
        run: where this run writes.
    """
    return [
        *["--device", "cpu"],
        *MODEL_AND_TRAINING,
        *["--train-data-path", *blend(out / "data" / "train")],
        *["--valid-data-path", *blend(out / "data" / "valid")],
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
