"""Training steps of several kinds, taking turns in one run of the real program.

What a step does is switched from step to step, in a random order in each block of all kinds, so
that drift of the machine and after-effects of a step hit all alike; everything else stays the same.
On the CPU each rank keeps to one core. A step lasts from one call of Megatron's `train_step` to the
next and so includes the logging.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, cast

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import measured

# The first steps warm caches and allocators up.
SKIPPED_BLOCKS = 4
# Of the logits of `layer`; a quarter of those of end_to_end.py.
LAYER_BUDGET = 1 << 30
PROGRESS_SECONDS = 5
# What a variant sets beyond the paper, by its name. The run is given the snapshots and the static
# weights, of which each variant takes what it names.
CHOICES: dict[str, dict[str, Any]] = {
    "": {},
    "token-normalizer": {"normalizer": "token"},
    "document": {"unit": "document"},
    "token": {"unit": "token"},
    "entropy": {"signal": "entropy"},
    "softmax": {"strategy": "softmax"},
    "topk-token": {"strategy": "topk", "top_share": 0.6, "unit": "token", "temperature": 1.0},
    "target-ess": {"target_ess": 0.8},
    "target-ess-token": {"target_ess": 0.8, "unit": "token"},
    "capped-token": {"max_weight": 2.0, "range": "quantile", "unit": "token"},
    "quantile": {"range": "quantile"},
    "sample-weights": {"sample_weights": "given"},
    "progress": {"signal": "progress", "snapshot_interval": 1000},
}
# Choices of `none`: steps with this many all-reduces of 16 numbers between the forward and the
# backward pass. They show what waiting for the other ranks costs by itself.
ALL_REDUCES = {"1-all-reduce": 1, "2-all-reduces": 2, "3-all-reduces": 3}


@dataclasses.dataclass(frozen=True)
class Variant:
    """What a step does: SCOPE of reweighting, or `none`, a choice, and whose cross-entropy.

    Attributes:
        scope: as in --reweight-scope, or `none`.
        choice: of `CHOICES`, or of `ALL_REDUCES` if the scope is `none`.
        cross_entropy: `core`, `fused` (ours), `torch` (torch's own, without tensor parallelism) or
            `layer` (ours, in one operation with the output layer).
    """

    scope: str
    choice: str
    cross_entropy: str

    @staticmethod
    def named(name: str) -> Variant:
        """`SCOPE[:CHOICE]`, with core's, or `SCOPE[:CHOICE]+CROSS_ENTROPY`."""
        setting, _, cross_entropy = name.partition("+")
        scope, _, choice = setting.partition(":")
        return Variant(scope, choice, cross_entropy or "core")


@dataclasses.dataclass(frozen=True)
class Job:
    """What the ranks are to do; reaches them in the environment.

    Attributes:
        device: `cpu` or `cuda`.
        variants: by name.
        output: where rank 0 writes the steps' seconds and, on a GPU, their peak memory, after
            every block of steps.
    """

    device: str
    variants: tuple[str, ...]
    output: Path

    _VARIABLE = "STEP_TIME_JOB"

    def environment(self) -> dict[str, str]:
        """Of the ranks; one thread each, as they share the cores."""
        values = [self.device, *self.variants, str(self.output)]
        return os.environ | {"OMP_NUM_THREADS": "1", self._VARIABLE: json.dumps(values)}

    @classmethod
    def from_environment(cls) -> Job:
        """In a rank."""
        device, *variants, output = json.loads(os.environ[cls._VARIABLE])
        return cls(device, tuple(variants), Path(output))

    def write(self, starts: Sequence[float], peaks: Sequence[int]) -> None:
        """Write what the steps so far took; who reads meanwhile finds a whole file."""
        seconds = [end - start for start, end in itertools.pairwise(starts)]
        partial = self.output.with_suffix(".partial")
        partial.write_text(json.dumps({"seconds": seconds, "peak_bytes": peaks[1:]}))
        partial.replace(self.output)


def variant(step: int, variants: tuple[str, ...]) -> str:
    """What a step does: blocks of all variants, each in an order of its own."""
    block, position = divmod(step, len(variants))
    return _order(block, variants)[position]


@functools.cache
def _order(block: int, variants: tuple[str, ...]) -> list[str]:
    return random.Random(block).sample(variants, len(variants))


def torch_loss(module: Any, labels: Any, logits: Any) -> Any:
    """`[b, s]` losses from `[b, s]` labels and `[s, b, V]` logits by torch's cross-entropy."""
    from torch.nn.functional import cross_entropy

    target = labels.transpose(0, 1)
    losses = cross_entropy(logits.flatten(0, 1).float(), target.flatten(), reduction="none")
    return losses.view(target.shape).transpose(0, 1).contiguous()


def worker() -> None:
    """One rank: the program with alternating variants and a clock round its steps."""
    job = Job.from_environment()
    # A rank that changes cores makes the other wait, in any scope.
    cores = sorted(os.sched_getaffinity(0))
    if job.device == "cpu":
        os.sched_setaffinity(0, {cores[int(os.environ["LOCAL_RANK"]) % len(cores)]})
    import pretrain_gpt_rw
    from megatron_rw.platform import select_device

    select_device(["--device", job.device])
    import torch
    import torch.distributed as dist
    from megatron.core.models.common.language_module.language_module import LanguageModule
    from megatron.training import training

    from megatron_rw.integrations import cross_entropy
    from megatron_rw.integrations.output_layer import FusedOutputLayer
    from megatron_rw.integrations.state import ReweightState
    from megatron_rw.integrations.step import StepReweighting
    from megatron_rw.reweighting import ReweightConfig, WeightMetrics
    from megatron_rw.training import forward_step, loss
    from megatron_rw.training.settings import Settings
    from megatron_rw.training.token_values import WEIGHTS_KEY, TokenValues

    losses = {"core": LanguageModule.compute_language_model_loss, "torch": torch_loss}
    # By variant.
    steps: dict[str, StepReweighting] = {}
    metrics: dict[str, Any] = {}
    switched: list[loss.PretrainLoss] = []
    original_init = loss.PretrainLoss.__init__

    def init(self: loss.PretrainLoss, settings: Settings, *rest: Any) -> None:
        original_init(self, settings, *rest)
        switched.append(self)
        args, base = settings.megatron, settings.reweight
        for name in job.variants:
            chosen = Variant.named(name)
            metrics[name] = WeightMetrics(self.weight_metrics.num_domains)
            if chosen.scope == "none":
                continue
            plain = {"signal": "loss", "snapshot_interval": None, "sample_weights": None}
            set_ = plain | CHOICES[chosen.choice] | {"scope": chosen.scope}
            config = dataclasses.replace(base, **cast(Any, set_))
            steps[name] = StepReweighting(
                config,
                ReweightState(config),
                lambda: int(args.curr_iteration),
                self._sets.append,
                rest[-1] if config.signal == "progress" else None,
            )

    loss.PretrainLoss.__init__ = init  # type: ignore[method-assign, assignment]
    all_reduces = 0
    original_loss = loss.PretrainLoss.__call__

    def after_all_reduces(*args: Any, **kwargs: Any) -> Any:
        for _ in range(all_reduces):
            dist.all_reduce(torch.zeros(16))
        return original_loss(*args, **kwargs)

    loss.PretrainLoss.__call__ = after_all_reduces  # type: ignore[method-assign]
    # What the forward step gives to the model besides a batch.
    model_options: dict[str, Any] = {}
    original_forward_init = forward_step.ForwardStep.__init__
    readers: list[Any] = []

    def forward_init(self: forward_step.ForwardStep, settings: Any, reader: Any, *a: Any) -> None:
        original_forward_init(self, settings, reader, *a)
        self._model_options = model_options
        readers.append(reader)

    forward_step.ForwardStep.__init__ = forward_init  # type: ignore[method-assign, assignment]
    fused_layer = FusedOutputLayer(LAYER_BUDGET)
    # The data loader reads a step's samples within it (--num-workers 0), with these or without.
    original_values = TokenValues.of

    def values(self: TokenValues, *sample: Any) -> Any:
        return original_values(self, *sample) if readers[0]._value_keys else {}

    TokenValues.of = values  # type: ignore[method-assign, assignment]

    on_gpu = job.device == "cuda"
    starts: list[float] = []
    peaks: list[int] = []
    original_step = training.train_step

    # Under its signature: the program asks for arguments by name.
    @functools.wraps(original_step)
    def timed_step(*args: Any, **kwargs: Any) -> Any:
        nonlocal all_reduces
        name = variant(len(starts), job.variants)
        chosen = Variant.named(name)
        [pretrain_loss], [reader] = switched, readers
        pretrain_loss.reweighting = steps.get(name)
        pretrain_loss.weight_metrics = metrics[name]
        all_reduces = ALL_REDUCES.get(chosen.choice, 0)
        config = steps[name]._config if name in steps else ReweightConfig()
        pretrain_loss._config = config
        reader._with_documents = config.unit == "document"
        reader._value_keys = [WEIGHTS_KEY] if config.sample_weights else []
        LanguageModule.compute_language_model_loss = losses.get(
            chosen.cross_entropy, losses["core"]
        )
        if chosen.cross_entropy == "fused":
            [ours] = cross_entropy.patches(entropy=config.signal == "entropy")
            LanguageModule.compute_language_model_loss = ours.new
        model_options.clear()
        if chosen.cross_entropy == "layer":
            model_options["output_processor"] = fused_layer
        if on_gpu:
            torch.cuda.synchronize()
            peaks.append(torch.cuda.max_memory_allocated())
            torch.cuda.reset_peak_memory_stats()
        starts.append(time.perf_counter())
        if len(starts) % len(job.variants) == 1 and os.environ["RANK"] == "0":
            job.write(starts, peaks)
        return original_step(*args, **kwargs)

    training.train_step = timed_step
    pretrain_gpt_rw.main()


def summarise(
    seconds: Sequence[float], variants: tuple[str, ...], base: str = "none"
) -> dict[str, Any]:
    """Median of the ratios within blocks over one of the variants, and a bootstrap interval."""
    size = len(variants)
    blocks = []
    for first in range(SKIPPED_BLOCKS * size, len(seconds) - size + 1, size):
        steps = range(first, first + size)
        blocks.append({variant(step, variants): seconds[step] for step in steps})
    rng = random.Random(0)
    result: dict[str, Any] = {
        "blocks": len(blocks),
        f"median_step_ms_{base}": 1000 * statistics.median(block[base] for block in blocks),
    }
    for name in set(variants) - {base}:
        ratios = [block[name] / block[base] for block in blocks]
        medians = sorted(statistics.median(rng.choices(ratios, k=len(ratios))) for _ in range(2000))
        result[name] = {
            "ratio": statistics.median(ratios),
            "ratio_low": medians[50],
            "ratio_high": medians[1950],
        }
    return result


def run(
    job: Job,
    processes: int,
    flags: Sequence[str],
    folder: Path,
    progress: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Run the ranks; what rank 0 wrote, which `progress` gets every few seconds before."""
    worker = [str(Path(__file__).resolve()), "--worker"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(processes), *worker, *flags]
    with ThreadPoolExecutor(1) as pool:
        ranks = pool.submit(measured.run, command, job.environment(), folder, watch_memory=False)
        while not wait([ranks], PROGRESS_SECONDS).done:
            if progress is not None and job.output.exists():
                progress(json.loads(job.output.read_text()))
        ranks.result()
    result: dict[str, Any] = json.loads(job.output.read_text())
    return result


if __name__ == "__main__":
    sys.argv.remove("--worker")
    worker()
