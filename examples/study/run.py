"""Runs the study of `study.py` with the real program, and has `tools/compare_runs.py` judge it.

    python -m examples.study.run --size cpu --corpus DIR --output-dir study

Stages that are done are not done again, so that a study that was interrupted goes on where it was;
their number and the time left are printed. Without `--corpus` the quick start's corpus is built.
In the end, `noise-10.html` (and `.png`, `.json`) is the page of the arms at 10 % of noise.
"""

from __future__ import annotations

import argparse
import functools
import json
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from examples.stages import (
    Stage,
    StageError,
    execute,
    interrupted_by_sigterm,
    python,
    run_stages,
)
from examples.study.study import BASELINE, MARGIN, SIZES, Arm, Size

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
TOOLS = ROOT / "tools"
PROGRAM = [ROOT / "pretrain_gpt_rw.py", *sorted((ROOT / "megatron_rw").rglob("*.py"))]
# The seed of the reference model, which is not that of a trunk.
REFERENCE_SEED = 99


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    parser = argparse.ArgumentParser(description="Run the study, or go on with it.")
    parser.add_argument("--size", choices=SIZES, required=True)
    parser.add_argument("--corpus", type=Path, metavar="DIR", help="default: one is built")
    parser.add_argument("--output-dir", type=Path, required=True, metavar="DIR")
    parser.add_argument("--jobs", type=int, help="runs at a time, in place of the size's")
    args = parser.parse_args(argv)
    interrupted_by_sigterm()
    size, out = SIZES[args.size], args.output_dir.resolve()
    plan = Plan(size, out, args.corpus)
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
        prepared = self._prepare()
        stages = list(prepared.values())
        shared = self._reference(prepared["data/train"], prepared["data/valid"])
        stages += shared
        for noise in self.size.noise:
            evaluated = []
            for trunk in range(1, self.size.trunks + 1):
                before = self._trunk(noise, trunk, prepared["data/train"], prepared["data/valid"])
                branches: dict[str, Stage] = {}
                for arm in self.size.selected(noise):
                    after = [before, *(shared if "{" in arm.flags else ())]
                    after += [branches[arm.shares_of]] if arm.shares_of else []
                    branches[arm.name] = self._branch(noise, trunk, arm, after)
                evaluated.append(self._evaluate(noise, trunk, list(branches.values())))
                stages += [before, *branches.values(), evaluated[-1]]
            stages.append(self._report(noise, evaluated))
        return stages

    def _prepare(self) -> dict[str, Stage]:
        out, size = self.out, self.size
        package = sorted((ROOT / "megatron_rw" / "data").rglob("*.py"))
        corpus, tokenizer = out / "corpus", out / "tokenizer"

        def make_corpus() -> None:
            given = self.corpus
            if given is None:
                given = out / "source"
                builder = ROOT / "examples" / "quickstart" / "build_corpus.py"
                most_built = ("--max-bytes-per-domain", size.built_bytes)
                python(builder, "--output-dir", given, *most_built)
            most = [] if size.train_bytes is None else ["--train-bytes", size.train_bytes]
            shutil.rmtree(corpus, ignore_errors=True)
            python(HERE / "corpus.py", "--corpus", given, "--output-dir", corpus, *most)

        def tokenize(split: str) -> None:
            python(
                TOOLS / "preprocess_data.py",
                *("--tokenizer-model", tokenizer / "bpe.model", "--append-eod", "--overwrite"),
                *("--domain-key", "domain", "--output-dir", out / "data" / split),
                *("--input", *sorted((corpus / split).glob("*.jsonl"))),
            )

        first = Stage(
            "corpus",
            corpus / "valid",
            make_corpus,
            depends=[HERE / "corpus.py"],
            settings=[self.corpus, size.built_bytes, size.train_bytes],
        )
        second = Stage(
            "tokenizer",
            tokenizer / "bpe.model",
            lambda: python(
                TOOLS / "train_tokenizer.py",
                *("--vocab-size", size.vocab_size, "--overwrite"),
                *("--output-prefix", tokenizer / "bpe"),
                *("--input", *sorted((corpus / "train").glob("*.jsonl"))),
            ),
            depends=package,
            after=[first],
            settings=[size.vocab_size],
        )
        data = [
            Stage(
                f"data/{split}",
                out / "data" / split / "domains.json",
                functools.partial(tokenize, split),
                depends=package,
                after=[second],
            )
            for split in ("train", "valid")
        ]
        return {stage.name: stage for stage in (first, second, *data)}

    def _reference(self, *data: Stage) -> list[Stage]:
        """A model trained on clean text alone, and the scores of two of its checkpoints."""
        size, run = self.size, self.out / "reference"
        early = size.steps // 2

        def train() -> None:
            save = ["--save-interval", str(early)]
            self._train(run, [*self._training(run, 0, REFERENCE_SEED), *save])

        trained = Stage(
            "reference",
            run / "done",
            train,
            depends=PROGRAM,
            after=data,
            settings=self._settings,
            cost=size.steps,
        )

        def score(name: str, step: int) -> None:
            shutil.rmtree(run / name, ignore_errors=True)
            command = [sys.executable, TOOLS / "score_dataset.py", "--device", size.device]
            command += ["--use-checkpoint-args", "--load", run / "ckpt", "--ckpt-step", step]
            command += ["--micro-batch-size", size.batch]
            command += ["--data-path", self.out / "data" / "train", "--score-dir", run / name]
            execute(command, run / f"{name}.log")

        return [
            trained,
            *(
                Stage(
                    f"reference/{name}",
                    run / name / "scores.json",
                    functools.partial(score, name, step),
                    after=[trained],
                    settings=[step],
                    cost=size.steps / 2,
                )
                for name, step in (("early", early), ("late", size.steps))
            ),
        ]

    def _trunk(self, noise: int, trunk: int, *data: Stage) -> Stage:
        size, run = self.size, self._folder(noise, trunk) / "trunk"

        def train() -> None:
            end = ["--exit-interval", str(size.trunk_steps)]
            self._train(run, [*self._training(run, noise, trunk), *end])

        return Stage(
            f"noise-{noise}/trunk-{trunk}",
            run / "done",
            train,
            depends=PROGRAM,
            after=data,
            settings=self._settings,
            cost=size.trunk_steps,
        )

    def _branch(self, noise: int, trunk: int, arm: Arm, after: Sequence[Stage]) -> Stage:
        run = self._folder(noise, trunk) / arm.name
        return Stage(
            f"noise-{noise}/trunk-{trunk}/{arm.name}",
            run / "done",
            lambda: self._train(run, self._branch_flags(run, noise, trunk, arm)),
            after=after,
            settings=[arm, *self._settings],
            cost=self.size.branch_steps,
        )

    def _branch_flags(self, run: Path, noise: int, trunk: int, arm: Arm) -> list[str]:
        size, reference = self.size, self.out / "reference"
        values = {
            "reference": reference / "ckpt",
            "early": reference / "early",
            "late": reference / "late",
            "quarter": size.batch // 4,
            "until": size.steps - size.branch_steps // 4,
            "interval": max(2, size.branch_steps // 10),
        }
        blend = None
        if arm.shares_of is not None:
            blend = weight_shares(self._folder(noise, trunk) / arm.shares_of)
        seed = trunk + 1000 * arm.order
        return [
            *self._training(run, noise, seed, arm.rate, blend),
            *["--load", str(self._folder(noise, trunk) / "trunk" / "ckpt")],
            *["--override-opt-param-scheduler", "--exit-on-missing-checkpoint"],
            *arm.flags.format(**values).split(),
        ]

    def _evaluate(self, noise: int, trunk: int, branches: Sequence[Stage]) -> Stage:
        size, folder = self.size, self._folder(noise, trunk)
        done = folder / "evaluated"

        def evaluate() -> None:
            runs = [branch.output.parent for branch in branches]
            command: list[object] = [
                sys.executable,
                "-m",
                "examples.study.evaluate",
                "--device",
                size.device,
            ]
            command += ["--data", self.out / "data" / "valid", "--rows", size.eval_rows]
            execute(
                [
                    *command,
                    "--items",
                    size.eval_items,
                    "--vocab-size",
                    size.vocab_size,
                    "--runs",
                    *runs,
                ],
                folder / "eval.log",
            )
            done.touch()

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
            for arm in arms:
                name = BASELINE if arm.order else arm.name
                command.append(f"{name}={self.out}/noise-{noise}/trunk-*/{arm.name}")
            execute(command, page.with_suffix(".txt"))

        return Stage(
            f"report noise-{noise}",
            page.with_suffix(".html"),
            report,
            depends=[*sorted((ROOT / "megatron_rw" / "comparison").rglob("*.py"))],
            after=evaluated,
            settings=[arms],
        )

    @property
    def _settings(self) -> list[object]:
        """What every run depends on; with more trunks or arms, those that are there stay."""
        size = self.size
        steps = (size.trunk_steps, size.branch_steps, size.eval_iters)
        return [size.model, size.batch, size.rate, *steps, max(size.noise), size.device]

    def _folder(self, noise: int, trunk: int) -> Path:
        return self.out / f"noise-{noise}" / f"trunk-{trunk}"

    def _train(self, run: Path, flags: Sequence[str]) -> None:
        """Runs the program into an empty folder."""
        shutil.rmtree(run, ignore_errors=True)
        run.mkdir(parents=True)
        command = [sys.executable, str(ROOT / "pretrain_gpt_rw.py"), *flags]
        (run / "command.txt").write_text(shlex.join(command) + "\n")
        execute(command, run / "train.log")
        (run / "done").touch()

    def _training(
        self,
        run: Path,
        noise: int,
        seed: int,
        rate: float = 1.0,
        blend: dict[str, float] | None = None,
    ) -> list[str]:
        """The program's flags of a run, but for where it begins and its arm."""
        size, data = self.size, self.out / "data"
        length = size.model.split("--seq-length ")[1].split()[0]
        noise_in_validation = max(size.noise)
        return [
            *["--device", size.device, *size.model.split(), "--max-position-embeddings", length],
            *["--micro-batch-size", str(size.batch), "--global-batch-size", str(size.batch)],
            *["--lr", str(size.rate * rate), "--min-lr", str(size.rate * rate / 10)],
            *["--lr-decay-style", "WSD", "--lr-wsd-decay-iters", str(size.branch_steps)],
            *["--train-iters", str(size.steps), "--seed", str(seed)],
            *["--train-data-path", *self._blend("train", noise, blend)],
            *["--valid-data-path", *self._blend("valid", noise_in_validation)],
            *["--data-cache-path", str(data / "cache")],
            *["--tokenizer-type", "SentencePieceTokenizer"],
            *["--tokenizer-model", str(self.out / "tokenizer" / "bpe.model")],
            *["--eval-interval", str(max(1, size.branch_steps // 4))],
            *["--eval-iters", str(size.eval_iters)],
            *["--log-interval", str(max(1, size.branch_steps // 20))],
            *["--log-dir", str(run), "--save", str(run / "ckpt")],
            *["--save-interval", str(size.steps)],
        ]

    def _blend(self, split: str, noise: int, shares: dict[str, float] | None = None) -> list[str]:
        """Shares and prefixes for Megatron: the noise's kinds alike, the other domains alike."""
        folder = self.out / "data" / split
        domains = json.loads((folder / "domains.json").read_text())["domains"]
        noisy = [name for name in domains if name.startswith("noise")]
        words = []
        for name, domain in domains.items():
            of_noise = noise / 100 / len(noisy) if noisy else 0.0
            share = (
                of_noise
                if name in noisy
                else (1 - of_noise * len(noisy)) / (len(domains) - len(noisy))
            )
            share = share if shares is None else shares.get(name, 0.0)
            if share > 0:
                words += [f"{share:.6f}", str(folder / domain["prefix"])]
        return words


def weight_shares(run: Path) -> dict[str, float]:
    """A run's average share of weight by domain, from its `metrics.jsonl`."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    steps = [record["reweight"]["domains"] for record in map(json.loads, lines)
             if record["type"] == "train"]  # fmt: skip
    names = {name for step in steps for name in step}
    return {
        name: sum(step.get(name, {}).get("weight_share") or 0.0 for step in steps) / len(steps)
        for name in sorted(names)
    }


if __name__ == "__main__":
    sys.exit(main())
