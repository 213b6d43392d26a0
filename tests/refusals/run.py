"""Run a case: the real program with one thing wrong."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.corpus import flags_of, write_corpus
from tests.program import Run, run_program
from tests.refusals.cases import STEPS, Case, Place

SAVE = ("--save-interval", "2", "--verify-integrity")


class Ground:
    """What the cases spoil: a corpus, and a run on it that left checkpoints.

    Args:
        folder: for all of it.
    """

    def __init__(self, folder: Path) -> None:
        self._used, self._good = folder / "used", folder / "good"
        self.place = Place(self._used / "data", self._used / "checkpoints", self._used / "empty")
        self.place.empty.mkdir(parents=True)
        write_corpus(self.place.data)
        save = (*SAVE, "--save", str(self.place.checkpoints))
        run_program(folder / "run", *flags_of(self.place.data), *STEPS, *save).check()
        self._used.rename(self._good)

    def run(self, case: Case, directory: Path) -> Run:
        """Run the case. Everything is whole before, and has the paths that the checkpoints name.

        Args:
            case: what is wrong.
            directory: for the output.
        """
        shutil.rmtree(self._used, ignore_errors=True)
        shutil.copytree(self._good, self._used)
        if case.spoil is not None:
            case.spoil(self.place)
        flags = [*flags_of(self.place.data), *STEPS, *self.place.filled(case.flags).split()]
        return run_program(
            directory, *flags, processes=case.processes, metrics=False, environment=case.environment
        )

    def message(self, run: Run) -> str:
        """The one error of rank 0, with names for the folders.

        Raises:
            AssertionError: there is none, or more.
        """
        lines = [line for line in run.output[0].splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, run.all_output
        return self.place.stripped(lines[0].removeprefix("error: "))
