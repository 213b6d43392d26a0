"""Evaluates the checkpoints of runs on the same tokens, and the last with two offline probes.

Into the folder of each run, whose checkpoints are in `ckpt/`, goes `evaluation.jsonl`, which
`tools/compare_runs.py` reads, with a line for each checkpoint:

- `lm_loss`, `domains.NAME.lm_loss`: unweighted loss, nats per token, over evenly spaced rows;
- `logit_scale`, `lm_loss_at_scale`, `lm_loss_at_one`: the factor on the logits at which the loss
  over every ninth row of the clean domains is lowest, the loss there, and without the factor;
- `choice_accuracy`: how often the right continuation of a held-out text has the highest likelihood
  among four, the others being from elsewhere in the same domain; 0.25 is chance;
- `copy_gain`: nats per token by which the second half of a row of random tokens that repeats the
  first is better predicted than the first; 0 is no copying.

Single process. The model's flags are taken from the first checkpoint.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_rw.platform import Device

CHOICES = 4
COPY_ROWS = 64
_MICRO_BATCH = 32

# Logits [b, s, v] of token ids [b, s].
Model = Callable[["Tensor"], "Tensor"]
Ids = NDArray[np.int64]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    parser = argparse.ArgumentParser(description="Evaluate the checkpoints of runs.")
    parser.add_argument("--runs", type=Path, nargs="+", required=True, metavar="DIR")
    parser.add_argument("--steps", type=int, nargs="+", required=True, help="their checkpoints")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="has domains.json")
    parser.add_argument("--rows", type=int, required=True, help="most rows a domain")
    parser.add_argument("--items", type=int, required=True, help="most choices a clean domain")
    parser.add_argument("--vocab-size", type=int, required=True, help="of the tokenizer")
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    args = parser.parse_args(argv)

    from megatron_rw.errors import reported
    from megatron_rw.platform import select_device
    from megatron_rw.platform.launch import prepare_process

    with reported("evaluating checkpoints"):
        prepare_process()
        evaluate(args, select_device(["--device", args.device]))
    return 0


def evaluate(args: argparse.Namespace, device: Device) -> None:
    """Builds the model once, and evaluates each checkpoint of each run."""
    from megatron.training import checkpointing, training

    from megatron_rw import patching
    from megatron_rw.data.indexed.domains import FILE_NAME, DomainsFile
    from megatron_rw.scoring.command import ScoreConfig, job_flags
    from megatron_rw.scoring.job import load_model
    from megatron_rw.training.arguments import parse_job_flags
    from megatron_rw.training.patches import repairs

    first = ScoreConfig(load=str(args.runs[0] / "ckpt"), score_dir="unused")
    flags = [
        "--device",
        args.device,
        "--use-checkpoint-args",
        "--mock-data",
        "--micro-batch-size",
        "1",
    ]
    job = parse_job_flags(job_flags(first, flags), device).megatron
    patching.apply(repairs())
    training.initialize_megatron()
    chunks = load_model(job)
    for chunk in chunks:
        chunk.eval()
    domains = DomainsFile.load(str(args.data / FILE_NAME)).domains
    texts = {name: _token_ids(args.data / domain.prefix) for name, domain in domains.items()}
    examination = Examination(texts, job.seq_length, args.vocab_size, args.rows, args.items)
    for run in args.runs:
        job.load = str(run / "ckpt")
        lines = []
        for job.ckpt_step in args.steps:
            checkpointing.load_checkpoint(chunks, None, None)
            model = _logits(chunks[0])
            record = {"type": "evaluation", "iteration": job.ckpt_step, **examination.losses(model)}
            if job.ckpt_step == args.steps[-1]:
                record |= examination.probes(model)
            lines.append(json.dumps(record) + "\n")
            print(f"{run} at {job.ckpt_step}: lm_loss {record['lm_loss']:.4f}", flush=True)
        (run / "evaluation.jsonl").write_text("".join(lines))


def _token_ids(prefix: Path) -> Ids:
    """All tokens of a dataset, one document behind the other, as in training."""
    from megatron_rw.data.indexed.documents import DatasetReader
    from megatron_rw.data.indexed.pair import bin_path

    with DatasetReader(prefix) as reader:
        return np.fromfile(bin_path(prefix), reader.dtype).astype(np.int64)


def _logits(chunk: Any) -> Model:
    import torch

    def logits(tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        found: Tensor = chunk(tokens, positions, None)
        return found.float()

    return logits


class Examination:
    """The tokens and the questions, the same for every model.

    Args:
        texts: token ids by domain; a domain of noise is called `noise…`.
        length: tokens of a row.
        vocab_size: token ids below it are drawn for copying.
        rows: most rows a domain.
        items: most choices a clean domain.
    """

    def __init__(
        self, texts: dict[str, Ids], length: int, vocab_size: int, rows: int, items: int
    ) -> None:
        rng = np.random.default_rng(0)
        self._rows = {name: evenly(ids, length + 1, rows) for name, ids in texts.items()}
        self._clean = [name for name in texts if not name.startswith("noise")]
        self._continuation = length // 8
        self._choices = np.concatenate(
            [choices(texts[n], length // 2, self._continuation, items, rng) for n in self._clean]
        )
        half = rng.integers(0, vocab_size, (COPY_ROWS, length // 2))
        self._copies = np.concatenate([half, half], axis=1)

    def losses(self, model: Model) -> dict[str, Any]:
        """The unweighted losses of a model."""
        found = {name: token_losses(model, rows) for name, rows in self._rows.items()}
        return {
            "lm_loss": float(np.concatenate(list(found.values())).mean()),
            "domains": {name: {"lm_loss": float(loss.mean())} for name, loss in found.items()},
        }

    def probes(self, model: Model) -> dict[str, float]:
        """The fitted scale and the two probes; see the head of this file."""
        from megatron_rw.integrations.logit_scale import SCALES, fitted

        clean = np.concatenate([self._rows[name] for name in self._clean])[::9]
        scaled = [
            float(token_losses(lambda t, a=a: a * model(t), clean).mean())  # type: ignore[misc]
            for a in SCALES
        ]
        likelihood = -token_losses(model, self._choices)[:, -self._continuation :].sum(1)
        copied = token_losses(model, self._copies)
        middle = self._copies.shape[1] // 2
        right = likelihood.reshape(-1, CHOICES).argmax(1) == 0
        return {
            **asdict(fitted(scaled)),
            "choice_accuracy": float(right.mean()),
            "copy_gain": float(copied[:, : middle - 1].mean() - copied[:, middle:].mean()),
        }


def evenly(ids: Ids, length: int, most: int) -> Ids:
    """Up to `most` rows `[rows, length]` of a text, evenly spaced, without overlap."""
    whole = ids[: len(ids) // length * length].reshape(-1, length)
    return whole[np.linspace(0, len(whole) - 1, min(most, len(whole))).astype(int)]


def choices(ids: Ids, context: int, length: int, items: int, rng: np.random.Generator) -> Ids:
    """Contexts with four continuations each, the right one first.

    Args:
        ids: the text.
        context: tokens before the continuation.
        length: tokens of a continuation.
        items: most contexts.
        rng: draws where the wrong continuations are from.

    Returns:
        `[items · 4, context + length]`.
    """
    rows = evenly(ids, context + length, items)
    found = np.repeat(rows[:, None], CHOICES, axis=1)
    for item, wrong in ((i, j) for i in range(len(rows)) for j in range(1, CHOICES)):
        # A continuation of another item, and never of this one.
        other = (item + rng.integers(1, len(rows))) % len(rows)
        found[item, wrong, context:] = rows[other, context:]
    return found.reshape(-1, context + length)


def token_losses(model: Model, rows: Ids) -> NDArray[np.float32]:
    """Losses `[rows, length - 1]` of all tokens of rows but their first, in nats."""
    import torch
    from torch.nn.functional import cross_entropy

    found = []
    for start in range(0, len(rows), _MICRO_BATCH):
        batch = torch.from_numpy(rows[start : start + _MICRO_BATCH]).to(torch.cuda.current_device())
        with torch.no_grad():
            logits = model(batch[:, :-1])
        losses = cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="none")
        found.append(losses.view(len(batch), -1).cpu().numpy())
    return np.concatenate(found)


if __name__ == "__main__":
    sys.exit(main())
