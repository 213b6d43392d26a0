"""Which data weighs most and least."""

import json
import os
from typing import Any

from megatron.core import mpu

from megatron_rw.integrations import groups
from megatron_rw.resilience.step_samples import StepSamples, gather
from megatron_rw.reweighting.weighed_units import WeighedUnits
from megatron_rw.training.callbacks.base import Callback, LogEvent
from megatron_rw.training.datasets import Domains
from megatron_rw.training.loss import PretrainLoss
from megatron_rw.training.token_values import origin_of


class SamplesCallback(Callback):
    """Writes the units of highest and lowest weight to samples.jsonl (`--reweight-dump-samples`).

    They are those of the last step before a log line, over all ranks.
    """

    def __init__(
        self, count: int, log_dir: str, domains: Domains, loss: PretrainLoss, samples: StepSamples
    ) -> None:
        self._count = count
        self._path = os.path.join(log_dir, "samples.jsonl")
        self._domains, self._loss, self._samples = domains, loss, samples

    def before_log(self, log: LogEvent) -> None:
        """Writes, at a point where Megatron waits for the device anyway."""
        # Tensor- and context-parallel ranks have the same units, and one of them knows their place.
        one = not (mpu.get_tensor_model_parallel_rank() or mpu.get_context_parallel_rank())
        if not (log.prints and one and groups.has_loss()):
            return
        group = mpu.get_data_parallel_group()
        lines: list[dict[str, Any]] = []
        for name, units in zip(
            ("highest", "lowest"), self._loss.extremes(self._count), strict=True
        ):
            shared = {"iteration": log.iteration, "which": name}
            mine = [shared | record for record in self._records(units)]
            found = [record for part in gather(mine, group) for record in part]
            found.sort(key=lambda record: record["weight"], reverse=name == "highest")
            lines += found[: self._count]
        if mpu.get_data_parallel_rank() == 0:
            with open(self._path, "a") as file:
                file.writelines(json.dumps(record) + "\n" for record in lines)

    def _records(self, units: WeighedUnits) -> list[dict[str, Any]]:
        places, train, records = self._samples.places(), self._domains.train, []
        for loss, weight, row, position in units.read():
            assert train is not None
            sequence, member, within = places[row].tolist()
            path, domain = self._domains.train_members[member]
            document, offset, tokens = origin_of(train.member(member), within).stretch(position)
            records.append(
                {
                    "dataset": os.path.abspath(path),
                    "document": document,
                    "offset": offset,
                    "tokens": tokens,
                    "sequence": sequence,
                    "domain": domain,
                    "loss": loss,
                    "weight": weight,
                }
            )
        return records
