"""Runs the study of `study.py` with the real program, and has `tools/compare_runs.py` judge it.

    python -m examples.study.run --size cpu --corpus DIR --output-dir study

Stages that are done are not done again, so that a study that was interrupted goes on where it was;
their number and the time left are printed. Without `--corpus` the quick start's corpus is built.
In the end, `noise-10.html` (and `.png`, `.json`) is the page of the arms at 10 % of noise.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import glob
import inspect
import json
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from examples.prepare import PROGRAM, ROOT, TOOLS, blend, blend_of, data_stages
from examples.stages import (
    Stage,
    StageError,
    execute,
    interrupted_by_sigterm,
    python,
    run_stages,
)
from examples.study import contrasts
from examples.study.study import BASELINE, CONTRASTS, MARGIN, SIZES, Arm, Size

HERE = Path(__file__).resolve().parent
# Added to a trunk's number, the seed of its reference.
REFERENCE_SEED = 500
# Text of the trunks, of the branches, and of the evaluation.
PARTS = ("trunk", "branch", "valid")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    parser = argparse.ArgumentParser(description="Run the study, or go on with it.")
    parser.add_argument("--size", choices=SIZES, required=True)
    parser.add_argument("--corpus", type=Path, metavar="DIR", help="default: one is built")
    parser.add_argument("--output-dir", type=Path, required=True, metavar="DIR")
    parser.add_argument("--jobs", type=int, help="runs at a time, in place of the size's")
    args = parser.parse_args(argv)
    if args.jobs is not None and args.jobs < 1:
        parser.error(f"--jobs {args.jobs}: give 1 or more")
    interrupted_by_sigterm()
    size, out = SIZES[args.size], args.output_dir.resolve()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--output-dir {out}: {error.strerror}")
    plan = Plan(size, out, args.corpus and args.corpus.resolve())
    try:
        run_stages(plan.stages(), out, args.jobs or size.jobs)
    except StageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on with what is missing", file=sys.stderr)
        return 130
    for noise in size.noise:
        print((out / f"noise-{noise}.txt").read_text())
    print(f"pages: {', '.join(str(out / f'noise-{noise}.html') for noise in size.noise)}")
    return 0


@dataclass(frozen=True)
class Plan:
    """The stages of a study, and what they write below `out`."""

    size: Size
    out: Path
    corpus: Path | None

    def stages(self) -> list[Stage]:
        """All stages, each behind those that it builds on."""
        corpus = self._corpus()
        tokenizer, data = data_stages(corpus, self.out, PARTS, self.size.vocab_size)
        stages = [corpus, tokenizer, *data]
        references = {trunk: self._reference(trunk, data) for trunk in self._trunks}
        for noise in self.size.noise:
            evaluated = []
            for trunk in self._trunks:
                before = self._trunk(noise, trunk, data)
                branches: dict[str, Stage] = {}
                for arm in self.size.selected(noise):
                    needed = [n for n in references[trunk] if f"{{{n}}}" in arm.flags]
                    after = [before, *(references[trunk][name] for name in needed)]
                    after += [branches[arm.shares_of]] if arm.shares_of else []
                    branches[arm.name] = self._branch(noise, trunk, arm, after)
                evaluated.append(self._evaluate(noise, trunk, list(branches.values())))
                used = [s for b in branches.values() for s in b.after]
                new = [s for s in references[trunk].values() if _used(s, used) and s not in stages]
                stages += [*new, before, *branches.values(), evaluated[-1]]
            stages.append(self._report(noise, evaluated))
        return stages

    def _corpus(self) -> Stage:
        out, size = self.out, self.size
        corpus = out / "corpus"

        def make() -> None:
            given = self.corpus
            if given is None:
                given = out / "source"
                builder = ROOT / "examples" / "quickstart" / "build_corpus.py"
                most_built = ("--max-bytes-per-domain", size.built_bytes)
                python(builder, "--output-dir", given, *most_built)
            most = [] if size.train_bytes is None else ["--train-bytes", size.train_bytes]
            shutil.rmtree(corpus, ignore_errors=True)
            python(HERE / "corpus.py", "--corpus", given, "--output-dir", corpus, *most)

        return Stage(
            "corpus",
            corpus / "valid",
            make,
            depends=[HERE / "corpus.py"],
            settings=[*_listed(self.corpus), size.built_bytes, size.train_bytes],
        )

    def _reference(self, trunk: int, data: Sequence[Stage]) -> dict[str, Stage]:
        """A model trained on the trunk's clean text, and two of its checkpoints' scores."""
        size, run = self.size, self._reference_folder(trunk)
        early = size.steps // 2

        def flags() -> list[str]:
            blend, seed = self._blend("trunk", 0), REFERENCE_SEED + trunk
            return [*self._training(run, blend, seed), "--save-interval", str(early)]

        trained = self._run(f"reference-{trunk}", run, flags, data, size.steps)

        def score(name: str, step: int) -> None:
            shutil.rmtree(run / name, ignore_errors=True)
            command = [sys.executable, TOOLS / "score_dataset.py", "--device", size.device]
            command += ["--use-checkpoint-args", "--load", run / "ckpt", "--ckpt-step", step]
            command += ["--micro-batch-size", size.batch]
            command += ["--data-path", self.out / "data" / "branch", "--score-dir", run / name]
            execute(command, run / f"{name}.log")

        scored = {
            name: Stage(
                f"reference-{trunk}/{name}",
                run / name / "scores.json",
                functools.partial(score, name, step),
                after=[trained],
                settings=[step],
                cost=size.steps / 2,
            )
            for name, step in (("early", early), ("late", size.steps))
        }
        return {"reference": trained, **scored}

    def _trunk(self, noise: int, trunk: int, data: Sequence[Stage]) -> Stage:
        run, steps = self._folder(noise, trunk) / "trunk", self.size.trunk_steps

        def flags() -> list[str]:
            blend = self._blend("trunk", noise)
            return [*self._training(run, blend, trunk), "--exit-interval", str(steps)]

        return self._run(f"noise-{noise}/trunk-{trunk}", run, flags, data, steps)

    def _branch(self, noise: int, trunk: int, arm: Arm, after: Sequence[Stage]) -> Stage:
        run = self._folder(noise, trunk) / arm.name
        name = f"noise-{noise}/trunk-{trunk}/{arm.name}"
        flags = functools.partial(self._branch_flags, run, noise, trunk, arm)
        # The runs of an arm stay when it is to be run with more shares of noise.
        settings = [dataclasses.replace(arm, noise=())]
        return self._run(name, run, flags, after, self.size.branch_steps, settings)

    def _run(
        self,
        name: str,
        run: Path,
        flags: Callable[[], Sequence[str]],
        after: Sequence[Stage],
        steps: int,
        settings: Sequence[object] = (),
    ) -> Stage:
        """A run of the program into a folder of its own; its flags are made when it begins."""

        def train() -> None:
            shutil.rmtree(run, ignore_errors=True)
            run.mkdir(parents=True)
            command = [sys.executable, str(ROOT / "pretrain_gpt_rw.py"), *flags()]
            (run / "command.txt").write_text(shlex.join(command) + "\n")
            execute(command, run / "train.log")
            (run / "done").touch()

        settings = [*settings, *self._settings]
        return Stage(name, run / "done", train, PROGRAM, after, settings, cost=steps)

    def _branch_flags(self, run: Path, noise: int, trunk: int, arm: Arm) -> list[str]:
        size, reference = self.size, self._reference_folder(trunk)
        begin = self._folder(noise, trunk) / "trunk" / "ckpt"
        for needed in (begin, *([reference / "ckpt"] if "{reference}" in arm.flags else [])):
            if not needed.exists():
                raise StageError(f"a checkpoint is gone: delete {needed.parent}, to train it again")
        values = {
            "seed": trunk,
            "reference": reference / "ckpt",
            "early": reference / "early",
            "late": reference / "late",
            "quarter": size.batch // 4,
            "until": size.steps - size.branch_steps // 4,
            "interval": max(2, size.branch_steps // 10),
        }
        mix = self._blend("branch", 0 if arm.clean else noise)
        if arm.shares_of is not None:
            shares = weight_shares(self._folder(noise, trunk) / arm.shares_of, size.steps)
            mix = blend_of(self.out / "data" / "branch", shares)
        seed = trunk + 1000 * arm.order
        return [
            *self._training(run, mix, seed, arm.rate),
            *["--save-interval", str(size.branch_steps // 4)],
            *["--load", str(begin)],
            *["--override-opt-param-scheduler", "--exit-on-missing-checkpoint"],
            *(word.format(**values) for word in arm.flags.split()),
        ]

    def _evaluate(self, noise: int, trunk: int, branches: Sequence[Stage]) -> Stage:
        size, folder = self.size, self._folder(noise, trunk)
        done = folder / "evaluated"

        def evaluate() -> None:
            runs = [branch.output.parent for branch in branches]
            if gone := [run for run in runs if not (run / "ckpt").exists()]:
                raise StageError(f"the checkpoints are gone: delete {gone[0]}, to train it again")
            quarter = size.branch_steps // 4
            command = [
                *[sys.executable, "-m", "examples.study.evaluate", "--device", size.device],
                *["--data", self.out / "data" / "valid", "--vocab-size", size.vocab_size],
                *["--rows", size.eval_rows, "--items", size.eval_items],
                *["--steps", *range(size.trunk_steps + quarter, size.steps + 1, quarter)],
                *["--runs", *runs],
            ]
            execute(command, folder / "eval.log")
            done.touch()
            if not size.keep_checkpoints:
                for run in runs:
                    shutil.rmtree(run / "ckpt")

        return Stage(
            f"noise-{noise}/trunk-{trunk}/evaluation",
            done,
            evaluate,
            depends=[*PROGRAM, HERE / "evaluate.py"],
            after=branches,
            settings=[size.eval_rows, size.eval_items, size.vocab_size],
            cost=size.branch_steps / 5 * len(branches),
        )

    def _report(self, noise: int, evaluated: Sequence[Stage]) -> Stage:
        page, size = self.out / f"noise-{noise}", self.size
        arms = size.selected(noise)

        def report() -> None:
            command = [sys.executable, TOOLS / "compare_runs.py", "--output", page]
            command += ["--baseline", BASELINE, "--margin", MARGIN]
            command += ["--title", f"Reweighting against none, {noise} % noise"]
            folders = {
                arm.name: [self._folder(noise, trunk) / arm.name for trunk in self._trunks]
                for arm in arms
            }
            for arm in arms:
                name = BASELINE if arm.order else arm.name
                command += [f"{name}={glob.escape(str(run))}" for run in folders[arm.name]]
            execute(command, page.with_suffix(".txt"))
            with page.with_suffix(".txt").open("a") as text:
                text.write(contrasts.write(folders, self.out / f"contrasts-{noise}.json"))

        return Stage(
            f"report noise-{noise}",
            page.with_suffix(".html"),
            report,
            depends=[
                HERE / "contrasts.py",
                *sorted((ROOT / "megatron_rw" / "comparison").rglob("*.py")),
            ],
            after=evaluated,
            settings=[arms, CONTRASTS, MARGIN],
        )

    @property
    def _settings(self) -> list[object]:
        """What every run depends on; with more trunks or arms, those that are there stay."""
        size = self.size
        made = (Plan._training, Plan._branch_flags, blend, blend_of, weight_shares)
        steps = (size.trunk_steps, size.branch_steps)
        return [
            size.model,
            size.batch,
            size.rate,
            *steps,
            size.device,
            *(inspect.getsource(function) for function in made),
        ]

    @property
    def _trunks(self) -> range:
        return range(1, self.size.trunks + 1)

    def _reference_folder(self, trunk: int) -> Path:
        return self.out / "references" / str(trunk)

    def _folder(self, noise: int, trunk: int) -> Path:
        return self.out / f"noise-{noise}" / f"trunk-{trunk}"

    def _training(self, run: Path, blend: Sequence[str], seed: int, rate: float = 1.0) -> list[str]:
        """The program's flags of a run, but for where it begins and its arm."""
        size, data = self.size, self.out / "data"
        length = size.model.split("--seq-length ")[1].split()[0]
        return [
            *["--device", size.device, *size.model.split(), "--max-position-embeddings", length],
            *["--micro-batch-size", str(size.batch), "--global-batch-size", str(size.batch)],
            *["--lr", str(size.rate * rate), "--min-lr", str(size.rate * rate / 10)],
            *["--lr-decay-style", "WSD", "--lr-wsd-decay-iters", str(size.branch_steps)],
            *["--train-iters", str(size.steps), "--seed", str(seed)],
            *["--train-data-path", *blend],
            # Megatron wants an evaluation; `evaluate.py` has the same text for each checkpoint.
            *["--valid-data-path", *self._blend("valid", 10), "--eval-iters", "1"],
            *["--eval-interval", str(size.steps)],
            *["--data-cache-path", str(data / "cache")],
            *["--tokenizer-type", "SentencePieceTokenizer"],
            *["--tokenizer-model", str(self.out / "tokenizer" / "bpe.model")],
            *["--log-interval", str(max(1, size.branch_steps // 20))],
            *["--log-dir", str(run), "--save", str(run / "ckpt")],
            *["--save-interval", str(size.steps)],
        ]

    def _blend(self, part: str, noise: int) -> list[str]:
        return blend(self.out / "data" / part, noise / 100)


def _used(stage: Stage, others: Sequence[Stage]) -> bool:
    """Whether it is one of the others, or one of them builds on it."""
    return stage in others or any(stage in other.after for other in others)


def weight_shares(run: Path, last: int) -> dict[str, float]:
    """A run's average share of weight by domain, from its `metrics.jsonl`, up to a last step."""
    path = run / "metrics.jsonl"
    try:
        records = [json.loads(line) for line in path.read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise StageError(f"{path}: {error}; delete {run}, to run it again") from error
    train = [record for record in records if record["type"] == "train"]
    if not train or train[-1]["iteration"] != last:
        raise StageError(f"{path}: it does not end at step {last}; delete {run}, to run it again")
    # The first is of a single step, where the others are means over an interval.
    steps = [record["reweight"]["domains"] for record in train[1:]]
    names = {name for step in steps for name in step}
    return {
        name: sum(step.get(name, {}).get("weight_share") or 0.0 for step in steps) / len(steps)
        for name in sorted(names)
    }


def _listed(corpus: Path | None) -> list[object]:
    """The files of a corpus, with their sizes and times."""
    files = [] if corpus is None else sorted(corpus.glob("*/*.jsonl*"))
    return [corpus, *((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files)]


if __name__ == "__main__":
    sys.exit(main())
