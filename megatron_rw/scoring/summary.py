"""The losses of documents by domain: figures and a table."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from megatron_rw.scoring.folder import ScoreFolder

# Bins of the histograms, in nats per token; the last bin has all that is above.
BIN_WIDTH, BINS = 0.1, 200
# Bins to a line of the table.
_COARSE = 5
_CHUNK = 1 << 22


def summarise(folder: ScoreFolder) -> dict[str, Any]:
    """Returns figures of each domain, from the folder's complete arrays, in bounded memory.

    Returns:
        By domain: `documents`; `tokens` that have a loss; `loss`, their mean (None of none);
        `without_loss`, documents of fewer than two tokens; `not_finite`, documents whose loss is
        not; `histogram`, numbers of the other documents by loss in bins of `BIN_WIDTH`.
    """
    found: dict[str, dict[str, Any]] = {}
    for dataset, facts in folder.record["datasets"].items():
        entry = found.setdefault(
            facts["domain"],
            {"documents": 0, "tokens": 0, "loss": 0.0, "without_loss": 0, "not_finite": 0}
            | {"histogram": np.zeros(BINS + 1, np.int64)},
        )
        losses = np.load(folder.array(dataset, "document_losses"), mmap_mode="r")
        tokens = np.load(folder.array(dataset, "document_tokens"), mmap_mode="r")
        for at in range(0, len(losses), _CHUNK):
            part = np.asarray(losses[at : at + _CHUNK], np.float64)
            counts = np.asarray(tokens[at : at + _CHUNK], np.int64)
            scored = counts > 0
            finite = scored & np.isfinite(part)
            bins = np.minimum(part[finite] / BIN_WIDTH, BINS).astype(np.int64)
            entry["documents"] += len(part)
            entry["tokens"] += int(counts[finite].sum())
            entry["loss"] += float((part[finite] * counts[finite]).sum())
            entry["without_loss"] += int((~scored).sum())
            entry["not_finite"] += int((scored & ~finite).sum())
            entry["histogram"] += np.bincount(bins, minlength=BINS + 1)
    for entry in found.values():
        entry["loss"] = entry["loss"] / entry["tokens"] if entry["tokens"] else None
        entry["histogram"] = entry["histogram"].tolist()
    return found


def table(domains: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Returns the figures and the histograms as lines of text."""
    width = max(len(name) for name in [*domains, "domain"])
    lines = [
        f"{'domain':<{width}}  {'documents':>13}  {'tokens':>17}  {'nats/token':>10}  "
        f"{'no loss':>9}  {'not finite':>10}"
    ]
    for name, entry in domains.items():
        loss = "-" if entry["loss"] is None else f"{entry['loss']:.4f}"
        lines.append(
            f"{name:<{width}}  {entry['documents']:>13,}  {entry['tokens']:>17,}  {loss:>10}  "
            f"{entry['without_loss']:>9,}  {entry['not_finite']:>10,}"
        )
    histograms = np.array([entry["histogram"] for entry in domains.values()])
    counts = np.add.reduceat(histograms, np.arange(0, BINS + 1, _COARSE), axis=1)
    filled = np.flatnonzero(counts.any(axis=0))
    if not len(filled):
        return lines
    shares = 100 * counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
    cells = [max(len(name), 7) for name in domains]
    lines += ["", "documents by loss in nats per token, % of the domain"]
    names = zip(domains, cells, strict=True)
    lines.append(f"{'loss':<11}" + "".join(f"  {name:>{cell}}" for name, cell in names))
    step = BIN_WIDTH * _COARSE
    for i in range(filled[0], filled[-1] + 1):
        end = "" if i * _COARSE >= BINS else f"{(i + 1) * step:.1f}"
        row = zip(shares[:, i], cells, strict=True)
        label = f"{i * step:.1f}-{end}"
        lines.append(f"{label:<11}" + "".join(f"  {share:>{cell}.2f}" for share, cell in row))
    return lines
