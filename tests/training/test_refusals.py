"""Bad flags and data: one message that names the place and the remedy, before any long work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import VOCAB_SIZE
from tests.program import Run, run_program

STEPS = "--train-iters 1 --micro-batch-size 8".split()

# Flags after a good command line, processes, and what the one message must hold.
CASES = {
    "unknown flag": (
        "--reweigth-strategy linupper",
        1,
        "unrecognized arguments: --reweigth-strategy linupper. Did you mean --reweight-strategy",
    ),
    "unknown strategy": (
        "--reweight-strategy upper",
        1,
        "argument --reweight-strategy: invalid choice: 'upper'",
    ),
    "not a number": ("--reweight-delta much", 1, "argument --reweight-delta: invalid float value"),
    "setting without strategy": (
        "--reweight-temperature 0.4",
        1,
        "--reweight-temperature without a strategy does nothing: add --reweight-strategy",
    ),
    "impossible temperature": (
        "--reweight-strategy linupper --reweight-temperature 0",
        1,
        "--reweight-temperature must be a finite number above 0, not 0.0",
    ),
    "samples without a log": (
        "--reweight-strategy linupper --reweight-log-samples 4",
        1,
        "--reweight-log-samples writes to metrics.jsonl: add --log-dir DIR",
    ),
    "skipping without the check": (
        "--on-nonfinite skip-step --no-check-for-nan-in-loss-and-grad",
        1,
        "--on-nonfinite skip-step without Megatron's check does nothing: drop it, or",
    ),
    "skips that nothing counts": (
        "--max-consecutive-skips 3",
        1,
        "--max-consecutive-skips without --on-nonfinite skip-step or drop-sample does nothing",
    ),
    "dropping among experts": (
        "--on-nonfinite drop-sample --num-experts 2",
        1,
        "--num-experts has the tokens of all samples compete for experts, blank ones too: use "
        "--on-nonfinite skip-step with it",
    ),
    "spikes below the mean": (
        "--loss-spike-factor 1",
        1,
        "--loss-spike-factor must be a finite number above 1, not 1.0",
    ),
    "spikes without a log": (
        "--loss-spike-factor 2",
        1,
        "--loss-spike-factor writes to spikes.jsonl: add --log-dir DIR",
    ),
    "one sample": (
        "--reweight-strategy linupper --micro-batch-size 1",
        1,
        "one sample always has weight 1: raise --micro-batch-size, or use --reweight-scope global",
    ),
    "16-bit losses": (
        "--reweight-strategy linupper --fp16-lm-cross-entropy --fp16",
        1,
        "--fp16-lm-cross-entropy rounds the losses to 16 bits",
    ),
    "one sample per step": (
        "--reweight-strategy linupper --reweight-scope global --micro-batch-size 1 "
        "--global-batch-size 1",
        1,
        "within --global-batch-size 1 sample, and one sample always has weight 1: raise "
        "--global-batch-size",
    ),
    "auxiliary loss scaled with the gradients": (
        "--reweight-strategy linupper --reweight-scope deferred --num-experts 2 "
        "--moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 1e-2",
        1,
        "would scale the losses of --moe-aux-loss-coeff with them: use --reweight-scope microbatch "
        "or global",
    ),
    "temperature that underflows": (
        "--reweight-strategy linupper --reweight-scope deferred --reweight-temperature 0.01",
        1,
        "--reweight-temperature 0.01 is too low for --reweight-scope deferred",
    ),
    "decay without moments": (
        "--reweight-strategy linupper --reweight-moment-decay 0.5",
        1,
        "--reweight-moment-decay acts on --reweight-scope deferred alone",
    ),
    "two cross-entropies": (
        "--cross-entropy-impl fused --cross-entropy-loss-fusion",
        1,
        "--cross-entropy-impl fused takes the place of what --cross-entropy-loss-fusion chooses",
    ),
    "loss fusion without logits": (
        "--fused-linear-cross-entropy --cross-entropy-loss-fusion",
        1,
        "--cross-entropy-loss-fusion acts on logits, which there are none of: drop it, or "
        "--fused-linear-cross-entropy",
    ),
    "our cross-entropy without logits": (
        "--fused-linear-cross-entropy --cross-entropy-impl fused",
        1,
        "--cross-entropy-impl fused acts on logits, which there are none of: drop it, or",
    ),
    "output layer in FP8": (
        "--fused-linear-cross-entropy --fp8-output-proj",
        1,
        "--fp8-output-proj computes the output layer in FP8, with products of its own: drop it",
    ),
    "budget for nothing": (
        "--logits-budget-mib 100",
        1,
        "--logits-budget-mib without --fused-linear-cross-entropy does nothing",
    ),
    "budget too small": (
        "--fused-linear-cross-entropy --logits-budget-mib 1 --make-vocab-size-divisible-by 4096",
        1,
        "--logits-budget-mib 1: a budget of 1 MiB for logits is too small for 256 tokens of 32 "
        "hidden units: 4 MiB is the least, and 9 MiB keeps all logits",
    ),
    "budget below nothing": (
        "--fused-linear-cross-entropy --logits-budget-mib 0",
        1,
        "--logits-budget-mib must be above 0, not 0",
    ),
    "kernels that nothing uses": (
        "--reweight-kernels torch",
        1,
        "--reweight-kernels torch has nothing to act on: add --reweight-strategy, --fused-linear-",
    ),
    "captured step": (
        "--reweight-strategy linupper --cuda-graph-impl full_iteration "
        "--no-check-for-nan-in-loss-and-grad",
        1,
        "--cuda-graph-impl full_iteration captures a step as it is",
    ),
    "world size": (
        "--tensor-model-parallel-size 2",
        1,
        "1 process(es) cannot hold --tensor-model-parallel-size 2 x",
    ),
    "world size on two ranks": (
        "--pipeline-model-parallel-size 4",
        2,
        "2 process(es) cannot hold --tensor-model-parallel-size 1 x "
        "--pipeline-model-parallel-size 4 x --context-parallel-size 1 = 4: start a multiple of 4",
    ),
    "batch size": (
        "--global-batch-size 12",
        1,
        "--global-batch-size 12 is not a multiple of --micro-batch-size 8 x 1",
    ),
    "no dataset": (
        "--data-path {corpus}/esay_text_document",
        1,
        "esay_text_document.idx is missing. A data path is the common prefix of a .bin and an "
        ".idx file, as tools/preprocess_data.py writes them. {corpus} has easy_text_document",
    ),
    "no folder": ("--data-path /nowhere/easy", 1, "there is no folder /nowhere"),
    "suffix given": (
        "--data-path {corpus}/easy_text_document.bin",
        1,
        "give the prefix without .bin",
    ),
    "no tokenizer": (
        "--tokenizer-type SentencePieceTokenizer --tokenizer-model /nowhere/bpe.model",
        1,
        "--tokenizer-model /nowhere/bpe.model: there is no such file",
    ),
    "small vocabulary": (
        "--vocab-size 9",
        1,
        "holds token id 60, but the model's vocabulary has 16 entries: the data was made with "
        "another tokenizer",
    ),
    "no nccl": ("--distributed-backend nccl", 1, "--distributed-backend nccl needs GPUs"),
    "no TE": (
        "--transformer-impl transformer_engine",
        1,
        "--transformer-impl transformer_engine needs a GPU",
    ),
    "no context parallelism": (
        "--context-parallel-size 2",
        2,
        "--context-parallel-size above 1 needs Transformer Engine's attention",
    ),
    "no sequence parallelism": (
        "--tensor-model-parallel-size 2 --sequence-parallel",
        2,
        "--sequence-parallel needs the norms of Transformer Engine or apex",
    ),
    # Megatron's own refusals come through in the same form.
    "megatron's own": (
        "--num-attention-heads 5",
        1,
        "Megatron refuses the arguments: ",
    ),
    "long warm-up": (
        "--lr-warmup-iters 5 --train-iters 5",
        1,
        "--lr-warmup-iters 5 must be below --lr-decay-iters (or else --train-iters), which is 5",
    ),
    "no steps": ("--train-iters 0", 1, "give --train-iters or --train-samples"),
}


def refused(directory: Path, flags: list[str], processes: int = 1) -> Run:
    return run_program(directory, *flags, processes=processes, metrics=False)


@pytest.mark.parametrize("case", CASES)
def test_refusal(case: str, tmp_path: Path, corpus: Path, data_flags: list[str]) -> None:
    flags, processes, message = CASES[case]
    flags, message = (
        flags.replace("{corpus}", str(corpus)),
        message.replace("{corpus}", str(corpus)),
    )
    run = refused(tmp_path, [*data_flags, *STEPS, *flags.split()], processes)
    assert run.status == [2] * processes, run.all_output
    errors = [line for line in run.output[0].splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, run.all_output
    assert message in errors[0]
    assert "Traceback" not in run.all_output
    assert "building GPT model" not in run.all_output
    # Rank 0 speaks for all.
    assert all(not output.strip() for output in run.output[1:])


@pytest.mark.parametrize("missing", ["--micro-batch-size", "--train-iters"])
def test_required_flags_are_named(missing: str, tmp_path: Path, data_flags: list[str]) -> None:
    steps = {
        "--micro-batch-size": ["--train-iters", "1"],
        "--train-iters": ["--micro-batch-size", "8"],
    }
    run = refused(tmp_path, [*data_flags, *steps[missing]])
    assert run.status == [2]
    assert missing in run.output[0].splitlines()[-1]


def test_small_sets_are_warned_about_once(tmp_path: Path, data_flags: list[str]) -> None:
    flags = "--train-iters 1 --micro-batch-size 2 --reweight-strategy linupper".split()
    run = run_program(tmp_path, *data_flags, *flags, processes=2).check()
    warning = "WARNING: samples compete for weight within --micro-batch-size 2 x 2"
    assert sum(output.count(warning) for output in run.output) == 1


def test_tokenizer_that_did_not_make_the_data_is_refused(tmp_path: Path, corpus: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for suffix in (".bin", ".idx"):
        (folder / f"easy_text_document{suffix}").write_bytes(
            (corpus / f"easy_text_document{suffix}").read_bytes()
        )
    record = {"prefix": "easy_text_document", "documents": 200, "tokens": 1, "max_token_id": 60}
    tokenizer = {"type": "HuggingFaceTokenizer", "model": "other", "sha256": "0" * 64,
                 "vocab_size": VOCAB_SIZE}  # fmt: skip
    (folder / "domains.json").write_text(
        json.dumps({"version": 1, "tokenizer": tokenizer, "domains": {"plain": record}})
    )
    # NullTokenizer reads no model; the flag is what counts here.
    mine = tmp_path / "mine.model"
    mine.write_bytes(b"mine")
    run = refused(
        tmp_path,
        [
            *STEPS,
            *["--data-path", str(folder / "easy_text_document"), "--split", "90,5,5"],
            *["--tokenizer-type", "NullTokenizer", "--vocab-size", str(VOCAB_SIZE)],
            *["--tokenizer-model", str(mine)],
        ],
    )
    assert run.status == [2]
    assert f"was made with other, and --tokenizer-model {mine} is another model" in run.output[0]


def test_token_beyond_the_vocabulary_is_caught_when_drawn(
    tmp_path: Path, corpus: Path, data_flags: list[str]
) -> None:
    """A `domains.json` that understates the largest id does not let it through."""
    folder = tmp_path / "data"
    folder.mkdir()
    for suffix in (".bin", ".idx"):
        (folder / f"noise_text_document{suffix}").write_bytes(
            (corpus / f"noise_text_document{suffix}").read_bytes()
        )
    record = {"prefix": "noise_text_document", "documents": 200, "tokens": 1, "max_token_id": 7}
    tokenizer = {"type": "NullTokenizer", "model": "none", "sha256": "0" * 64, "vocab_size": 9}
    (folder / "domains.json").write_text(
        json.dumps({"version": 1, "tokenizer": tokenizer, "domains": {"noise": record}})
    )
    run = refused(
        tmp_path,
        [
            *STEPS,
            *["--data-path", str(folder / "noise_text_document"), "--split", "90,5,5"],
            *["--tokenizer-type", "NullTokenizer", "--vocab-size", "9"],
        ],
    )
    assert run.status == [1]
    assert "a sample holds token id" in run.output[0]
    assert "but the model's vocabulary has 16 entries" in run.output[0]
