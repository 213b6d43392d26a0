"""The recipes parse, and give the parameters and the estimates that their README states."""

from __future__ import annotations

import re
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
from megatron.training.utils import get_blend_and_blend_per_split

from examples.paper.estimate import (
    FOLDER,
    HEADER,
    RECIPES,
    Recipe,
    flags_of,
    planned_arguments,
    row,
)
from megatron_rw.errors import UserError
from megatron_rw.platform import select_device
from tests.ranks import run_ranks

# Parameters in millions, samples in a set of weights, strategy.
FILES = {
    "gpt2-124m": (124.0, 32, "quadratic"),
    "gpt2-210m": (209.1, 48, "extremes"),
    "gpt2-294m": (294.2, 48, "extremes"),
    "llama-1.4b": (1364.0, 128, "linupper"),
    "llama-7b": (6738.0, 128, "linupper"),
}


def planned(recipe: Recipe, *flags: str) -> dict[str, Any]:
    """The arguments that are numbers or words, as on its GPUs, with Transformer Engine."""
    args = planned_arguments([*flags_of(recipe), *flags], recipe.gpus)
    return {key: value for key, value in vars(args).items() if isinstance(value, int | float | str)}


def parameters(args: dict[str, Any], vocabulary: int) -> int:
    """Written out from the two architectures, not taken from Megatron."""
    d, layers, ffn = args["hidden_size"], args["num_layers"], args["ffn_hidden_size"]
    if args["swiglu"]:
        return layers * (4 * d * d + 3 * d * ffn + 2 * d) + d + 2 * vocabulary * d
    layer = (4 * d * d + 4 * d) + (2 * d * ffn + ffn + d) + 4 * d
    return layers * layer + 2 * d + (vocabulary + args["seq_length"]) * d


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_file_has_the_stated_shape(recipe: Recipe) -> None:
    millions, samples, strategy = FILES[recipe.name]
    [args] = run_ranks(1, planned, recipe)
    assert parameters(args, recipe.vocabulary) / 1e6 == pytest.approx(millions, abs=0.6)
    assert args["reweight_strategy"] == strategy
    # No gradient accumulation: one set of weights a step, as in the authors' code.
    assert args["micro_batch_size"] * args["data_parallel_size"] == samples
    assert args["global_batch_size"] == samples


def test_every_flag_says_whose_choice_it_is() -> None:
    files = {path.stem: path.read_text() for path in FOLDER.glob("*.args")}
    assert set(files) == {recipe.name for recipe in RECIPES}, "every file is tested"
    for text in files.values():
        _title, *groups = text.split("\n\n")
        for group in groups:
            comment = " ".join(line for line in group.splitlines() if line.startswith("#"))
            assert re.search("authors' code|Our choice", comment), group


def test_readme_has_the_table_that_the_command_prints() -> None:
    rows = [run_ranks(1, row, recipe)[0] for recipe in RECIPES]
    assert "\n".join([HEADER, *rows]) in (FOLDER / "README.md").read_text()


def test_later_flag_wins() -> None:
    flags = ["--reweight-strategy", "linupper", "--train-iters", "10", "--lr-warmup-iters", "2"]
    [args] = run_ranks(1, planned, RECIPES[0], *flags)
    assert args["reweight_strategy"] == "linupper"
    assert args["reweight_warmup_steps"] == 1000


def test_device_may_stand_in_the_file(tmp_path: Path) -> None:
    file = tmp_path / "x.args"
    file.write_text("# a comment\n--device tpu  # another\n")
    with pytest.raises(UserError, match="choose one of"):
        select_device([f"@{file}"])


def test_mixtures_are_blends_of_megatrons() -> None:
    paths = sorted(FOLDER.glob("*.blend"))
    assert [path.stem for path in paths] == ["slimpajama-doge", "slimpajama-doremi"]
    for path in paths:
        args = dict.fromkeys(("data_path", "train_data_path", "valid_data_path", "test_data_path"))
        files = {"data_args_path": str(path), "per_split_data_args_path": None}
        (prefixes, weights), _ = get_blend_and_blend_per_split(Namespace(**args, **files))
        assert sum(weights) == pytest.approx(1, abs=1e-4)
        # The authors' code exchanges these two.
        by_domain = dict(zip(prefixes, weights, strict=True))
        c4, cc = (by_domain[f"PREFIX/{name}_text_document"] for name in ("c4", "common_crawl"))
        assert c4 > cc
        assert len(by_domain) == 7
