"""Every foreign name that a run replaces stands in the table of patches, and is as it was there."""

from __future__ import annotations

import inspect
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from megatron_rw import patching
from megatron_rw.patching import Around, Patch
from tests.program import run_program

SIGNATURES = Path(__file__).with_name("patched_signatures.txt")


class Owner:
    def method(self, a: int, b: int = 2) -> tuple[int, int]:
        return a, b

    @staticmethod
    def static(a: int) -> int:
        return a


def signature(patch: Patch) -> str:
    """A line on what a patch replaces; the kind alone where that has no signature."""
    original = inspect.getattr_static(patch.owner, patch.name)
    function = getattr(original, "__func__", original)
    # The CPU platform wraps one.
    function = getattr(function, "func", function)
    if not inspect.isfunction(function):
        return f"{patch.target}: {type(original).__name__}"
    # Without types and values, some of which are printed with an address.
    parameters = [
        f"{'*' if each.kind is each.KEYWORD_ONLY else ''}{each.name}"
        + ("" if each.default is each.empty else "=")
        for each in inspect.signature(function).parameters.values()
    ]
    return f"{patch.target}({', '.join(parameters)})"


def test_around_sees_the_arguments_and_may_change_them() -> None:
    def run(proceed: Any, call: dict[str, Any]) -> Any:
        assert call["a"] == 1
        assert call["b"] == 2
        return proceed(), proceed(b=5)

    with patching.applied([Patch(Owner, "method", Around(run), "a test")]):
        assert Owner().method(1) == ((1, 2), (1, 5))
    assert Owner().method(1) == (1, 2)


def test_a_static_method_stays_one() -> None:
    double = Around(lambda proceed, call: 2 * proceed())
    with patching.applied([Patch(Owner, "static", double, "a test")]):
        assert Owner.static(3) == Owner().static(3) == 6
    assert Owner().static(3) == 3


def test_applied_once_and_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patching, "_applied", [])
    increment = Around(lambda proceed, call: 1 + proceed())
    patch = Patch(Owner, "static", increment, "a test")
    patching.apply([patch])
    patching.apply([patch])
    assert Owner.static(3) == 4
    patching.undo()
    assert Owner.static(3) == 3


def test_a_name_that_is_gone_is_an_error() -> None:
    with pytest.raises(AttributeError), patching.applied([Patch(Owner, "gone", 1, "a test")]):
        pass


def table() -> list[Patch]:
    """All patches that any run may apply."""
    from megatron_rw.integrations import schedule
    from megatron_rw.integrations.logit_scale import LogitScale
    from megatron_rw.integrations.state import ReweightState
    from megatron_rw.resilience.saving import CheckpointConfig, SaveGuard
    from megatron_rw.resilience.step_guard import NonFiniteConfig, StepGuard
    from megatron_rw.resilience.step_samples import StepSamples
    from megatron_rw.reweighting import ReweightConfig
    from megatron_rw.training.loop import TrainingLoop
    from megatron_rw.training.patches import early_patches, patches
    from megatron_rw.training.reference import SecondModel
    from megatron_rw.training.settings import KernelConfig, Settings

    args = Namespace()
    settings = Settings(
        megatron=args,
        device="cpu",
        kernels=KernelConfig(cross_entropy_impl="fused"),
        reweight=ReweightConfig(strategy="linupper", signal="progress", snapshot_interval=1),
    )
    return [
        *early_patches(),
        *patches(
            settings,
            TrainingLoop(args, []),
            ReweightState(ReweightConfig()),
            StepGuard(NonFiniteConfig(), StepSamples([]), False),
            SaveGuard("folder", CheckpointConfig(), True, print),
            SecondModel(settings, []),
            LogitScale(),
        ),
        *schedule.forward_only_patches(),
    ]


def test_originals_are_those_that_the_patches_were_written_for() -> None:
    """What an upgrade of Megatron meets first. The entry says what the original has to do."""
    now = sorted({signature(patch) for patch in table()})
    assert now == SIGNATURES.read_text().splitlines()


def test_every_patch_says_why() -> None:
    assert all(len(patch.why) > 20 for patch in table())


def test_nothing_is_replaced_outside_the_table(tmp_path: Path, data_flags: list[str]) -> None:
    """A run that uses all that replaces something; `tests.training.watched` prints what it saw."""
    flags = (
        "--train-iters 2 --micro-batch-size 4 --global-batch-size 8 --save-interval 1 "
        "--reweight-strategy linupper --reweight-scope global --cross-entropy-impl fused "
        "--on-nonfinite skip-step --exit-signal-handler --async-save --async-strategy mcore "
        "--use-persistent-ckpt-worker --loss-spike-factor 3"
    ).split()
    run = run_program(
        tmp_path,
        *data_flags,
        *flags,
        *("--save", str(tmp_path / "checkpoints"), "--log-dir", str(tmp_path)),
        processes=2,
        module="tests.training.watched",
    ).check()
    seen = {line.split()[1] for line in run.output[0].splitlines() if line.startswith("replaced ")}
    known = {patch.target for patch in table()}
    assert seen <= known, sorted(seen - known)
    # It sees what it should.
    assert "megatron.training.training.train_step" in seen
    assert len(seen) > 25
