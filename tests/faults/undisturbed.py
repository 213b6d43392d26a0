"""What a run that was disturbed is compared with, bit for bit."""

from __future__ import annotations

import torch

from tests.program import Run, without_time


class Undisturbed:
    """The losses and the parameters of a run that nobody disturbed."""

    def __init__(self, run: Run, iterations: int) -> None:
        self.run = run
        self.records = [without_time(record) for record in run.train_metrics()]
        self._parameters = run.checkpoint(iterations)
        assert [record["iteration"] for record in self.records] == list(range(1, iterations + 1))

    def compared(self, run: Run) -> tuple[str, int]:
        """Compares every iteration of every attempt of a run, and its final checkpoint.

        Returns:
            What is wrong with it, or nothing, and how many iterations were done again.
        """
        records = [without_time(record) for record in run.train_metrics()]
        for record in records:
            if record != self.records[record["iteration"] - 1]:
                return f"WRONG: iteration {record['iteration']} is not the undisturbed run's", 0
        seen = {record["iteration"] for record in records}
        if len(seen) != len(self.records):
            return f"LOST: iterations {sorted(seen)} were logged", 0
        for name, tensor in run.checkpoint(len(seen)).items():
            if not torch.equal(tensor, self._parameters[name]):
                return f"WRONG: {name} of the final checkpoint", 0
        return "", len(records) - len(seen)
