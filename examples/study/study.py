"""The study as data: its question, arms, controls, sizes and measures, fixed before it is run.

Question: do the statistics of the training model's own loss suffice to choose weights that make
training better, or does it take a reference?

Design: for every seed a uniform *trunk* is trained at a constant learning rate. Every *arm* begins
with the trunk's checkpoint, sees the same new samples in the same order, and lets the rate fall to
its end. Two runs of the same trunk differ in the arm alone; runs from scratch would differ more by
their seed than by the arm. `examples/study/run.py` runs it, `tools/compare_runs.py` judges it.

A smaller effective sample size costs something whatever the weights are, so that "worse than none"
does not say that a choice by loss is bad. The question is answered by `CONTRASTS`, a family of
tests of its own; the comparison of all arms with `none` is the wider, more cautious picture.
"""

from __future__ import annotations

from dataclasses import dataclass

# Measures, fixed in advance. Primary: unweighted validation loss, the mean over the clean domains,
# of all arms on the same tokens. Then: the worst clean domain; the domains of noise; the fitted
# logit scale and the loss there; tokens to the final loss of `none`; and two probes, the choice of
# the right continuation among four, and the copying of repeated random tokens.
BASELINE = "none"
# Nats. A difference whose interval lies within is called equivalent.
MARGIN = 0.005

LINUPPER = "--reweight-strategy linupper --reweight-temperature 0.4"
TOP_TOKENS = "--reweight-strategy topk --reweight-top-share 0.7 --reweight-unit token"
CONTROL_SEED = "--reweight-control-seed {seed}"
EXCESS = "--reweight-signal excess --reweight-reference-load {reference}"
# About the effective sample size of linupper at 0.4: 29 of 32 samples.
ESS = 0.9


@dataclass(frozen=True)
class Arm:
    """One way of training on from a trunk.

    Attributes:
        name: in tables and folders.
        flags: of the program. `{reference}` is a checkpoint trained on clean text, `{early}` and
            `{late}` the scores of two of its checkpoints, `{quarter}` a quarter of the batch,
            `{until}` the iteration at three quarters of the branch, `{interval}` a tenth of it,
            `{seed}` the trunk's number.
        order: which order of the data; 0 is the trunk's, others are A/A runs of the baseline.
        rate: factor on the learning rate.
        shares_of: an arm whose average shares of weight by domain become this arm's blend.
        clean: whether its data have no noise, whatever those of the others have.
        noise: the shares of noise in the data with which it is run, in percent.
    """

    name: str
    flags: str = ""
    order: int = 0
    rate: float = 1.0
    shares_of: str | None = None
    clean: bool = False
    noise: tuple[int, ...] = (10,)


# The main condition comes first.
EVERYWHERE = (10, 0, 30)
# The controls at 30 % were added after the other runs, when linupper was better than none there.
WITH_NOISE = (10, 30)

ARMS = (
    Arm("none", noise=EVERYWHERE),
    Arm("none, order 2", order=1, noise=EVERYWHERE),
    Arm("none, order 3", order=2),
    Arm("uniform", "--reweight-strategy uniform"),
    # The paper's strategies and temperatures, over sequences; the set is the whole batch.
    Arm("linupper 1", "--reweight-strategy linupper --reweight-temperature 1"),
    Arm("linupper 0.4", LINUPPER, noise=EVERYWHERE),
    Arm("linupper 0.2", "--reweight-strategy linupper --reweight-temperature 0.2"),
    Arm(
        "quadratic 0.4",
        "--reweight-strategy quadratic --reweight-temperature 0.4",
        noise=EVERYWHERE,
    ),
    Arm("extremes 0.4", "--reweight-strategy extremes --reweight-temperature 0.4"),
    Arm("softmax 1 (IR-DRO)", "--reweight-strategy softmax --reweight-temperature 1"),
    # Controls: what a smaller effective sample size, another rate or another blend does alone.
    Arm(
        "linupper 0.4, dealt at random",
        f"{LINUPPER} --reweight-control permute {CONTROL_SEED}",
        noise=WITH_NOISE,
    ),
    Arm(
        "random samples, linupper's ESS",
        f"--reweight-strategy topk --reweight-top-share {ESS} --reweight-control random-drop "
        f"{CONTROL_SEED}",
    ),
    Arm("static blend, linupper's shares", shares_of="linupper 0.4", noise=WITH_NOISE),
    Arm("noise left out", clean=True, noise=WITH_NOISE),
    Arm("rate x 0.5", rate=0.5),
    Arm("rate x 2", rate=2.0, noise=WITH_NOISE),
    # Scopes, units and schedules.
    Arm("linupper 0.4, micro-batches", f"{LINUPPER} --micro-batch-size {{quarter}}"),
    Arm(
        "linupper 0.4, deferred",
        f"{LINUPPER} --micro-batch-size {{quarter}} --reweight-scope deferred",
    ),
    Arm("linupper 0.4, last quarter uniform", f"{LINUPPER} --reweight-until {{until}}"),
    Arm(
        "linupper 0.4, documents",
        f"{LINUPPER} --reweight-unit document --reweight-normalizer token",
    ),
    Arm("linupper 0.4, tokens", f"{LINUPPER} --reweight-unit token"),
    # Other signals of the model itself.
    Arm(
        "linupper 0.4, tokens, entropy",
        f"{LINUPPER} --reweight-unit token --reweight-signal entropy --cross-entropy-impl fused",
    ),
    Arm(
        "linupper 0.4, entropy",
        f"{LINUPPER} --reweight-signal entropy --cross-entropy-impl fused",
    ),
    Arm(
        "linupper 0.4, progress",
        f"{LINUPPER} --reweight-signal progress --reweight-snapshot-interval {{interval}}",
    ),
    Arm("top tokens by loss (ESLM)", TOP_TOKENS),
    Arm(
        "random tokens",
        f"{TOP_TOKENS} --reweight-control random-drop {CONTROL_SEED}",
        noise=WITH_NOISE,
    ),
    # With a reference, trained on clean text alone.
    Arm("linupper 0.4, excess", f"{LINUPPER} {EXCESS}", noise=WITH_NOISE),
    Arm(
        "linupper 0.4, learnability",
        f"{LINUPPER} --reweight-signal learnability --reweight-reference-scores {{early}} {{late}}",
    ),
    Arm("top tokens by excess (Rho-1)", f"{TOP_TOKENS} {EXCESS}", noise=EVERYWHERE),
)

# What is asked, each as an arm against another that lacks the one thing. One family of tests.
CONTRASTS = (
    ("linupper 0.4", "linupper 0.4, dealt at random", "does it matter which samples weigh more?"),
    ("linupper 0.4", "static blend, linupper's shares", "is it more than another blend?"),
    ("top tokens by loss (ESLM)", "random tokens", "does the loss choose good tokens?"),
    ("top tokens by excess (Rho-1)", "random tokens", "does a reference choose good tokens?"),
    ("top tokens by excess (Rho-1)", "noise left out", "is it more than leaving out noise?"),
    ("linupper 0.4, excess", "linupper 0.4", "is the excess a better signal than the loss?"),
)


@dataclass(frozen=True)
class Size:
    """How large the study is.

    Attributes:
        model: flags of the model, the batch and the rate's bounds.
        batch: samples a step.
        rate: the learning rate of the trunk; a branch ends at a tenth of it.
        trunks: seeds, each with a trunk of its own: the number of pairs.
        trunk_steps: at a constant rate, after a warm-up.
        branch_steps: with the rate falling.
        vocab_size: of the tokenizer.
        noise: the shares of noise, in percent.
        arms: names of the arms that are run; all of them if empty.
        train_bytes: text a domain, for trunks and again for branches; half of it each if None.
        built_bytes: text a domain of the corpus that is built where none is given.
        eval_rows: rows a domain of the final evaluation, of a sequence each.
        eval_items: continuation choices a clean domain.
        keep_checkpoints: whether those of the branches outlive their evaluation.
        device: of the runs.
        jobs: runs at a time.
    """

    model: str
    batch: int
    rate: float
    trunks: int
    trunk_steps: int
    branch_steps: int
    vocab_size: int
    noise: tuple[int, ...] = EVERYWHERE
    arms: tuple[str, ...] = ()
    train_bytes: int | None = None
    built_bytes: int = 2_000_000
    eval_rows: int = 256
    eval_items: int = 100
    keep_checkpoints: bool = True
    device: str = "cpu"
    jobs: int = 2

    @property
    def steps(self) -> int:
        """The last iteration of every branch."""
        return self.trunk_steps + self.branch_steps

    def selected(self, noise: int) -> list[Arm]:
        """The arms that are run with a share of noise."""
        return [a for a in ARMS if noise in a.noise and (not self.arms or a.name in self.arms)]


LLAMA = (
    "--swiglu --normalization RMSNorm --disable-bias-linear --position-embedding-type rope "
    "--attention-dropout 0 --hidden-dropout 0 --clip-grad 1.0 --weight-decay 0.1 --adam-beta2 0.95 "
    "--num-workers 0 --no-create-attention-mask-in-dataloader"
)

SIZES = {
    # Checks the machinery; its losses say nothing.
    "smoke": Size(
        model=f"{LLAMA} --num-layers 1 --hidden-size 32 --ffn-hidden-size 64 "
        "--num-attention-heads 2 --seq-length 32 --lr-warmup-iters 2",
        batch=8,
        rate=3e-3,
        trunks=2,
        trunk_steps=6,
        branch_steps=4,
        vocab_size=600,
        noise=(10,),
        arms=(
            *("none", "none, order 2", "uniform", "linupper 0.4", "random tokens"),
            *("static blend, linupper's shares", "top tokens by excess (Rho-1)"),
        ),
        built_bytes=150_000,
        eval_rows=16,
        eval_items=4,
    ),
    # Two CPU cores.
    "cpu": Size(
        model=f"{LLAMA} --num-layers 2 --hidden-size 64 --ffn-hidden-size 176 "
        "--num-attention-heads 2 --seq-length 128 --lr-warmup-iters 20",
        batch=32,
        rate=5e-3,
        trunks=6,
        trunk_steps=500,
        branch_steps=200,
        vocab_size=1024,
        train_bytes=2_200_000,
    ),
    # One H100: 30 million parameters; wants some 200 MB of text.
    "gpu": Size(
        model=f"{LLAMA} --bf16 --num-layers 8 --hidden-size 512 --ffn-hidden-size 1408 "
        "--num-attention-heads 8 --seq-length 512 --lr-warmup-iters 50",
        batch=64,
        rate=2e-3,
        trunks=5,
        trunk_steps=1000,
        branch_steps=300,
        vocab_size=8192,
        noise=(10,),
        arms=(
            *("none", "none, order 2", "linupper 1", "linupper 0.4", "quadratic 0.4"),
            *("linupper 0.4, dealt at random", "rate x 2", "linupper 0.4, last quarter uniform"),
            *("linupper 0.4, tokens, entropy", "linupper 0.4, progress", "random tokens"),
            *("linupper 0.4, excess", "top tokens by excess (Rho-1)"),
        ),
        eval_rows=512,
        eval_items=200,
        keep_checkpoints=False,  # One is 0.4 GB, and a trunk's arms have 50.
        device="cuda",
        jobs=3,
    ),
}
