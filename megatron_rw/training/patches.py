"""The one table of names that the program replaces in Megatron, torch and Python.

Megatron's training program has no hooks; each entry says why there is no other way. The CPU has a
table of its own in `platform/cpu.py`, and tools that take the flags of a job replace the writers of
its logs in `arguments.py`. A test compares the signatures of the originals with those of the
release that the entries were written for.
"""

import importlib.util

import torch
from megatron.core.datasets import utils as dataset_utils
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.training import training

from megatron_rw.integrations import checkpoint, cross_entropy, schedule
from megatron_rw.integrations.logit_scale import LogitScale
from megatron_rw.integrations.state import ReweightState
from megatron_rw.patching import Around, Patch
from megatron_rw.resilience import atomic_index, exit_status, safe_pickle, writer
from megatron_rw.resilience.saving import SaveGuard
from megatron_rw.resilience.step_guard import StepGuard
from megatron_rw.training.loop import TrainingLoop
from megatron_rw.training.reference import SecondModel
from megatron_rw.training.settings import Settings


def early_patches() -> list[Patch]:
    """Returns the patches that must be in place before Megatron parses its arguments."""
    return [*safe_pickle.patches(), *exit_status.patches()]


def patches(
    settings: Settings,
    loop: TrainingLoop,
    state: ReweightState,
    guard: StepGuard | None,
    save_guard: SaveGuard | None,
    second: SecondModel | None,
    logit_scale: LogitScale | None,
) -> list[Patch]:
    """Returns the other patches: what a run with these settings replaces.

    There is no guard of steps where Megatron does not check their numbers, and no guard of saving
    for checkpoint formats that it does not know.
    """
    fused = settings.kernels.cross_entropy_impl == "fused"
    return [
        *_loop_patches(loop),
        *schedule.patches(),
        *(cross_entropy.patches(settings.wants_entropy) if fused else ()),
        # Around the cross-entropy that is in use.
        *(logit_scale.patches() if logit_scale is not None else ()),
        *checkpoint.patches(state, settings.megatron),
        *(second.patches() if second is not None else ()),
        *(guard.patches() if guard is not None else ()),
        *((*save_guard.patches(), *writer.patches(settings.device)) if save_guard else ()),
        *atomic_index.patches(),
        *repairs(),
    ]


def _loop_patches(loop: TrainingLoop) -> list[Patch]:
    why = "The training loop has no callbacks; it looks this function up by name on every rank."
    return [
        Patch(training, name, Around(run), why)
        for name, run in {
            "initialize_megatron": loop.initialize_megatron,
            "build_train_valid_test_data_iterators": loop.build_data_iterators,
            "train_step": loop.train_step,
            "training_log": loop.training_log,
            "evaluate_and_print_results": loop.evaluate,
        }.items()
    ]


def repairs() -> list[Patch]:
    """Returns what repairs defects of Megatron 0.19.2; docs/upstream.md describes them."""
    load = torch.no_grad()(DistributedOptimizer.load_state_dict)
    views = (
        "In an fp32 run its main parameters are views of leaves that require a gradient, into "
        "which it copies: a resume fails."
    )
    found = [Patch(DistributedOptimizer, "load_state_dict", load, views)]
    if importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is not None:
        why = "It runs make, for which the wheel has no Makefile, though it has what make builds."
        found.append(Patch(dataset_utils, "compile_helpers", lambda: None, why))
    return found
