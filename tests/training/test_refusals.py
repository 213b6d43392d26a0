"""What data and the method's settings cannot be combined with is refused with the flag's name."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import pytest

from megatron_rw.errors import UserError
from megatron_rw.training.refusals.data import check_files
from megatron_rw.training.refusals.method import check_kernels
from megatron_rw.training.settings import KernelConfig


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


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"fp8_output_proj": True}, "--fp8-output-proj computes the output layer in FP8"),
        ({"use_torch_fsdp2": True}, "--use-torch-fsdp2 gathers the output layer's weight"),
        ({"use_megatron_fsdp": True}, "--use-megatron-fsdp gathers the output layer's weight"),
        (
            {"defer_embedding_wgrad_compute": True},
            "--defer-embedding-wgrad-compute takes the output layer's weight gradient out",
        ),
        ({"perform_rl_step": True}, "--perform-rl-step wants the logits"),
        ({"fp16_lm_cross_entropy": True}, "--fp16-lm-cross-entropy asks for losses in 16 bits"),
        ({"gtp_weight_remat_size": 2}, "--tensor-parallel-num-weight-shards cuts the output"),
        ({"logits_load_dir": "x"}, "--logits-load-dir compares the logits with others"),
    ],
)
def test_the_fused_output_layer_leaves_nothing_out(setting: dict[str, Any], message: str) -> None:
    defaults = {"gtp_weight_remat_size": 1, "mtp_num_layers": None}
    args = Namespace(**(defaults | {"cross_entropy_loss_fusion": False} | setting))
    kernels = KernelConfig(fused_linear_cross_entropy=True, logits_budget_mib=64)
    with pytest.raises(UserError, match=message) as refusal:
        check_kernels(args, kernels)
    assert str(refusal.value).endswith(": drop it, or --fused-linear-cross-entropy.")
