"""Plant mistakes that others have made, or that are easily made, and see that a test fails.

    make mutants            # or: python tests/mutants.py [PART OF A MISTAKE]

Each mutant replaces a function or a property of the method while the program runs, in the process
of the tests and in every rank. It names the test that ought to notice it, which must pass without
the mutant and fail with it. Exit status 1 if a mutant survives, or if what it replaces is gone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
VARIABLE = "MUTANT"
STATE = "tests/integrations/test_state.py::"


@dataclass(frozen=True)
class Mutant:
    """A mistake: the test that notices it, and what is changed in `module` or `module:Class`."""

    test: str
    owner: str
    name: str
    change: Callable[[Any], Any]

    def plant(self) -> None:
        """Replaces the name, which must exist."""
        module, _, class_name = self.owner.partition(":")
        owner = __import__(f"megatron_rw.{module}", fromlist=["_"])
        owner = getattr(owner, class_name) if class_name else owner
        original = vars(owner)[self.name]
        if isinstance(original, property):
            setattr(owner, self.name, property(self.change(original.fget)))
        else:
            setattr(owner, self.name, self.change(original))


def cell(layout: str) -> str:
    """A row of the exactness table."""
    test = "test_gradient_is_the_single_process_oracles"
    return f"tests/exactness/test_exactness.py::{test}[{layout}]"


def result(change: Callable[..., Any]) -> Callable[[Any], Any]:
    """A function whose result is changed; `change` gets the result and the arguments."""

    def around(original: Any) -> Any:
        @functools.wraps(original)
        def changed(*args: Any, **kwargs: Any) -> Any:
            return change(original(*args, **kwargs), *args, **kwargs)

        return changed

    return around


def instead(replacement: Any) -> Callable[[Any], Any]:
    """Something else altogether."""
    return lambda original: replacement


def without_decay(_: None, self: Any, *args: Any, **named: Any) -> None:
    self.config = dataclasses.replace(self.config, moment_decay=0.0)


def emptied(factor: Any, self: Any) -> Any:
    # The step has no active unit.
    if not float(sum(row.tokens.sum() for row in self._rows)):
        self.plan = type(self).plan
    return factor


def without_divisor(_: Any, self: Any, model: Any) -> Any:
    self._keeps_token_divisor = False
    return self._reweighter


def unclamped(signals: Any, low: Any, high: Any, delta: float) -> Any:
    spread = high - low
    return (2 * delta * (signals - low) / spread - delta).masked_fill(~(spread >= 1e-6), 0.0)


def attached(make: Any) -> Any:
    def sums(batch: Any, unit: Any, ranks: Any) -> Any:
        made = make.__func__(batch, unit, ranks)
        return dataclasses.replace(made, loss_sum=batch.sequence_sums().loss_sum)

    for name in ("weigh_units", "begin_set"):
        for module in ("reweighting.sets", "reweighting.scopes"):
            with contextlib.suppress(KeyError):
                Mutant("", module, name, lambda function: function.__wrapped__).plant()
    return staticmethod(sums)


def alone(gather: Any) -> Any:
    return lambda self, ranks: gather(self, dataclasses.replace(ranks, group=None))


def first_rows(end: Any, *_: Any) -> Any:
    found = end()
    own = found.units.local.stop - found.units.local.start
    units = dataclasses.replace(found.units, local=slice(0, own))
    return lambda: dataclasses.replace(found, units=units)


def spreading(batch: Any, config: Any, weights: Any, tokens: Any) -> Any:
    return (batch.sequence_sums().loss_sum * weights / tokens.clamp(min=1.0)).sum()


def choice(layout: str) -> str:
    """A row of the table of the choices beyond the paper."""
    test = "test_gradient_of_every_choice_is_the_oracles"
    return f"tests/exactness/test_choices.py::{test}[{layout}]"


def without_base(units: Any, *_: Any) -> Any:
    return dataclasses.replace(units, base=None)


def counted_twice(copies: int, *_: Any) -> int:
    return 1


def half_signal(made: Any, *_: Any) -> Any:
    if made.signal_sum is None:
        return made
    return dataclasses.replace(made, signal_tokens=made.tokens)


def static(change: Callable[..., Any]) -> Callable[[Any], Any]:
    """As `result`, of a static method."""
    return lambda method: staticmethod(result(change)(method.__func__))


def moved(_: None, self: Any, *args: Any, **named: Any) -> None:
    self._used = self._used * 1.01


STEP = "integrations.step:StepReweighting"
DEFERRED = "reweighting.scopes:DeferredReweighter"
SUMS = "reweighting.units:UnitSums"
GLOBAL = "reweighting.scopes:GlobalReweighter"
ONE = cell("one process")

MUTANTS = {
    "weights taken by local rank, as if every node were the first": Mutant(
        cell("DP2"), "reweighting.scopes", "begin_set", result(first_rows)
    ),
    "each rank weighs its own samples alone": Mutant(
        cell("DP2"), "reweighting.units:UnitSums", "begin_gather", alone
    ),
    "mean over data-parallel ranks for a sum": Mutant(
        cell("DP2"), "reweighting.units:ReduceGroup", "size", instead(lambda self: self.cp_size)
    ),
    "context-parallel factor forgotten": Mutant(
        cell("CP2"), "reweighting.units:ReduceGroup", "size", instead(lambda self: self.dp_size)
    ),
    "deferred: sample losses of the own shard": Mutant(
        cell("CP2"), SUMS, "over_shards", instead(lambda self, ranks: self)
    ),
    "deferred: normaliser applied twice": Mutant(
        ONE, DEFERRED, "finish", result(lambda factor, self: factor**2)
    ),
    "deferred: normaliser forgotten on other pipeline stages": Mutant(
        cell("PP2"), "integrations.groups", "share_with_pipeline", instead(lambda values: None)
    ),
    "deferred: auxiliary losses scaled by the normaliser": Mutant(
        "tests/refusals/test_refusals.py::test_refusal[auxiliary loss scaled with the gradients]",
        *("integrations.groups", "other_losses", instead(lambda config: [])),
    ),
    "deferred: decay of the moments ignored": Mutant(ONE, DEFERRED, "begin", result(without_decay)),
    "deferred: an empty step forgets the moments": Mutant(ONE, DEFERRED, "finish", result(emptied)),
    "deferred: losses beyond the old range not clamped": Mutant(
        choice("one process"), "kernels.torch_weights", "normalise", instead(unclamped)
    ),
    "deferred: moments not in the checkpoint": Mutant(
        f"{STATE}test_state_is_saved_with_the_arguments",
        *("integrations.state:ReweightState", "record"),
        result(lambda record, self: record | {"moments": None}),
    ),
    "warm-up counted from the start of the run": Mutant(
        f"{STATE}test_steps_count_from_the_first_training_step",
        *("integrations.state:ReweightState", "step", instead(lambda self, iteration: iteration)),
    ),
    "weights not detached": Mutant(ONE, "reweighting.units:UnitSums", "of", attached),
    "moments from samples without an active token": Mutant(
        ONE,
        *("reweighting.units:UnitSet", "has_tokens", instead(lambda self: self.tokens >= 0)),
    ),
    "Megatron divides by the micro-batch's tokens": Mutant(
        *(ONE, STEP, "weigh"),
        result(lambda pair, self, batch: (pair[0], batch.mask.sum().int())),
    ),
    "other losses divided by ranks instead of tokens": Mutant(
        "tests/exactness/test_other_losses.py::test_other_losses_keep_their_gradient[per-token]",
        *(STEP, "_build", result(without_divisor)),
    ),
    "global: mean over micro-batches for a sum": Mutant(
        ONE,
        *(GLOBAL, "weigh"),
        result(lambda loss, self, *_: loss / self._num_microbatches),
    ),
    "global: micro-batches get each other's weights": Mutant(
        *(ONE, "reweighting.scopes", "_joined"),
        lambda joined: lambda rows: joined(rows[::-1]),
    ),
    "global: scoring moves the random state": Mutant(
        "tests/exactness/test_scoring.py::test_scoring_sees_the_training_passs_dropout[one]",
        *("integrations.schedule", "_fork_rng", instead(contextlib.nullcontext)),
    ),
    "a sample of weight 0 spreads its NaN": Mutant(
        "tests/reweighting/test_reweighter.py::test_nonfinite_sample_never_spreads",
        *("reweighting.scopes", "_weighted_sum"),
        instead(spreading),
    ),
    "linupper without its upper limit": Mutant(
        "tests/reweighting/test_weights.py::test_weights_are_the_oracles",
        *("kernels.torch_weights", "strategy_scores"),
        instead(lambda u, weighting: u + weighting.delta),
    ),
    "normaliser and static weights forgotten": Mutant(
        choice("one process"),
        "reweighting.units:UnitSet",
        "of",
        lambda of: staticmethod(result(without_base)(of.__func__)),
    ),
    "documents of context-parallel ranks counted twice": Mutant(
        choice("CP2"), "reweighting.sets", "copies_of", result(counted_twice)
    ),
    "missing signals counted as 0 in a unit's mean": Mutant(
        choice("one process"), SUMS, "of", static(half_signal)
    ),
    "documents not summed over context parallelism": Mutant(
        choice("CP2"), SUMS, "over_shards", instead(lambda self, ranks: self)
    ),
    "each rank goes by the range of its own tokens": Mutant(
        choice("DP2 distopt"),
        *("reweighting.sets", "_common_plan"),
        lambda plan: (
            lambda s, b, a, _, *rest: plan(
                s, b, a, (s[a] * s.new_tensor([[-1], [1]])).amax(dim=1), *rest
            )
        ),
    ),
    "softmax: deferred without its lowest temperature": Mutant(
        choice("one process"), "kernels.torch_weights", "LARGEST_EXPONENT", instead(1e9)
    ),
    "topk: the threshold itself is dropped": Mutant(
        choice("one process"),
        *("kernels.torch_weights", "smallest_with_share"),
        result(lambda found, *_: [each - 1e-3 for each in found]),
    ),
    "cap: another level": Mutant(
        choice("one process"),
        "kernels.torch_weights",
        "_cap_for",
        result(lambda cap, *_: cap * 0.9),
    ),
    "target ESS: another temperature": Mutant(
        choice("one process"),
        "kernels.torch_weights",
        "_temperature_for",
        result(lambda r, *_: r * 1.001),
    ),
    "deferred: another plan than the step before left": Mutant(
        choice("one process"),
        DEFERRED,
        "begin",
        result(moved),
    ),
    "controls: the same chance in every step": Mutant(
        "tests/reweighting/test_scopes.py::test_chance_follows_seed_and_step",
        *("reweighting.scopes:Reweighter", "_chance"),
        lambda chance: lambda self, *a: chance(SimpleNamespace(**vars(self) | {"_step": 0}), *a),
    ),
    "cross-entropy: sums of the samples without their mask": Mutant(
        "tests/kernels/test_cross_entropy.py"
        "::test_sums_of_the_samples_and_their_gradient[in place-torch-plain]",
        *("kernels.torch_backend", "sample_sums"),
        lambda sums: lambda losses, mask: sums(losses, mask**0),
    ),
}


def pytest_configure() -> None:
    """Plants the mutant that the environment names, also when `tests.preload` calls it."""
    if VARIABLE in os.environ:
        MUTANTS[os.environ[VARIABLE]].plant()


def run_tests(tests: list[str], **environment: str) -> int:
    """Pytest's exit status: 0 if they pass, 1 if one fails, more if there is no telling."""
    command = [sys.executable, "-m", "pytest", "-qx", "-p", "no:cacheprovider"]
    command += ["-p", "tests.mutants", *tests]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True).returncode


def main() -> int:
    """Runs all mutants, or those whose mistake contains the first argument."""
    chosen = [mistake for mistake in MUTANTS if "".join(sys.argv[1:]) in mistake]
    if run_tests(sorted({MUTANTS[mistake].test for mistake in chosen})):
        sys.exit("error: the tests fail without any mutant; run make test")
    survived = 0
    for mistake in chosen:
        start = time.perf_counter()
        status = run_tests([MUTANTS[mistake].test], **{VARIABLE: mistake})
        if status not in (0, 1):
            sys.exit(f"error: {mistake}: what it replaces is gone")
        survived += status == 0
        verdict = "caught" if status else "SURVIVED"
        print(f"{verdict:8} {time.perf_counter() - start:4.0f} s  {mistake}", flush=True)
    print(f"{len(chosen) - survived} of {len(chosen)} mutants caught")
    return min(survived, 1)


if __name__ == "__main__":
    sys.exit(main())
