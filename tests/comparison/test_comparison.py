"""Pairs, the band of chance, what is measured, and what cannot be compared."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest

from megatron_rw.comparison.pairing import load_arms
from megatron_rw.comparison.results import Comparison, compare
from megatron_rw.comparison.runs import load_run
from megatron_rw.comparison.settings import Settings
from megatron_rw.errors import UserError
from tests.comparison.study import (
    DEFAULT,
    edit_arguments,
    edit_lines,
    evaluate,
    flat,
    write_run,
    write_study,
)

BOTH = ("none=none*", "b=b*")


def compared(*paths: str, **settings: Any) -> Comparison:
    return compare(load_arms(paths), Settings(**settings))


@pytest.fixture(autouse=True)
def _inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(name: str, above: float, seed: int = 1, trunk: str | None = None, **more: Any) -> Path:
    curve = flat(DEFAULT, 100, 200, 300, above=above)
    strategy = "none" if Path(name).name.startswith("none") else "linupper"
    return write_run(Path(name), curve, strategy, seed, load=trunk, **more)


def test_pairs_and_the_band_of_chance_by_hand() -> None:
    for trunk, level in (("t0", 0.0), ("t1", 0.5)):
        run(f"none {trunk}", level, 7, trunk)
        run(f"b {trunk}", level + (0.01 if trunk == "t0" else 0.03), 7, trunk)
    for seed, above in ((5, 0.003), (9, -0.004)):
        run(f"none chance {seed}", above, seed, "t0")
    run("b alone", 9.0, 7, "t2")
    found = compared(*BOTH)
    (arm,) = found.arms
    loss = arm.summary.loss
    assert (loss.n, found.unit, found.chance.pairs) == (2, "trunk", 2)
    assert loss.mean == pytest.approx(0.02)
    # s_AA = sqrt((0.003² + 0.004²) / 2), both of one trunk, and t(0.975, 1) = 12.7062
    assert found.chance.sd == pytest.approx(math.sqrt(12.5e-6))
    assert arm.band == pytest.approx(12.7062 * math.sqrt(12.5e-6) / math.sqrt(2), rel=1e-5)
    assert found.warnings == ("b alone: left out, as it has no partner",)


def test_seeds_of_a_trunk_are_one_observation() -> None:
    for seed, above in ((1, 0.01), (2, 0.03)):
        run(f"none {seed}", 0.0, seed, "t")
        run(f"b {seed}", above, seed, "t")
    run("none u", 0.0, 1, "u")
    run("b u", 0.1, 1, "u")
    loss = compared(*BOTH).arms[0].summary.loss
    assert (loss.n, loss.mean) == (2, pytest.approx((0.02 + 0.1) / 2))


def test_a_run_that_resumed_from_itself_has_no_trunk() -> None:
    for seed in (1, 2):
        run(f"none {seed}", 0.0, seed, f"none {seed}/ckpt")
        run(f"b {seed}", 0.01, seed, f"b {seed}/./ckpt")
    found = compared(*BOTH)
    assert (found.unit, found.arms[0].summary.loss.n, found.chance.sd) == ("seed", 2, None)
    assert not found.warnings


def test_steps_of_a_trunk_are_different_trunks() -> None:
    for name in ("none", "b"):
        for step in (100, 200):
            run(f"{name} {step}", 0.0, 1, "t", ckpt_step=step)
    assert [pair.unit for pair in compared(*BOTH).arms[0].summary.pairs] == ["t@100", "t@200"]


def test_identical_runs_are_equivalent() -> None:
    for seed in (1, 2, 3):
        run(f"none {seed}", 0.1 * seed, seed)
        run(f"b {seed}", 0.1 * seed, seed)
    evaluate(*Path().iterdir())
    (arm,) = compared(*BOTH).arms
    assert (arm.outcome, arm.p_value) == ("equivalent (identical)", 1.0)
    assert (arm.smallest_found, arm.summary.tokens_to_baseline) == (0.0, 1.0)


def test_one_run_each_tells_nothing() -> None:
    run("none", 0.0)
    run("b", -1.0)
    found = compared(*BOTH)
    assert found.headline == (
        "1 arm against none, one run each: this cannot tell better from luck."
    )
    assert found.arms[0].summary.loss.low is None


def test_the_headline_names_what_is_better_and_worse() -> None:
    write_study(Path("study"), {"none": 0.0, "good": -0.05, "bad": 0.05, "same": 0.0}, trunks=12)
    arms = [f"{name}=study/*/{name}*" for name in ("none", "good", "bad", "same")]
    text = compared(*arms, margin=0.01).headline
    assert text == (
        "Of 3 arms against none over 12 trunks, 1 is better (good −0.051), "
        "1 is worse (bad +0.050), 1 is equivalent."
    )


def test_tokens_until_the_baselines_end_is_reached() -> None:
    # 100, 200, 300 steps: the baseline ends at 4.0 after 300; b is at 4.05 and then at 3.95.
    ends = {"none": (4.2, 4.1, 4.0), "b": (4.15, 4.05, 3.95), "c": (4.2, 4.1, 4.01)}
    for name, losses in ends.items():
        curve = {100 * i: {"only": loss} for i, loss in enumerate(losses, start=1)}
        write_run(Path(name), curve, "none" if name == "none" else "linupper")
    # Validations are each of another text, so that they cannot tell.
    assert compared("none=none", "b=b").arms[0].summary.reached == 0
    evaluate(*Path().iterdir())
    b, c = compared("none=none", "b=b", "c=c").arms
    assert b.summary.tokens_to_baseline == pytest.approx(250 / 300)
    assert (c.summary.tokens_to_baseline, c.summary.reached) == (None, 0)
    assert list(b.summary.curve) == [1600, 3200, 4800]  # steps of 2 samples of 8 tokens


def test_tokens_are_a_mean_only_if_all_pairs_get_there() -> None:
    for seed, above in ((1, -0.05), (2, 0.05)):
        run(f"none {seed}", 0.0, seed)
        run(f"b {seed}", above, seed)
    evaluate(*Path().iterdir())
    summary = compared(*BOTH).arms[0].summary
    assert (summary.tokens_to_baseline, summary.reached) == (None, 1)
    assert summary.pairs[0].tokens_to_baseline == pytest.approx(250 / 300)


def test_what_is_measured() -> None:
    losses = {"code": 3.0, "prose": 5.0, "noise-a": 7.0, "noise-b": 9.0}
    write_run(Path("none"), {10: losses}, extra={"copy_loss": 0.25, "progress": None, "ok": True})
    write_run(Path("b"), {10: losses}, "linupper", extra={"copy_loss": 0.5})
    (arm,) = compared(*BOTH).arms
    (pair,) = arm.summary.pairs
    assert pair.baseline_measures == {
        "loss": 4.0,
        "worst domain": 5.0,
        "noise": 8.0,
        **{f"loss of {name}": loss for name, loss in losses.items()},
        "lm_loss": 6.0,
        "copy_loss": 0.25,
    }
    assert arm.summary.differences["copy_loss"].mean == 0.25
    assert arm.summary.values["ess"] == pytest.approx(0.9)
    assert arm.summary.weight_ratios == dict.fromkeys(sorted(losses), pytest.approx(1.1))
    (all_clean,) = compared(*BOTH, noise_domains="").arms
    assert all_clean.summary.values["loss"] == 6.0


def test_the_later_line_of_an_iteration_counts() -> None:
    folder = write_run(Path("none"), flat(DEFAULT, 100, 200))
    lines = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(lines + lines.replace("4.5", "4.75"))
    assert load_run(folder).validations[0].domains["prose"] == 4.75


def test_evaluations_count_if_every_run_has_one() -> None:
    for name, seed in (("none 1", 1), ("none 2", 2), ("b 1", 1), ("b 2", 2)):
        folder = run(name, 0.0, seed)
        record = '{"type": "evaluation", "iteration": 300, "lm_loss": %s, "domains": {}}\n'
        (folder / "evaluation.jsonl").write_text(record % 9.0 + record % (1.0 + ("b" in name)))
    assert compared(*BOTH).arms[0].summary.loss.mean == 1.0
    cut = Path("b 2/metrics.jsonl").read_text().splitlines()[:4]
    Path("b 2/metrics.jsonl").write_text("\n".join(cut))
    assert compared(*BOTH).warnings == (
        "b: differs in more than the arm: last logged iteration 200 instead of 300",
    )
    Path("b 2/metrics.jsonl").write_text(Path("b 1/metrics.jsonl").read_text())
    Path("b 2/evaluation.jsonl").unlink()
    found = compared(*BOTH)
    assert found.arms[0].summary.loss.mean == 0.0
    assert found.warnings == ("3 of 4 runs have an evaluation; the last validations are compared",)
    edit_lines(Path("b 1"), '"validation"', '"other"')
    with pytest.raises(UserError, match="b 1: has an evaluation alone, and others have none"):
        compared(*BOTH)


def test_arms_are_named_by_their_settings() -> None:
    run("runs/none", 0.0)
    run("runs/x", 0.0, reweight_temperature=0.4)
    run("runs/y", 0.0)
    assert list(load_arms(["runs/*"])) == ["none", "linupper, temperature 0.4", "linupper"]


def test_folders_may_have_an_equals_sign() -> None:
    run("runs/lr=1/none", 0.0)
    run("lr=2", 0.0)
    given = ["a=runs/lr=1/none", "runs/lr=*/none", "lr=2"]
    assert list(load_arms(given)) == ["a", "none", "linupper"]


@pytest.mark.parametrize(
    ("name", "value", "comparable"),
    [
        ("lr", 0.006, True),
        ("train_data_path", ["other"], True),
        ("data_path", ["a long path"] * 20, True),
        ("tokenizer_model", "b.model", False),
        ("valid_data_path", ["other"], False),
        ("seq_length", 16, False),
    ],
)
def test_another_argument_is_told(name: str, value: object, comparable: bool) -> None:
    for seed in (1, 2):
        run(f"none {seed}", 0.0, seed)
        run(f"b {seed}", 0.0, seed)
        edit_arguments(Path(f"b {seed}"), {name: value})
    found = compared(*BOTH)
    why = "differs in more than the arm" if comparable else "not comparable"
    before = {"lr": 0.003, "tokenizer_model": "a.model", "seq_length": 8}.get(name)
    before = ["valid"] if name == "valid_data_path" else before
    text = f"{name} {value} instead of {before}" if name != "data_path" else "another data_path"
    assert found.warnings == (f"b: {why}: {text}",)
    assert (found.arms[0].verdict != "not comparable") == comparable


@pytest.mark.parametrize("own_validation", [True, False])
def test_training_data_that_is_split_is_validation_data(own_validation: bool) -> None:
    valid = ["valid"] if own_validation else None
    for seed in (1, 2):
        run(f"none {seed}", 0.0, seed, valid_data_path=valid, data_path=["a"])
        run(f"b {seed}", 0.0, seed, valid_data_path=valid, data_path=["c"])
    assert (compared(*BOTH).arms[0].verdict != "not comparable") == own_validation


def test_what_a_run_writes_elsewhere_is_no_difference() -> None:
    for seed in (1, 2):
        run(f"none {seed}", 0.0, seed)
        run(f"b {seed}", 0.0, seed, rank=3, data_cache_path="x", wandb_project="y", fp16=False)
    assert not compared(*BOTH).warnings


@pytest.mark.parametrize(
    ("curve", "why"),
    [
        (flat(DEFAULT, 100, 200), "final iteration 200 instead of 300"),
        (
            flat({"code": 3.6, "prose": 4.4}, 100, 200, 300),
            "domains code, prose instead of code, noise, prose",
        ),
    ],
)
def test_other_lengths_and_domains_cannot_be_compared(curve: Any, why: str) -> None:
    for seed in (1, 2):
        run(f"none {seed}", 0.0, seed)
        write_run(Path(f"b {seed}"), curve, "linupper", seed)
    found = compared(*BOTH)
    assert (found.arms[0].verdict, found.arms[0].p_value) == ("not comparable", None)
    assert found.warnings == (f"b: not comparable: {why}",)


def test_a_shorter_run_of_the_baseline_says_nothing_of_chance() -> None:
    run("none", 0.0, 1, "t")
    run("b", 0.0, 1, "t")
    write_run(Path("none short"), flat(DEFAULT, 100, 200), seed=2, load="t")
    found = compared(*BOTH)
    assert found.chance.pairs == 0
    assert found.warnings == ("none short: left out of chance: final iteration 200 instead of 300",)


def test_the_weighted_loss_is_never_read() -> None:
    for seed in (1, 2):
        run(f"none {seed}", 0.0, seed)
        run(f"b {seed}", 0.1, seed)
    before = compared(*BOTH)
    for folder in Path().iterdir():
        edit_lines(folder, '"objective": 4.0', '"objective": 99.0')
    assert "99.0" in Path("b 1/metrics.jsonl").read_text()
    assert dataclasses.asdict(compared(*BOTH)) == dataclasses.asdict(before)
