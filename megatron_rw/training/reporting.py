"""What the user sees: Megatron's log line, TensorBoard, W&B and metrics.jsonl."""

from __future__ import annotations

import dataclasses
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from megatron.training import (
    get_tensorboard_writer,
    get_wandb_writer,
    print_rank_last,
)

from megatron_rw.observability.metrics_file import MetricsFile, numbers
from megatron_rw.observability.stragglers import SlowestRank
from megatron_rw.reweighting import LossByDomain, ReweightReport, WeightedSet

if TYPE_CHECKING:
    # It imports `prometheus_client`, which is optional.
    from megatron_rw.observability.endpoint import Endpoint

Scalars = dict[str, float]

_HISTOGRAM_BINS = 30


class Reporter:
    """Writes the metrics of the rank that Megatron logs from, the last; idle on the others.

    Args:
        args: validated.
        domain_names: by domain index.
        endpoint: of this rank, for Prometheus.

    Attributes:
        names: domain names by index.
        writes: whether this rank writes anything.
    """

    def __init__(
        self, args: Namespace, domain_names: Sequence[str], endpoint: Endpoint | None = None
    ) -> None:
        self._endpoint = endpoint
        self.names = tuple(domain_names)
        self._log_samples: int = args.reweight_log_samples
        self.writes: bool = args.rank == args.world_size - 1
        self._file: MetricsFile | None = None
        if args.log_dir is not None and self.writes:
            self._file = MetricsFile(args.log_dir)

    def step(self, iteration: int, samples: int, skipped: bool) -> None:
        """Note a step, logged or not; see `Endpoint.step`."""
        if self._endpoint is not None:
            self._endpoint.step(iteration, samples, skipped)

    def saved(self, iteration: int) -> None:
        """Note a complete checkpoint."""
        if self._endpoint is not None:
            self._endpoint.saved(iteration)

    def train_step(
        self,
        iteration: int,
        megatron: Mapping[str, Any],
        report: ReweightReport | None,
        temperature: float | None,
        losses: LossByDomain | None,
        last_set: WeightedSet | None,
        speed: Mapping[str, float],
        slowest: SlowestRank | None,
        events: Mapping[str, int] | None = None,
    ) -> None:
        """Write one logged training step.

        Args:
            iteration: completed iterations.
            megatron: what Megatron reports of the step (lm loss, grad norm, …).
            report: the weights of the interval; None without reweighting.
            temperature: of the last step; None without reweighting.
            losses: by domain, for a run without reweighting.
            last_set: the last weighted set, for the histogram and the samples.
            speed: seconds per step and tokens per second over the interval.
            slowest: the interval's slowest rank, where that is looked for.
            events: how often something went wrong since the last interval, by name.
        """
        if not self.writes:
            return
        record: dict[str, object] = {"type": "train", "iteration": iteration, "time": time.time()}
        record |= {name.replace(" ", "_"): value for name, value in megatron.items()}
        events = events or {}
        record["speed"] = speed
        record |= {name.replace(" ", "_"): count for name, count in events.items()}
        scalars: Scalars = {f"non-finite/{name}": float(n) for name, n in events.items()}
        if slowest is not None:
            print_rank_last(f" {slowest}, up to iteration {iteration}")
            record["slowest_rank"] = dataclasses.asdict(slowest)
            scalars |= {"slowest rank/rank": slowest.rank, "slowest rank/ratio": slowest.ratio}
        if report is not None and temperature is not None:
            record["reweight"] = self._reweight_record(report, temperature)
            scalars |= self._reweight_scalars(report, temperature)
        elif losses is not None and len(self.names) > 1:
            record["domains"] = self._loss_records(losses)
            scalars |= self._loss_scalars("domain lm loss", losses)
        if last_set is not None and self._log_samples:
            record["samples"] = self._sample_records(last_set)
        self._write_scalars(scalars, iteration)
        if last_set is not None:
            self._write_histograms(last_set, iteration)
        self._write_record(record)

    def validation(
        self, iteration: int, split: str, losses: LossByDomain, write_to_tensorboard: bool
    ) -> None:
        """Write one evaluation; where there are several domains, also as a line of its own.

        Args:
            iteration: completed iterations.
            split: `validation` or `test`.
            losses: unweighted, overall and by domain.
            write_to_tensorboard: Megatron's wish for this evaluation.
        """
        if not self.writes:
            return
        record: dict[str, object] = {
            "type": split,
            "iteration": iteration,
            "time": time.time(),
            "lm_loss": losses.overall,
        }
        if len(self.names) > 1:
            record["domains"] = self._loss_records(losses)
            seen = [f"{name}: {loss:.6E}" for name, loss in self._seen(losses)]
            print_rank_last(
                f" {split} loss by domain at iteration {iteration} | {' | '.join(seen)} |"
            )
            if write_to_tensorboard:
                self._write_scalars(
                    self._loss_scalars(f"domain {split} lm loss", losses), iteration
                )
        self._write_record(record)

    def _write_record(self, record: Mapping[str, object]) -> None:
        if self._file is None and self._endpoint is None:
            return
        # On this thread, not the endpoint's: Megatron has just waited for the device.
        record = numbers(record)
        if self._file is not None:
            self._file.write(record)
        if self._endpoint is not None:
            self._endpoint.update(record)

    def _seen(self, losses: LossByDomain) -> list[tuple[str, float]]:
        named = zip(self.names, losses.by_domain, strict=True)
        return [(name, loss) for name, loss in named if loss is not None]

    def _loss_records(self, losses: LossByDomain) -> dict[str, object]:
        return {name: {"lm_loss": loss} for name, loss in self._seen(losses)}

    def _loss_scalars(self, tag: str, losses: LossByDomain) -> Scalars:
        return {f"{tag}/{name}": loss for name, loss in self._seen(losses)}

    def _reweight_record(self, report: ReweightReport, temperature: float) -> dict[str, object]:
        record: dict[str, object] = {
            "temperature": temperature,
            **{
                field.name: getattr(report, field.name)
                for field in dataclasses.fields(report)
                if field.name != "domains"
            },
        }
        record["domains"] = {
            name: dataclasses.asdict(domain)
            for name, domain in zip(self.names, report.domains, strict=True)
        }
        return record

    def _reweight_scalars(self, report: ReweightReport, temperature: float) -> Scalars:
        scalars = {
            "reweight/weighted loss": report.objective,
            "reweight/ess": report.ess,
            "reweight/max weight": report.max_weight,
            "reweight/max weight x set size": report.relative_max_weight,
            "reweight/share of sets above 2": report.over_bound,
            "reweight/temperature": temperature,
            "reweight/non-finite samples": float(report.nonfinite_samples),
            "reweight/smallest sample loss": report.sample_loss_min,
            "reweight/largest sample loss": report.sample_loss_max,
        }
        if report.beyond_range is not None:
            scalars["reweight/share of samples beyond the range"] = report.beyond_range
        if len(self.names) > 1:
            for name, domain in zip(self.names, report.domains, strict=True):
                scalars[f"domain weight share/{name}"] = domain.weight_share
                scalars[f"domain sample share/{name}"] = domain.sample_share
                if domain.lm_loss is not None:
                    scalars[f"domain lm loss/{name}"] = domain.lm_loss
                if domain.ess is not None:
                    scalars[f"domain ess/{name}"] = domain.ess
        return scalars

    def _sample_records(self, weighted: WeightedSet) -> list[dict[str, object]]:
        count = self._log_samples
        rows = zip(
            weighted.samples.losses[:count].tolist(),
            weighted.weights[:count].tolist(),
            weighted.samples.domain[:count].long().tolist(),
            strict=True,
        )
        return [
            {"loss": loss, "weight": weight, "domain": self.names[domain]}
            for loss, weight, domain in rows
        ]

    def _write_scalars(self, scalars: Scalars, iteration: int) -> None:
        writer, wandb = get_tensorboard_writer(), get_wandb_writer()
        if writer:
            for name, value in scalars.items():
                writer.add_scalar(name, value, iteration)
        if wandb and scalars:
            wandb.log(scalars, iteration)

    def _write_histograms(self, weighted: WeightedSet, iteration: int) -> None:
        """Over the loss axis: how many samples lie in each bin, and how much weight."""
        writer = get_tensorboard_writer()
        if not writer:
            return
        losses = weighted.samples.losses.float().cpu().numpy()
        used = np.isfinite(losses) & weighted.samples.has_tokens.cpu().numpy()
        losses, weights = losses[used], weighted.weights.float().cpu().numpy()[used]
        if losses.size == 0:
            return
        edges = np.histogram_bin_edges(losses, bins=_HISTOGRAM_BINS)
        for tag, mass in (
            ("reweight/samples by loss", np.ones_like(losses)),
            ("reweight/weight by loss", weights * losses.size),
        ):
            counts, _ = np.histogram(losses, bins=edges, weights=mass)
            writer.add_histogram_raw(
                tag,
                min=float(losses.min()),
                max=float(losses.max()),
                num=float(counts.sum()),
                sum=float((losses * mass).sum()),
                sum_squares=float((losses**2 * mass).sum()),
                bucket_limits=edges[1:].tolist(),
                bucket_counts=counts.tolist(),
                global_step=iteration,
            )


def inject(
    report: ReweightReport | None,
    temperature: float,
    domain_names: Sequence[str],
    total_loss_dict: dict[str, Any],
    loss_keys: Sequence[str],
    divisor: int,
) -> None:
    """Put the weights onto Megatron's next log line, after its own losses.

    Args:
        report: of the interval; nothing happens when None.
        temperature: of the last step.
        domain_names: by domain index.
        total_loss_dict: Megatron's sums over the logging interval; it prints each entry divided
            by the interval's completed iterations, unless that is negative.
        loss_keys: Megatron's own losses, which must come first on the line.
        divisor: that number of iterations.
    """
    if report is None:
        return
    for key in loss_keys:
        total_loss_dict.setdefault(key, torch.zeros(1, device=torch.cuda.current_device()))
    values = {
        "weighted loss": report.objective,
        "ess": report.ess,
        "max weight": report.max_weight,
        "temperature": temperature,
    }
    if report.nonfinite_samples:
        values["non-finite samples"] = float(report.nonfinite_samples)
    if len(domain_names) > 1:
        for name, domain in zip(domain_names, report.domains, strict=True):
            if domain.lm_loss is not None:
                values[f"lm loss {name}"] = domain.lm_loss
            values[f"weight {name}"] = domain.weight_share
    for name, value in values.items():
        total_loss_dict[name] = torch.tensor([value * divisor])
