"""Flags that name data and do not go together are refused before any long work."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import pytest

from megatron_rw.errors import UserError
from megatron_rw.training.refusals.data import check_files


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"train_data_path": []}, "--train-data-path has no value"),
        ({"data_path": []}, "--data-path has no value"),
        ({"data_args_path": __file__}, "--data-args-path needs --split"),
        ({"train_data_path": ["a"]}, "without --valid-data-path leaves nothing to evaluate on"),
        ({"train_data_path": ["a"], "eval_iters": 0}, "data path a: a.idx is missing"),
        ({"train_data_path": ["a"], "eval_interval": 20}, "data path a: a.idx is missing"),
        ({"data_path": ["a"], "tokenizer_type": None}, "no tokenizer: .* with --tokenizer-type"),
    ],
)
def test_data_that_cannot_be_used(given: dict[str, Any], message: str) -> None:
    paths = ("data_path", "train_data_path", "valid_data_path", "test_data_path")
    files = ("data_args_path", "per_split_data_args_path", "tokenizer_model", "vocab_file")
    args: dict[str, Any] = dict.fromkeys((*paths, *files, "mock_data", "sft", "split"))
    args["use_checkpoint_args"] = False
    args |= {"tokenizer_type": "NullTokenizer", "eval_iters": 2, "eval_interval": 10}
    with pytest.raises(UserError, match=message):
        check_files(Namespace(**(args | {"train_iters": 10} | given)))
