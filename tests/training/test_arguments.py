"""Defaults that follow from the device and from which optional packages are there."""

from __future__ import annotations

import argparse

import pytest

from megatron_rw.training import arguments
from megatron_rw.training.arguments import add_arguments, default_arguments

LOCAL = {"transformer_impl": "local", "apply_rope_fusion": False}
MASKED = {"masked_softmax_fusion": False}
FUSIONS = MASKED | {"gradient_accumulation_fusion": False}


@pytest.mark.parametrize(
    ("installed", "expected"),
    [
        (("transformer_engine", "one_logger"), {}),
        ((), LOCAL | FUSIONS | {"enable_one_logger": False, "no_persist_layer_norm": True}),
        (
            ("apex", "fused_weight_gradient_mlp_cuda", "one_logger"),
            LOCAL | {"masked_softmax_fusion": False},
        ),
    ],
)
def test_defaults_on_cuda_follow_the_packages(
    installed: tuple[str, ...], expected: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arguments, "_installed", lambda module: module in installed)
    assert default_arguments("cuda") == expected


def test_help_is_printed_whatever_megatron_writes_into_it() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--theirs", help="headroom (1.10 = 10%)")
    parser.add_argument("--proper", default=3, help="%(default)s of 100%%")
    parser.add_argument("--bare")
    text = " ".join(add_arguments(parser, "cpu").format_help().split())
    assert "headroom (1.10 = 10%)" in text
    assert "3 of 100%" in text
    assert "--log-dir LOG_DIR Write metrics.jsonl here" in text
