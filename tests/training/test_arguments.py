"""Defaults that follow from the device and from which optional packages are there."""

from __future__ import annotations

import argparse

import pytest

from megatron_rw.training import arguments
from megatron_rw.training.arguments import add_arguments, default_arguments


def installed(*names: str) -> object:
    return lambda module: module in names


def test_transformer_engine_on_cuda_keeps_megatrons_defaults(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(arguments, "_installed", installed("transformer_engine", "one_logger"))
    assert default_arguments("cuda") == {}


def test_cuda_without_transformer_engine_takes_the_local_implementation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(arguments, "_installed", installed())
    assert default_arguments("cuda") == {
        "enable_one_logger": False,
        "transformer_impl": "local",
        "apply_rope_fusion": False,
        "no_persist_layer_norm": True,
        "gradient_accumulation_fusion": False,
        "masked_softmax_fusion": False,
    }


def test_parts_of_apex_are_used_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        arguments, "_installed", installed("apex", "fused_weight_gradient_mlp_cuda")
    )
    defaults = default_arguments("cuda")
    assert "no_persist_layer_norm" not in defaults
    assert "gradient_accumulation_fusion" not in defaults
    assert defaults["masked_softmax_fusion"] is False


def test_cpu_runs_over_gloo() -> None:
    defaults = default_arguments("cpu")
    assert defaults["distributed_backend"] == "gloo"
    assert defaults["transformer_impl"] == "local"


def test_help_is_printed_whatever_megatron_writes_into_it() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--theirs", help="headroom (1.10 = 10%)")
    parser.add_argument("--proper", default=3, help="%(default)s of 100%%")
    parser.add_argument("--bare")
    text = " ".join(add_arguments(parser, "cpu").format_help().split())
    assert "headroom (1.10 = 10%)" in text
    assert "3 of 100%" in text
    assert "--log-dir LOG_DIR Write metrics.jsonl here" in text
