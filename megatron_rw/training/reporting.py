"""Writes metrics to metrics.jsonl, Prometheus, TensorBoard and W&B."""

import dataclasses
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from megatron.training import get_tensorboard_writer, get_wandb_writer

from megatron_rw.platform.files import write_complete
from megatron_rw.reweighting import LossByDomain, ReweightReport, WeightedSet

if TYPE_CHECKING:
    from megatron_rw.observability.endpoint import Endpoint

Scalars = dict[str, float]


class MetricsFile:
    """`metrics.jsonl`: one object per line, appended, flushed at once.

    After a resume an iteration can appear twice; then the later line counts.
    """

    def __init__(self, log_dir: str) -> None:
        os.makedirs(log_dir, exist_ok=True)
        self._file = open(os.path.join(log_dir, "metrics.jsonl"), "a")  # noqa: SIM115

    def write_arguments(self, arguments: Mapping[str, object]) -> None:
        """Writes `arguments.json` beside it: what the run, or its latest part, was started with."""
        text = json.dumps(arguments, indent=1, sort_keys=True, default=str)
        write_complete(Path(self._file.name).with_name("arguments.json"), f"{text}\n")

    def write(self, record: Mapping[str, object]) -> None:
        """Appends a record of plain numbers; what is not finite becomes null."""
        # JSON has no number that is not finite; Python writes and reads a constant for each.
        finite = json.loads(json.dumps(record), parse_constant=lambda constant: None)
        self._file.write(json.dumps(finite) + "\n")
        self._file.flush()


@dataclass(frozen=True)
class Reporter:
    """Writes the metrics of a run, on the rank that Megatron logs from.

    The names are those of the domains, by index. The file and Prometheus' endpoint are None where
    they are not wanted.
    """

    names: Sequence[str]
    file: MetricsFile | None = None
    endpoint: "Endpoint | None" = None

    def write(self, kind: str, iteration: int, record: Mapping[str, object]) -> None:
        """Writes a line of metrics.jsonl of type `train`, `validation` or `test`.

        Prometheus is given the same values. Tensors of the record are read here, at a point where
        Megatron has just waited for the device.
        """
        if self.file is None and self.endpoint is None:
            return
        line = {"type": kind, "iteration": iteration, "time": time.time(), **record}
        plain = json.loads(json.dumps(line, default=torch.Tensor.item))
        if self.file is not None:
            self.file.write(plain)
        if self.endpoint is not None:
            self.endpoint.update(plain)

    def write_scalars(self, scalars: Scalars, iteration: int) -> None:
        """Writes values, by tag, to TensorBoard and W&B if they are in use."""
        writer, wandb = get_tensorboard_writer(), get_wandb_writer()
        if writer:
            for name, value in scalars.items():
                writer.add_scalar(name, value, iteration)
        if wandb and scalars:
            wandb.log(scalars, iteration)

    def seen(self, losses: LossByDomain) -> list[tuple[str, float]]:
        """Returns the domains that had a token, with their losses; nothing for a single domain."""
        named = self._by_name(losses.by_domain)
        return [(name, loss) for name, loss in named if loss is not None]

    def log_line(self, report: ReweightReport) -> dict[str, float]:
        """Returns what joins Megatron's log line, after its own losses."""
        values = {
            "weighted loss": report.objective,
            "ess": report.ess,
            "max weight": report.max_weight,
            "temperature": report.temperature,
        }
        if report.missing_signals:
            values["missing signals"] = float(report.missing_signals)
        if report.nonfinite_samples:
            values["non-finite samples"] = float(report.nonfinite_samples)
        for name, domain in self._by_name(report.domains):
            if domain.lm_loss is not None:
                values[f"lm loss {name}"] = domain.lm_loss
            values[f"weight {name}"] = domain.weight_share
            if domain.weight_ratio is not None:
                values[f"weight ratio {name}"] = domain.weight_ratio
        return values

    def weights_record(self, report: ReweightReport) -> dict[str, object]:
        """Returns the entry `reweight` of a line of metrics.jsonl."""
        record = {"temperature": report.temperature, **dataclasses.asdict(report)}
        record["domains"] = dict(zip(self.names, record["domains"], strict=True))
        return record

    def weights_scalars(self, report: ReweightReport) -> Scalars:
        """Returns the weights' values for TensorBoard and W&B, by tag."""
        values = {
            "weighted loss": report.objective,
            "ess": report.ess,
            "max weight": report.max_weight,
            "max weight x set size": report.relative_max_weight,
            "share of sets above 2": report.over_bound,
            "temperature": report.temperature,
            "non-finite samples": float(report.nonfinite_samples),
            "smallest sample loss": report.sample_loss_min,
            "largest sample loss": report.sample_loss_max,
            "share of samples beyond the range": report.beyond_range,
            "missing signals": report.missing_signals,
        }
        tagged = {f"reweight/{name}": value for name, value in values.items()}
        for name, domain in self._by_name(report.domains):
            for field, value in dataclasses.asdict(domain).items():
                tagged[f"domain {field.replace('_', ' ')}/{name}"] = value
        return {tag: value for tag, value in tagged.items() if value is not None}

    def _by_name[Value](self, values: Sequence[Value]) -> list[tuple[str, Value]]:
        """Pairs values by domain with its name; returns nothing for a single domain."""
        return list(zip(self.names, values, strict=True)) if len(self.names) > 1 else []

    def samples(self, weighted: WeightedSet, count: int) -> list[dict[str, object]]:
        """Returns the first samples of a set with loss, weight and domain."""
        units = weighted.units
        columns = (units.losses, weighted.weights, units.domain.long())
        return [
            {"loss": loss, "weight": weight, "domain": self.names[domain]}
            for loss, weight, domain in zip(*(c[:count].tolist() for c in columns), strict=True)
        ]
