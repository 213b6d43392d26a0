"""A dataset and a checkpoint that commit 67fc11d wrote are read, and training goes on from them.

`written_2026_11_26.tar.xz` holds what that commit's preprocess_data and pretrain_gpt_rw.py wrote on
a CPU: two domains of made-up words, the checkpoint of the fourth of six steps (with
`--verify-integrity`) and, as `continued.jsonl`, the two steps that the same run took after it.
"""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest

from tests.program import run_program, without_time

ARCHIVE = Path(__file__).with_name("written_2026_11_26.tar.xz")
FLAGS = (
    "--num-layers 2 --hidden-size 8 --ffn-hidden-size 16 --num-attention-heads 2 --seq-length 32 "
    "--max-position-embeddings 32 --swiglu --normalization RMSNorm --disable-bias-linear "
    "--position-embedding-type rope --attention-dropout 0 --hidden-dropout 0 "
    "--make-vocab-size-divisible-by 8 --no-create-attention-mask-in-dataloader --lr 1e-2 "
    "--lr-decay-style constant --clip-grad 1.0 --log-interval 1 --eval-iters 1 "
    "--eval-interval 1000 --num-workers 0 --seed 7 --tokenizer-type NullTokenizer --vocab-size 257 "
    "--micro-batch-size 4 --global-batch-size 8 --train-iters 6 --reweight-strategy linupper "
    "--reweight-temperature 0.4 --reweight-warmup-steps 2 --reweight-scope deferred "
    "--reweight-moment-decay 0.5"
).split()


def test_training_goes_on_as_it_did(tmp_path: Path) -> None:
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    noise, plain = (str(tmp_path / "data" / f"{name}_text_document") for name in ("noise", "plain"))

    run = run_program(
        tmp_path,
        *(*FLAGS, "--train-data-path", "0.347992", noise, "0.652008", plain),
        *("--valid-data-path", plain, "--data-cache-path", str(tmp_path / "cache")),
        *("--load", str(tmp_path / "checkpoints")),
        base=(),
        processes=2,
    ).check()

    before = [json.loads(line) for line in (tmp_path / "continued.jsonl").read_text().splitlines()]
    assert [record["iteration"] for record in run.metrics] == [5, 6, 6]
    for now, then in zip(run.metrics, before, strict=True):
        wanted, found = flat(without_time(then)), flat(without_time(now))
        # There may be more by now.
        assert {name: found[name] for name in wanted} == pytest.approx(wanted, rel=1e-5)


def flat(value: object, name: str = "") -> dict[str, object]:
    """The numbers of a record by their path, without what is no number."""
    if isinstance(value, dict):
        return {k: v for key in value for k, v in flat(value[key], f"{name}.{key}").items()}
    return {name: value} if isinstance(value, int | float) else {}
