"""What reweighting adds to the loss path on the host: operators, launches and microseconds.

    python benchmarks/loss_path.py [--device cpu]

One training micro-batch from the model's logits to their gradient, through the program's own loss
function with its metrics, cross-entropy, weights and the collective of data parallelism (in a group
of one), without the model. Logits are small: a device would finish before the host does. Variants
take turns; torch's profiler counts operators that compute or copy and, on a GPU, kernels and their
time.

    MEGATRON_RW_KERNELS=cuda python benchmarks/loss_path.py --device cpu --emulated

counts the operators of the CUDA kernels without a GPU, where they run emulated and no time means
anything.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import sys
import time
import warnings
from argparse import Namespace
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
from torch.profiler import ProfilerActivity, profile

from benchmarks.kernels.record import about, results_file
from benchmarks.kernels.timing import interleave
from megatron_rw import patching
from megatron_rw.integrations import cross_entropy
from megatron_rw.integrations.state import ReweightState
from megatron_rw.kernels.selection import BackendError, BackendName, check_backend, use_backend
from megatron_rw.resilience.step_samples import StepSamples
from megatron_rw.reweighting import ReweightConfig
from megatron_rw.training.batch import Batch
from megatron_rw.training.loss import PretrainLoss
from megatron_rw.training.settings import Settings

SAMPLES, DOMAINS = 8, 3
SHAPES = {"cuda": (256, 8192), "cpu": (16, 64)}
PROFILED, CALLS = 10, 20
VIEWS = set("view view_as transpose select slice unbind expand unsqueeze squeeze detach".split())
VIEWS |= {"as_strided", "empty", "empty_like", "lift_fresh", "result_type"}
COPIES_IF_NEEDED = {"to", "contiguous", "reshape", "flatten"}


class LossPath:
    """Repeats the loss path of one micro-batch.

    Args:
        strategy: `none` or a strategy.
        impl: `megatron`, or the backend of our cross-entropy.
        device: of all tensors.
    """

    def __init__(self, strategy: Any, impl: str, device: torch.device) -> None:
        self._impl = impl
        sequence, vocab = SHAPES[device.type]
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


def count(path: LossPath, device: torch.device) -> dict[str, float]:
    """Operators, kernels and the kernels' microseconds of one micro-batch."""
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
        for _ in range(PROFILED):
            path()
        if device.type == "cuda":
            torch.cuda.synchronize()
    events = profiler.events()
    on_device = [event for event in events if "CUDA" in str(event.device_type)]
    # Those that the program calls, not what they call themselves.
    called = [event for event in events if not _is_operator(event.cpu_parent)]
    found = {"operators": sum(_works(event) for event in called) / PROFILED}
    if device.type == "cuda":
        found["kernels"] = len(on_device) / PROFILED
        found["kernel_microseconds"] = sum(event.device_time for event in on_device) / PROFILED
    return found


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


def host_time(path: LossPath, device: torch.device) -> float:
    """Microseconds of the host for one micro-batch, which does not wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(CALLS):
        path()
    return (time.perf_counter() - start) / CALLS * 1e6


def paths(device: torch.device) -> dict[str, LossPath]:
    """By cross-entropy and strategy; without what cannot run here."""
    impls: list[str] = ["megatron"]
    for name in get_args(BackendName):
        try:
            impls.append(check_backend(device, name))
        except BackendError as error:
            print(f"without {name}: {error}")
    return {
        f"{impl}, {strategy}": LossPath(strategy, impl, device)
        for impl in impls
        for strategy in ("none", "linupper")
    }


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--emulated", action="store_true", help="count the CUDA kernels on the CPU")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    device = torch.device(options.device)
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29579")
    if device.type == "cpu":
        torch.set_num_threads(1)
    if options.emulated:
        from tests.kernels import emulation

        os.environ["MEGATRON_RW_CUDA_LIBRARY"] = str(emulation.library())
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", rank=0, world_size=1)
    parallel_state.initialize_model_parallel()

    variants = paths(device)
    for path in variants.values():
        path()
    found = {name: count(path, device) for name, path in variants.items()}
    if not options.emulated:
        timed: dict[str, list[float]] = interleave(
            options.rounds,
            {name: functools.partial(host_time, path, device) for name, path in variants.items()},
        )
        for name, times in timed.items():
            found[name]["host_microseconds"] = statistics.median(times)
    dist.destroy_process_group()

    print(f"\nloss path of one micro-batch of {SAMPLES} samples on {about(device)['device']}")
    head = ("cross-entropy, strategy", "operators", "kernels", "their us", "host us")
    print("{:26}{:>10}{:>9}{:>10}{:>9}".format(*head))
    for name, row in found.items():
        places = ("operators", "kernels", "kernel_microseconds", "host_microseconds")
        values = (f"{row[place]:.0f}" if place in row else "-" for place in places)
        print("{:26}{:>10}{:>9}{:>10}{:>9}".format(name, *values))
    record = about(device) | {
        "benchmark": "loss path of one micro-batch",
        "samples": SAMPLES,
        "tokens_of_a_sample_and_vocabulary": SHAPES[device.type],
        "rounds": options.rounds,
        "variants": found,
    }
    name = "loss_path_emulated" if options.emulated else "loss_path"
    output = options.output or results_file(name, device)
    output.write_text(json.dumps(record, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
