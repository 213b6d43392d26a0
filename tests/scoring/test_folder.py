"""What is written: arrays, who may write them, and the figures of domains."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_rw.data.indexed.documents import DocumentBlock
from megatron_rw.errors import UserError
from megatron_rw.scoring.folder import ARRAYS, ScoreFolder, document_means
from megatron_rw.scoring.summary import summarise, table


def job(**changes: Any) -> dict[str, Any]:
    dataset = {"path": "/d/a", "domain": "web", "documents": 4, "tokens": 10}
    return {"checkpoint": {"iteration": 3}, "datasets": {"a": dataset}} | changes


def block(*lengths: int) -> DocumentBlock:
    return DocumentBlock(0, np.array(lengths), 0, 2 * sum(lengths))


def filled(path: Path) -> ScoreFolder:
    folder = ScoreFolder(path, job())
    folder.begin()
    folder.write("a", block(1, 4, 0, 5), np.linspace(0, 2.25, 10, dtype=np.float32), {"a": 4})
    return folder


@given(lengths=st.lists(st.integers(0, 5), min_size=1, max_size=12))
def test_means_are_those_of_each_document(lengths: list[int]) -> None:
    losses = np.random.default_rng(0).random(sum(lengths)).astype(np.float32)
    losses[-1:] = np.inf
    means, tokens = document_means(np.array(lengths, np.int32), losses)
    for part, mean, count in zip(
        np.split(losses, np.cumsum(lengths)[:-1]), means, tokens, strict=True
    ):
        assert count == max(0, len(part) - 1)
        wanted = np.float32(part[1:].mean(dtype=np.float64)) if count else np.float32(np.nan)
        np.testing.assert_allclose(mean, wanted, rtol=1e-7)


@pytest.mark.parametrize("killed_between_two_names", [False, True])
def test_names_are_final_only_in_the_end(tmp_path: Path, killed_between_two_names: bool) -> None:
    folder = filled(tmp_path)
    assert not list(tmp_path.glob("*.npy"))
    if killed_between_two_names:
        partial = folder.array("a", "token_losses")
        partial.replace(partial.with_suffix(""))
    assert folder.begin() == {"a": 4}
    folder.finish({"domains": summarise(folder)})
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        ["scores.json", *(f"a.{kind}.npy" for kind in ARRAYS)]
    )
    assert folder.begin() is None
    losses = np.load(tmp_path / "a.token_losses.npy", mmap_mode="r")
    nan = np.nan
    np.testing.assert_array_equal(losses, [nan, nan, 0.5, 0.75, 1, nan, 1.5, 1.75, 2, 2.25])
    means = np.load(tmp_path / "a.document_losses.npy")
    np.testing.assert_array_equal(means, [nan, 0.75, nan, 1.875])


def test_what_is_of_another_job_or_damaged_is_refused(tmp_path: Path) -> None:
    folder = filled(tmp_path)
    other = ScoreFolder(tmp_path, job(checkpoint={"iteration": 4}))
    wanted = r"progress.json is of another job: checkpoint.iteration 3 there, 4 here. Give another"
    with pytest.raises(UserError, match=wanted):
        other.begin()
    (tmp_path / "scores.json").write_text(json.dumps(job()))
    with pytest.raises(UserError, match=r"scores.json is of another job: checkpoint.iteration"):
        other.begin()
    (tmp_path / "scores.json").unlink()
    folder.array("a", "document_losses").unlink()
    with pytest.raises(UserError, match=r"document_losses.npy is missing"):
        folder.begin()
    for content, message in (("{", "not a JSON object"), ('{"blocks": {}}', "of another version")):
        (tmp_path / "progress.json").write_text(content)
        with pytest.raises(UserError, match=message):
            folder.begin()


def test_domains(tmp_path: Path) -> None:
    datasets = {
        name: {"domain": domain, "documents": 3, "tokens": 9}
        for name, domain in (("a", "web"), ("b", "code"), ("c", "web"))
    }
    folder = ScoreFolder(tmp_path, {"datasets": datasets})
    folder.begin()
    for name, losses in (("a", 0.25), ("b", 3.33), ("c", 50.0)):
        values = np.full(9, losses, np.float32)
        if name == "b":
            values[1] = np.nan
        folder.write(name, block(3, 1, 5), values, {})
    domains = json.loads(json.dumps(summarise(folder)))
    web, code = domains["web"], domains["code"]
    assert (web["documents"], web["tokens"], web["without_loss"]) == (6, 12, 2)
    assert (code["tokens"], code["not_finite"], web["not_finite"]) == (4, 1, 0)
    assert web["loss"] == pytest.approx((0.25 + 50) / 2)
    assert {i: n for i, n in enumerate(web["histogram"]) if n} == {2: 2, 200: 2}
    assert {i: n for i, n in enumerate(code["histogram"]) if n} == {33: 1}
    lines = table(domains)
    assert lines[5].split() == ["loss", "web", "code"]
    assert lines[6].split() == ["0.0-0.5", "50.00", "0.00"]
    assert lines[6 + 6].split() == ["3.0-3.5", "0.00", "100.00"]
    assert lines[-1].split() == ["20.0-", "50.00", "0.00"]
