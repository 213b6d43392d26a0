"""The argument files parse, and give the parameter counts that their README states."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_rw.platform import DeviceError, select_device
from tests.ranks import run_ranks

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "paper"
GPT2_VOCABULARY, LLAMA_VOCABULARY = 50257, 32000

# Parameters in millions, vocabulary, strategy.
FILES = {
    "gpt2-124m": (124.0, GPT2_VOCABULARY, "quadratic"),
    "gpt2-210m": (209.1, GPT2_VOCABULARY, "extremes"),
    "gpt2-294m": (294.2, GPT2_VOCABULARY, "extremes"),
    "llama-1.4b": (1364.0, LLAMA_VOCABULARY, "none"),
    "llama-7b": (6738.0, LLAMA_VOCABULARY, "none"),
}


def parsed(path: str, vocabulary: int, extra: list[str]) -> dict[str, Any]:
    from megatron_rw.training.arguments import parse_args

    sys.argv = ["pretrain_gpt_rw", f"@{path}", *extra, "--mock-data"]
    sys.argv += ["--tokenizer-type", "NullTokenizer", "--vocab-size", str(vocabulary)]
    args = parse_args("cpu")
    return {key: value for key, value in vars(args).items() if isinstance(value, int | float | str)}


def parameters(args: dict[str, Any], vocabulary: int) -> int:
    """Written out from the two architectures, not taken from Megatron."""
    d, layers, ffn = args["hidden_size"], args["num_layers"], args["ffn_hidden_size"]
    if args["swiglu"]:
        return layers * (4 * d * d + 3 * d * ffn + 2 * d) + d + 2 * vocabulary * d
    layer = (4 * d * d + 4 * d) + (2 * d * ffn + ffn + d) + 4 * d
    return layers * layer + 2 * d + (vocabulary + args["seq_length"]) * d


@pytest.mark.parametrize("name", FILES)
def test_file_has_the_stated_shape(name: str) -> None:
    millions, vocabulary, strategy = FILES[name]
    extra = [] if strategy != "none" else ["--train-iters", "100"]
    [args] = run_ranks(1, parsed, str(FOLDER / f"{name}.args"), vocabulary, extra)
    assert parameters(args, vocabulary) / 1e6 == pytest.approx(millions, abs=0.6)
    assert args["reweight_strategy"] == strategy


def test_every_file_is_tested() -> None:
    assert {path.stem for path in FOLDER.glob("*.args")} == set(FILES)


def test_later_flag_wins() -> None:
    extra = ["--reweight-strategy", "linupper", "--train-iters", "10", "--lr-warmup-iters", "2"]
    [args] = run_ranks(1, parsed, str(FOLDER / "gpt2-124m.args"), GPT2_VOCABULARY, extra)
    assert args["reweight_strategy"] == "linupper"
    assert args["reweight_warmup_steps"] == 1000


def test_device_may_stand_in_the_file(tmp_path: Path) -> None:
    file = tmp_path / "x.args"
    file.write_text("# a comment\n--device tpu  # another\n")
    with pytest.raises(DeviceError, match="choose one of"):
        select_device([f"@{file}"])
    with pytest.raises(DeviceError, match="No such file"):
        select_device(["@/nowhere.args"])
