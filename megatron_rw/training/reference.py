"""A second model without gradients, whose losses on a step's micro-batches the weights compare.

For the signal `excess` it is the model of another run's checkpoint, of a shape of its own. For
`progress` it is this run's own model as it was some steps ago.
"""

import dataclasses
import functools
import re
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from megatron.core import dist_checkpointing, mpu
from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import _fork_rng
from megatron.core.utils import unwrap_model
from megatron.training import checkpointing, training
from megatron.training.argument_utils import gpt_config_from_args
from megatron.training.utils import print_rank_0
from torch import Tensor

from megatron_rw.integrations.schedule import Schedule, run_forward_only
from megatron_rw.patching import Around, Patch
from megatron_rw.resilience.folder import (
    SNAPSHOT_PREFIX,
    CheckpointFolder,
    saved_arguments,
)
from megatron_rw.training.batch import Batch, BatchReader
from megatron_rw.training.callbacks.base import Callback
from megatron_rw.training.forward_step import ForwardPass
from megatron_rw.training.loss import LossResult
from megatron_rw.training.settings import Settings

# Arguments that say how a model is computed and not what, beside Megatron's ModelParallelConfig.
_HOW = re.compile(
    "backend|batch_invariant|clone_scatter|cp_comm_type|cuda_graph|deepep|dispatcher|"
    "distribute_saved|flash|fp4|fp8|fused|fusion|grouped|hybridep|_impl$|inference|kitchen|"
    "mem_eff|memory_efficient|ncclep|offload|overlap|persist|precision|recompute|stash|"
    "symmetric_ar|use_te_|use_transformer_engine_op_fuser"
)
# Its layers are spread evenly over the stages, and it predicts one token.
_EVENLY: dict[str, Any] = {
    "pipeline_model_parallel_layout": None,
    "decoder_first_pipeline_num_layers": None,
    "decoder_last_pipeline_num_layers": None,
    "account_for_embedding_in_pipeline_split": False,
    "account_for_loss_in_pipeline_split": False,
    "mtp_num_layers": None,
}


def reference_arguments(args: Namespace, saved: Mapping[str, Any]) -> Namespace:
    """Returns the arguments of the model in a checkpoint, computed and laid out as this run's is.

    `saved` are the arguments in the checkpoint, of which those that say what a model computes are
    taken. Others, and those that an older Megatron did not save, are the run's.
    """
    layout = {field.name for field in dataclasses.fields(ModelParallelConfig)}
    theirs = {k: v for k, v in saved.items() if k not in layout and not _HOW.search(k)}
    return Namespace(**(vars(args) | theirs | _EVENLY))


class SecondModel:
    """Scores the micro-batches of each step; an `integrations.step.ReferencePass`.

    It is built when Megatron has built and loaded the run's model. `callbacks` are told of its
    micro-batches.
    """

    def __init__(self, settings: Settings, callbacks: Sequence[Callback]) -> None:
        self._settings, self._callbacks = settings, callbacks
        self._args, self._config = settings.megatron, settings.reweight
        self._model: list[Any] = []
        # Whether the model holds a snapshot.
        self._taken = False
        self._losses: list[Tensor] = []

    def patches(self) -> list[Patch]:
        """Returns what builds the model, and what saves a snapshot with every checkpoint."""
        builds = "The training program builds one model, and has no hook after that."
        saves = "It says what a checkpoint holds."
        found = [Patch(training, "setup_model_and_optimizer", Around(self._build), builds)]
        if self._config.signal == "progress":
            found.append(Patch(checkpointing, "generate_state_dict", Around(self._save), saves))
        return found

    def run(self, schedule: Schedule, call: dict[str, Any], step: int) -> list[Tensor]:
        """Runs the forward passes of a step; see `integrations.step.ReferencePass`."""
        interval = self._config.snapshot_interval
        if interval is not None and (not self._taken or step % interval == 0):
            self._take(call["model"])
        self._losses = []
        replaced = {"forward_step_func": self._forward, "model": self._model}
        run_forward_only(schedule, call | replaced)
        return self._losses

    @functools.cached_property
    def _forward(self) -> ForwardPass[Callable[..., LossResult]]:
        # A model in evaluation mode is given micro-batches of that size.
        size = {"eval_micro_batch_size": self._args.micro_batch_size}
        args = Namespace(**vars(self._args) | size)
        settings = dataclasses.replace(self._settings, megatron=args)
        reader = BatchReader(args, num_domains=1)
        return ForwardPass(settings, reader, self._collect, self._callbacks)

    def _build(self, proceed: Callable[..., Any], call: dict[str, Any]) -> Any:
        built = proceed()
        args, path = self._args, self._config.reference_load
        checkpoint = None if path is None else CheckpointFolder.meant(path)
        if checkpoint is not None:
            args = reference_arguments(args, saved_arguments(checkpoint.common()))
        print_rank_0(f"> building the second model, for the signal {self._config.signal}")
        config = gpt_config_from_args(Namespace(**vars(args) | {"cuda_graph_impl": "none"}))
        # The run's random numbers stay those of a run without this model.
        with _fork_rng():
            self._model = config.get_builder_cls()(config).build_distributed_models(
                pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
                wrap_with_ddp=False,
                data_parallel_random_init=False,
            )
        for chunk in self._model:
            chunk.eval().requires_grad_(False)
        if checkpoint is not None:
            self._load(str(checkpoint.path))
        elif self._args.iteration:
            self._resume(checkpointing.get_load_checkpoint_path_by_args(self._args))
        return built

    def _resume(self, path: str) -> None:
        """Loads the snapshot that the run's checkpoint holds."""
        if dist_checkpointing.check_is_distributed_checkpoint(path):
            names = dist_checkpointing.load_tensors_metadata(path)
            self._taken = any(name.startswith(SNAPSHOT_PREFIX) for name in names)
        if self._taken:
            self._load(path, SNAPSHOT_PREFIX)
        else:
            print_rank_0(
                "> the checkpoint has no snapshot: progress is measured against the model as it "
                "is now, until the next is taken"
            )

    def _take(self, model: Any) -> None:
        """Copies the parameters of the run's model."""
        model = model if isinstance(model, list) else [model]
        if self._args.overlap_param_gather:
            training.force_param_sync(model)
        for mine, theirs in zip(unwrap_model(self._model), unwrap_model(model), strict=True):
            mine.load_state_dict(theirs.state_dict())
        self._taken = True

    def _save(self, proceed: Callable[..., Any], call: dict[str, Any]) -> Any:
        state = proceed()
        # Loading asks for no iteration.
        if call["iteration"] is not None and self._taken:
            metadata = call["model_sd_kwargs"]["metadata"]
            state["reweight_snapshot"] = self._sharded(metadata, SNAPSHOT_PREFIX)
        return state

    def _sharded(self, metadata: dict[str, Any], prefix: str) -> dict[str, Any]:
        """Returns the state by chunk, whose parts are called in a checkpoint as the model's are."""
        state = {str(i): m.sharded_state_dict(metadata=metadata) for i, m in enumerate(self._model)}
        add_prefix_for_sharding(state, prefix)
        return state

    def _load(self, path: str, prefix: str = "") -> None:
        """Loads the model from a checkpoint that any layout has written. Collective."""
        metadata = dist_checkpointing.load_content_metadata(path) or {}
        metadata["dp_cp_group"] = mpu.get_data_parallel_group(with_context_parallel=True)
        strictness = self._args.dist_ckpt_strictness
        state = dist_checkpointing.load(self._sharded(metadata, prefix), path, strict=strictness)
        for i, chunk in enumerate(self._model):
            chunk.load_state_dict(state[str(i)])

    def _collect(
        self, batch: Batch, token_losses: Tensor, *, model: Any, training: bool
    ) -> LossResult:
        """Keeps the losses of a micro-batch; takes a loss's place."""
        # Detached, they are without what our cross-entropy attaches for a loss function.
        self._losses.append(token_losses.detach().float())
        nothing = torch.zeros((), device=token_losses.device)
        return nothing, nothing.int(), {}
