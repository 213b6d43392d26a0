"""Runs a case: the real program with one thing wrong."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from tests.corpus import flags_of, write_corpus
from tests.program import Run, run_program
from tests.refusals.spoil import SPOILERS, Place
from tests.refusals.table import Case

STEPS = "--train-iters 4 --micro-batch-size 8".split()
SAVE = "--save-interval 2 --verify-integrity --save".split()
# On one rank these would be refused for the number of ranks.
ON_TWO_RANKS = ("world size on two ranks", "no context parallelism", "no sequence parallelism")


class Ground:
    """What the cases spoil: a corpus, and a run on it that left checkpoints."""

    def __init__(self, folder: Path) -> None:
        self._used, self._good = folder / "used", folder / "good"
        self.place = Place(self._used / "data", self._used / "checkpoints", self._used / "empty")
        self.place.empty.mkdir(parents=True)
        write_corpus(self.place.data)
        save = (*SAVE, str(self.place.checkpoints))
        run_program(folder / "run", *flags_of(self.place.data), *STEPS, *save).check()
        self._used.rename(self._good)

    def run(self, case: Case, directory: Path) -> Run:
        """Runs the case. Everything is whole before, and has the paths that checkpoints name."""
        shutil.rmtree(self._used, ignore_errors=True)
        shutil.copytree(self._good, self._used)
        if case.what in SPOILERS:
            SPOILERS[case.what](self.place)
        flags = [*flags_of(self.place.data), *STEPS, *map(self._filled, case.flags)]
        return run_program(
            directory,
            *flags,
            processes=2 if case.what in ON_TWO_RANKS else 1,
            metrics=False,
            environment=case.environment,
        )

    def message(self, run: Run) -> str:
        """Returns the one error of rank 0, with names for the folders."""
        lines = [line for line in run.output[0].splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, run.all_output
        message = lines[0].removeprefix("error: ")
        for name, path in vars(self.place).items():
            message = message.replace(str(path), name.upper())
        return message

    def _filled(self, word: str) -> str:
        folders = {name.upper(): str(path) for name, path in vars(self.place).items()}
        return re.sub(r"\b(DATA|CHECKPOINTS|EMPTY)\b", lambda match: folders[match[0]], word)
