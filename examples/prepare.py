"""From a corpus to Megatron's datasets and their blends, for the quick start and the study."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from examples.stages import Stage, python

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ROOT / "tools"
# What a run depends on.
PROGRAM = [ROOT / "pretrain_gpt_rw.py", *sorted((ROOT / "megatron_rw").rglob("*.py"))]


def data_stages(
    corpus: Stage, out: Path, parts: Sequence[str], vocab_size: int
) -> tuple[Stage, list[Stage]]:
    """The stage of a tokenizer, and one of the datasets of each part.

    Args:
        corpus: makes the folder `corpus` below `out`, with `PART/DOMAIN.jsonl`.
        out: the tokenizer and the datasets go into its folders `tokenizer` and `data`.
        parts: folders of the corpus. The tokenizer is trained on the first.
        vocab_size: of the tokenizer.
    """
    text, model = out / "corpus", out / "tokenizer" / "bpe.model"
    package = sorted((ROOT / "megatron_rw" / "data").rglob("*.py"))

    def train() -> None:
        python(
            TOOLS / "train_tokenizer.py",
            *("--vocab-size", vocab_size, "--overwrite"),
            *("--output-prefix", model.with_suffix("")),
            *("--input", *sorted((text / parts[0]).glob("*.jsonl"))),
        )

    def tokenize(part: str) -> None:
        # Megatron's indexes there may be of earlier data.
        shutil.rmtree(out / "data" / "cache", ignore_errors=True)
        python(
            TOOLS / "preprocess_data.py",
            *("--tokenizer-model", model, "--append-eod", "--overwrite"),
            *("--domain-key", "domain", "--output-dir", out / "data" / part),
            *("--input", *sorted((text / part).glob("*.jsonl"))),
        )

    tokenizer = Stage(
        "tokenizer", model, train, depends=package, after=[corpus], settings=[vocab_size]
    )
    data = [
        Stage(
            f"tokenize {part}",
            out / "data" / part / "domains.json",
            functools.partial(tokenize, part),
            depends=package,
            after=[tokenizer],
        )
        for part in parts
    ]
    return tokenizer, data


def blend(folder: Path, noise: float) -> list[str]:
    """Weights and prefixes of a folder's datasets, for Megatron.

    The domains whose names begin with `noise` share `noise` alike, and the others the rest of 1.
    """
    names = list(_prefixes(folder))
    noisy = [name for name in names if name.startswith("noise")]
    of_noise = noise if noisy else 0.0
    share = (1 - of_noise) / (len(names) - len(noisy))
    shares = {name: of_noise / len(noisy) if name in noisy else share for name in names}
    return blend_of(folder, shares)


def blend_of(folder: Path, shares: Mapping[str, float]) -> list[str]:
    """The same with a weight for each domain; those without one are left out."""
    return [
        word
        for name, prefix in _prefixes(folder).items()
        if shares.get(name, 0.0) > 0
        for word in (f"{shares[name]:.6f}", str(prefix))
    ]


def _prefixes(folder: Path) -> dict[str, Path]:
    domains = json.loads((folder / "domains.json").read_text())["domains"]
    return {name: folder / domain["prefix"] for name, domain in domains.items()}
