"""What reweighting adds to the loss path on the host: operators, launches and microseconds.

    python benchmarks/loss_path.py [--device cpu]

One training micro-batch from the model's logits to their gradient, through the program's own loss
function with its metrics, cross-entropy, weights and the collective of data parallelism (in a group
of one), without the model. Logits are small: a device would finish before the host does. Variants
take turns; torch's profiler counts operators that compute or copy and, on a GPU, kernels and their
time.

    MEGATRON_RW_KERNELS=cuda python benchmarks/loss_path.py --device cpu --emulated

counts the operators with our CUDA kernels without a GPU, where they run emulated and no time means
anything.
"""

from __future__ import annotations

import functools
import statistics
import sys
import time
import warnings
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
warnings.simplefilter("ignore")

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.transformer import TransformerConfig
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.kernels.record import Result, arguments, print_table
from benchmarks.kernels.timing import interleave
from megatron_rw import patching
from megatron_rw.integrations import cross_entropy
from megatron_rw.integrations.state import ReweightState
from megatron_rw.kernels import cuda_launch
from megatron_rw.kernels.options import BackendError
from megatron_rw.kernels.selection import BackendName, check_backend, use_backend
from megatron_rw.resilience.step_samples import StepSamples
from megatron_rw.reweighting import ReweightConfig
from megatron_rw.training.batch import Batch
from megatron_rw.training.loss import PretrainLoss
from megatron_rw.training.settings import Settings

SAMPLES, DOMAINS = 8, 3
SHAPES = {"cuda": (256, 8192), "cpu": (16, 64), "rehearsal": (1, 16)}
# Of a path: profiled, and timed in a round.
CALLS = (10, 20)
VIEWS = set("view view_as transpose select slice unbind expand unsqueeze squeeze detach".split())
VIEWS |= {"as_strided", "empty", "empty_like", "new_empty", "lift_fresh", "result_type"}
COPIES_IF_NEEDED = {"to", "contiguous", "reshape", "flatten"}


class LossPath:
    """Repeats the loss path of one micro-batch.

    Args:
        strategy: `none` or a strategy.
        impl: `megatron`, or the backend of our cross-entropy.
        device: of all tensors.
        shape: tokens of a sample, and vocabulary.
    """

    def __init__(
        self, strategy: Any, impl: str, device: torch.device, shape: tuple[int, int]
    ) -> None:
        self._impl = impl
        sequence, vocab = shape
        generator = torch.Generator().manual_seed(0)
        labels = torch.randint(0, vocab, (SAMPLES, sequence), generator=generator)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self._logits = torch.randn(sequence, SAMPLES, vocab).to(device, dtype).requires_grad_()
        domain = torch.arange(SAMPLES, device=device) % DOMAINS
        self._batch = Batch(
            labels=labels.to(device),
            loss_mask=torch.ones(SAMPLES, sequence, device=device),
            domain=domain,
        )
        model_config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1)
        self._module = SimpleNamespace(config=model_config, tp_group=_tensor_parallel_group())
        config = ReweightConfig(strategy=strategy)
        megatron = Namespace(
            curr_iteration=0,
            logits_load_dir=None,
            micro_batch_size=SAMPLES,
            check_for_nan_in_loss_and_grad=False,
            check_for_spiky_loss=False,
            rerun_mode="disabled",
        )
        settings = Settings(megatron=megatron, device="cpu", reweight=config)
        self._loss = PretrainLoss(settings, ReweightState(config), DOMAINS, StepSamples([]))
        self._call = {"model": [self._module], "num_microbatches": 1, "data_iterator": None}

    def __call__(self) -> None:
        """One micro-batch."""
        self._loss.begin_step()
        ours = self._impl != "megatron"
        use_backend(self._impl if ours else None)  # type: ignore[arg-type]
        with patching.applied(cross_entropy.patches() if ours else ()):
            if self._loss.reweighting is None:
                self._schedule(**self._call)
            else:
                self._loss.reweighting.run(self._schedule, self._call)

    def _schedule(self, **_: Any) -> None:
        batch = self._batch
        assert batch.labels is not None
        assert batch.loss_mask is not None
        cross_entropy.announce_mask(batch.labels, batch.loss_mask)
        # A model's last operation; the gradient goes no further.
        logits = self._logits.view_as(self._logits)
        token_losses = LanguageModule.compute_language_model_loss(
            self._module, batch.labels, logits
        )
        loss, divisor, _ = self._loss(batch, token_losses, model=None, training=True)
        torch.autograd.grad(loss / divisor, self._logits)


def _tensor_parallel_group() -> dist.ProcessGroup:
    group: dist.ProcessGroup = parallel_state.get_tensor_model_parallel_group()
    return group


def count(path: LossPath, device: torch.device, calls: int) -> dict[str, float]:
    """Operators, kernels and the kernels' microseconds of one micro-batch."""
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with _launches_named(device), profile(activities=activities) as profiler:
        for _ in range(calls):
            path()
        if device.type == "cuda":
            torch.cuda.synchronize()
    events = profiler.events()
    on_device = [event for event in events if "CUDA" in str(event.device_type)]
    # Those that the program calls, not what they call themselves.
    called = [event for event in events if not _is_operator(event.cpu_parent)]
    found = {"operators": sum(_works(event) for event in called) / calls}
    if device.type == "cuda":
        found["kernels"] = len(on_device) / calls
        found["kernel_microseconds"] = sum(event.device_time for event in on_device) / calls
    return found


@contextmanager
def _launches_named(device: torch.device) -> Iterator[None]:
    """Have the profiler see our CUDA kernels being started: they are no operators of torch."""
    place = "cpu" if device.type == "cpu" else f"cuda:{torch.cuda.current_device()}"
    try:
        launch = cuda_launch.launcher(torch.device(place))
    except BackendError:
        yield
        return

    def named(kernel: str, grid: tuple[int, int], threads: int, *rest: float) -> None:
        with record_function(f"megatron_rw::{kernel}"):
            launch(kernel, grid, threads, *rest)

    cuda_launch.use_launcher(place, named)
    yield
    cuda_launch.use_launcher(place, launch)


def _is_operator(event: Any) -> bool:
    return event is not None and event.name.startswith(("aten::", "megatron_rw", "c10d::"))


def _works(event: Any) -> bool:
    """Whether it is an operator that computes or copies: on a GPU, a launch at least."""
    if not _is_operator(event) or event.name.removeprefix("aten::") in VIEWS:
        return False
    if event.name.removeprefix("aten::") in COPIES_IF_NEEDED:
        return any(
            child.name not in ("aten::view", "aten::as_strided") for child in event.cpu_children
        )
    return True


def host_time(path: LossPath, device: torch.device, calls: int) -> float:
    """Microseconds of the host for one micro-batch, which does not wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        path()
    return (time.perf_counter() - start) / calls * 1e6


def paths(device: torch.device, shape: tuple[int, int]) -> dict[str, LossPath]:
    """By cross-entropy and strategy; without what cannot run here."""
    impls: list[str] = ["megatron"]
    for name in get_args(BackendName):
        use_backend(name)
        try:
            impls.append(check_backend(device))
        except BackendError as error:
            print(f"without {name}: {error}")
    return {
        f"{impl}, {strategy}": LossPath(strategy, impl, device, shape)
        for impl in impls
        for strategy in ("none", "linupper")
    }


def main() -> int:
    """Measure, print, and write after the counts and after the times."""
    parser = arguments(__doc__, 31)
    parser.add_argument("--emulated", action="store_true", help="count the CUDA kernels on the CPU")
    options = parser.parse_args()
    result = Result("loss_path_emulated" if options.emulated else "loss_path", options)
    device = result.device
    if options.emulated:
        from tests.kernels import emulation

        emulation.install()
    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group(store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()

    shape = SHAPES["rehearsal" if options.rehearse else device.type]
    profiled, timed = (1, 1) if options.rehearse else CALLS
    variants = paths(device, shape)
    for path in variants.values():
        path()
    found = {name: count(path, device, profiled) for name, path in variants.items()}
    result.save(samples=SAMPLES, tokens_of_a_sample_and_vocabulary=shape, variants=found)
    if not options.emulated:
        series: dict[str, list[float]] = interleave(
            options.rounds,
            {
                name: functools.partial(host_time, path, device, timed)
                for name, path in variants.items()
            },
        )
        for name, times in series.items():
            found[name]["host_microseconds"] = statistics.median(times)
        result.save(rounds=options.rounds)
    dist.destroy_process_group()

    places = ("operators", "kernels", "kernel_microseconds", "host_microseconds")
    rows = [
        [name, *(f"{row[place]:.0f}" if place in row else "-" for place in places)]
        for name, row in found.items()
    ]
    head = ["cross-entropy, strategy", "operators", "kernels", "their us", "host us"]
    print_table(f"loss path of one micro-batch of {SAMPLES} samples", [head, *rows])
    return 0


if __name__ == "__main__":
    sys.exit(main())
