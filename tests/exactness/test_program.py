"""The real program's gradients, as Megatron dumps them, against the fp64 oracle on its model.

Two micro-batches a step and ragged masks (EOD tokens do not count). Tolerance 1e-6 of the norm of
the whole gradient: a transformer in fp32 against itself in fp64.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from tests.exactness import oracle, program_with_oracle
from tests.program import PP2, TP2, Run, run_program

STEPS = 2
TOLERANCE = 1e-6
# The parameters stay as they are, so that one oracle serves every layout at every step.
FLAGS = (
    f"--train-iters {STEPS} --global-batch-size 16 --eod-mask-loss --lr 1e-30 --clip-grad 1e-3 "
    "--save-interval 1000 --save-wgrads-interval 1 --finetune --no-load-optim --no-load-rng "
    "--reweight-strategy linupper --reweight-temperature 0.4"
).split()
SCOPES = (
    pytest.param("microbatch", marks=pytest.mark.long),
    pytest.param("global", marks=pytest.mark.long),
    "deferred",
)
# The scope global scores with our cross-entropy in any case.
LAYOUTS = {
    "tp2-pp2": (4, 8, f"{TP2} {PP2} --cross-entropy-impl fused"),
    "dp2-tp2-distopt": (4, 4, f"{TP2} --use-distributed-optimizer"),
}
LAYERS = 4


def run(directory: Path, flags: list[str], scope: str, layout: str | None, init: Path) -> Run:
    processes, micro_batch_size, extra = LAYOUTS[layout] if layout else (1, 8, "")
    return run_program(
        directory,
        *flags,
        *FLAGS,
        *["--micro-batch-size", str(micro_batch_size), "--reweight-scope", scope],
        *["--load", str(init), "--save", str(directory / "checkpoints")],
        *extra.split(),
        processes=processes,
        prepare=None if layout else program_with_oracle.install,
    ).check()


def dumped(directory: Path, step: int) -> dict[tuple[int, int], oracle.Parameters]:
    """Megatron's dump of one step, by tensor- and pipeline-parallel rank."""
    ranks = {}
    for path in (directory / "checkpoints" / "wgrads" / f"iter_{step:07d}").glob("*.pth"):
        tp, _, pp = path.stem.removeprefix("mp_rank_").partition("_")
        chunks = torch.load(path)
        assert list(chunks) == ["model_chunk0"]
        ranks[int(tp), int(pp or 0)] = chunks["model_chunk0"]
    return ranks


def part(name: str, full: torch.Tensor, tp: int, tp_size: int) -> torch.Tensor:
    """What one tensor-parallel rank holds of a parameter."""
    if "norm" in name or tp_size == 1:
        return full
    if "linear_fc1" in name:
        # Gate and projection, each cut.
        return torch.cat([half.chunk(tp_size)[tp] for half in full.chunk(2)])
    dim = 1 if "linear_proj" in name or "linear_fc2" in name else 0
    return full.chunk(tp_size, dim)[tp]


def global_name(name: str, pp: int, pp_size: int) -> str:
    """Layers are counted from each pipeline stage's first."""
    words = name.split(".")
    if "layers" in words:
        at = words.index("layers") + 1
        words[at] = str(int(words[at]) + pp * LAYERS // pp_size)
    return ".".join(words)


def relative_error(directory: Path, wanted: oracle.Parameters, step: int) -> float:
    ranks = dumped(directory, step)
    tp_size, pp_size = (max(rank[i] for rank in ranks) + 1 for i in (0, 1))
    error = size = 0.0
    seen = set()
    for (tp, pp), gradients in ranks.items():
        for name, gradient in gradients.items():
            key = global_name(name, pp, pp_size)
            seen.add(key)
            reference = part(name, wanted[key], tp, tp_size)
            error += float((gradient.double() - reference).square().sum())
            size += float(reference.square().sum())
    assert seen == set(wanted)
    return math.sqrt(error / size)


@pytest.fixture(scope="module")
def init(tmp_path_factory: pytest.TempPathFactory, data_flags: list[str]) -> Path:
    # Trained a little, so that sample losses differ. Among equal losses the weights are
    # differences of nearly equal numbers, and their rounding is all that would be measured.
    directory = tmp_path_factory.mktemp("init")
    save = ["--save", str(directory / "checkpoints"), "--save-interval", "30", "--no-save-optim"]
    flags = [*data_flags, "--train-iters", "30", "--micro-batch-size", "8"]
    return run_program(directory, *flags, *save).check().directory / "checkpoints"


@pytest.mark.parametrize("scope", SCOPES)
def test_gradients_of_the_program_are_the_oracles(
    scope: str, tmp_path: Path, data_flags: list[str], init: Path
) -> None:
    runs = {
        layout or "one": run(tmp_path / (layout or "one"), data_flags, scope, layout, init)
        for layout in (None, *LAYOUTS)
    }
    wanted = [
        torch.load(tmp_path / "one" / "checkpoints" / "oracle" / f"{step:03d}.pth")
        for step in range(1, STEPS + 1)
    ]
    for layout, finished in runs.items():
        records = finished.train_metrics()
        for step, (gradients, record) in enumerate(zip(wanted, records, strict=True), start=1):
            error = relative_error(tmp_path / layout, gradients, step)
            print(f"{scope}, {layout}, step {step}: {error:.1e}")
            assert error <= TOLERANCE
            # What clipping goes by is the norm of the normalised gradient.
            norm = math.sqrt(math.fsum(float(g.square().sum()) for g in gradients.values()))
            assert math.isclose(record["grad_norm"], norm, rel_tol=TOLERANCE)
