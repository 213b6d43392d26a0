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
        self._iterations = iterations
        assert [record["iteration"] for record in self.records] == list(range(1, iterations + 1))

    def compared(self, run: Run) -> tuple[str, int]:
        """Compares every iteration of every attempt of a run, and its final checkpoint.

        Returns:
            What is wrong with it, or nothing, and how many iterations were done again.
        """
        seen: set[int] = set()
        again = 0
        for record in run.train_metrics():
            iteration = record["iteration"]
            if without_time(record) != self.records[iteration - 1]:
                return f"WRONG: iteration {iteration} is not that of the undisturbed run", again
            again += iteration in seen
            seen.add(iteration)
        if len(seen) != self._iterations:
            return f"LOST: iterations {sorted(seen)} were logged", again
        for name, tensor in run.checkpoint(self._iterations).items():
            if not torch.equal(tensor, self._parameters[name]):
                return f"WRONG: {name} of the final checkpoint", again
        return "", again
