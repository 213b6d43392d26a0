r"""Throughput and memory of tools/preprocess_data.py, against Megatron-LM's script and a ceiling.

Runs, in turn and in every round, ours, Megatron-LM's tools/preprocess_data.py with the same
tokenizer, text and number of workers, and the bare tokenizer: as many processes that do nothing but
encode their share of the documents, which they have in memory already. Time is from the start of
the process to its end, imports included; the bare tokenizer's begins when all have loaded it.
Memory is the largest sum of the proportional set sizes (PSS) of a run's processes, looked at every
twentieth of a second: pages that processes share count once. Both tools' files must be the same,
byte for byte, or the benchmark fails.

    python benchmarks/preprocess.py --corpus corpus/train --tokenizer-model bpe16k.model \
        --megatron-script Megatron-LM/tools/preprocess_data.py --workers 1 2 4 --rounds 5
"""

from __future__ import annotations

import argparse
import filecmp
import gzip
import hashlib
import json
import os
import shlex
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch

from benchmarks.bare_tokenizer import encode_only, encoder_of
from benchmarks.kernels.record import about, results_file
from benchmarks.measured import SAMPLE_SECONDS, Measured, run
from megatron_rw.data.tokenizers.tokenizer_flags import TokenizerType

TYPES: dict[str, TokenizerType] = {
    "sentencepiece": "SentencePieceTokenizer",
    "huggingface": "HuggingFaceTokenizer",
}
# The corpus is one file, so that this is the name of what both tools write.
NAME = "corpus"
PAIR = (f"{NAME}_text_document.bin", f"{NAME}_text_document.idx")
OURS, MEGATRON, BARE = "ours", "Megatron-LM", "bare tokenizer"


def main() -> int:
    """Measure, print, write."""
    options = _options()
    with tempfile.TemporaryDirectory(prefix="preprocess-") as name:
        folder = Path(name)
        documents = []
        with (folder / f"{NAME}.jsonl").open("wb") as file:
            for line, text in corpus_lines(options.corpus, options.megabytes):
                file.write(line)
                documents.append(text)
        text_bytes = sum(len(text.encode()) for text in documents)
        runs = measure(options, folder, documents)
    workers = {
        str(count): summary(
            {name: rounds for (of, name), rounds in runs.items() if of == count}, text_bytes
        )
        for count in options.workers
    }
    head = about(torch.device("cpu"))
    head["command"] = command_line("benchmarks/preprocess.py")
    head["versions"] |= _versions(options.python_path)
    result = {
        "benchmark": "text to .bin/.idx, one file of JSON lines",
        **head,
        "tokenizer": options.tokenizer,
        "megatron_script_sha256": _sha256(options.megatron_script),
        "outputs_identical": options.megatron_script is not None,
        "documents": len(documents),
        "text_bytes": text_bytes,
        "rounds": options.rounds,
        "memory": f"sum of PSS, every {SAMPLE_SECONDS} s",
        "workers": workers,
    }
    options.output.write_text(json.dumps(result, indent=2) + "\n")
    print(table(workers))
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--corpus", nargs="+", type=Path, required=True, help=".jsonl.gz files, or folders of them"
    )
    parser.add_argument("--megabytes", type=float, default=300.0, help="of text (300)")
    parser.add_argument("--tokenizer", choices=list(TYPES), default="sentencepiece")
    parser.add_argument("--tokenizer-model", type=Path, required=True)
    parser.add_argument(
        "--megatron-script",
        type=Path,
        help="Megatron-LM's tools/preprocess_data.py; without it ours is measured alone",
    )
    parser.add_argument("--python-path", type=Path, help="folder of more packages, as transformers")
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="(benchmarks/results/preprocess_cpu.json)")
    options = parser.parse_args()
    if options.output is None:
        name = "preprocess" if options.tokenizer == "sentencepiece" else "preprocess_huggingface"
        options.output = results_file(name, torch.device("cpu"))
    return options


def corpus_lines(corpus: Sequence[Path], megabytes: float) -> Iterator[tuple[bytes, str]]:
    """Yields documents, from the first again when they run out.

    Args:
        corpus: files, or folders of `.jsonl.gz`.
        megabytes: UTF-8 bytes of text to yield, in millions.

    Yields:
        The line of JSON of each, and its text.
    """
    files = [
        file
        for place in corpus
        for file in (sorted(place.glob("*.jsonl.gz")) if place.is_dir() else [place])
    ]
    yielded = 0
    while yielded < megabytes * 1e6:
        before = yielded
        for line in _lines(files):
            text = json.loads(line)["text"]
            yield line, text
            yielded += len(text.encode())
            if yielded >= megabytes * 1e6:
                return
        if yielded == before:
            raise SystemExit("error: --corpus: no text in it")


def _lines(files: Sequence[Path]) -> Iterator[bytes]:
    for path in files:
        with gzip.open(path) as file:
            yield from file


def measure(
    options: argparse.Namespace, folder: Path, documents: list[str]
) -> dict[tuple[int, str], list[Measured]]:
    """Runs everything, and compares what both tools write.

    Returns:
        Number of workers and name to the runs, a round each.
    """
    path = [str(ROOT), *([str(options.python_path.resolve())] if options.python_path else [])]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(path),
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    names = [OURS, MEGATRON, BARE] if options.megatron_script else [OURS, BARE]
    runs: dict[tuple[int, str], list[Measured]] = {}
    encoder = encoder_of(options.tokenizer, options.tokenizer_model)
    for number in range(options.rounds):
        order = names[number % len(names) :] + names[: number % len(names)]
        for workers in options.workers:
            for name in order:
                if name == BARE:
                    measured = Measured(encode_only(documents, encoder, workers), 0)
                else:
                    output = folder / name
                    output.mkdir()
                    measured = run(_tool(name, options, folder, workers), environment, folder)
                runs.setdefault((workers, name), []).append(measured)
                print(f"round {number}, {workers} workers, {name}: {measured}", file=sys.stderr)
            if MEGATRON in names:
                for file in PAIR:
                    if not filecmp.cmp(folder / OURS / file, folder / MEGATRON / file, False):
                        raise SystemExit(f"error: {file} differs with {workers} workers")
                shutil.rmtree(folder / MEGATRON)
            shutil.rmtree(folder / OURS)
    return runs


def _tool(name: str, options: argparse.Namespace, folder: Path, workers: int) -> list[str]:
    output = folder / name
    if name == OURS:
        script = [str(ROOT / "tools" / "preprocess_data.py"), "--output-dir", str(output)]
    else:
        script = [str(options.megatron_script.resolve()), "--output-prefix", str(output / NAME)]
    return [
        *(sys.executable, *script),
        *("--input", str(folder / f"{NAME}.jsonl")),
        *("--tokenizer-type", TYPES[options.tokenizer]),
        *("--tokenizer-model", str(options.tokenizer_model.resolve())),
        *("--append-eod", "--workers", str(workers)),
    ]


def summary(runs: dict[str, list[Measured]], text_bytes: int) -> dict[str, Any]:
    """Medians over the rounds, and ratios of ours to each other, a round at a time."""
    result: dict[str, Any] = {}
    for name, rounds in runs.items():
        seconds = statistics.median(run.seconds for run in rounds)
        result[name] = {"median_s": seconds, "mb_per_s": text_bytes / 1e6 / seconds}
        if name != BARE:
            peak = statistics.median(run.peak_bytes for run in rounds)
            result[name]["median_peak_mib"] = peak / 2**20
    for other in (MEGATRON, BARE):
        if other in runs:
            pairs = list(zip(runs[OURS], runs[other], strict=True))
            result[f"throughput, ours over {other}"] = statistics.median(
                theirs.seconds / ours.seconds for ours, theirs in pairs
            )
            if other == MEGATRON:
                result[f"peak memory, ours over {other}"] = statistics.median(
                    ours.peak_bytes / theirs.peak_bytes for ours, theirs in pairs
                )
    result["raw"] = {name: [asdict(run) for run in rounds] for name, rounds in runs.items()}
    return result


def table(workers: dict[str, dict[str, Any]]) -> str:
    """A line for each number of workers and each of what was run."""
    lines = [f"{'workers':>7}  {'':14} {'MB/s':>7} {'MiB':>7}   ours over it: speed, memory"]
    for count, result in workers.items():
        for name in (OURS, MEGATRON, BARE):
            if name not in result:
                continue
            peak = result[name].get("median_peak_mib")
            speed = result.get(f"throughput, ours over {name}")
            memory = result.get(f"peak memory, ours over {name}")
            lines.append(
                f"{count:>7}  {name:14} {result[name]['mb_per_s']:7.2f} "
                f"{f'{peak:7.0f}' if peak else ' ' * 7}"
                f"{f'   {speed:.3f}' if speed else ''}{f'  {memory:.3f}' if memory else ''}"
            )
    return "\n".join(lines)


def command_line(script: str) -> str:
    """The command, with names in place of paths, which mean nothing elsewhere."""
    names = [word.rstrip("/").rpartition("/")[2] for word in sys.argv[1:]]
    return shlex.join(["python", script, *names])


def _versions(python_path: Path | None) -> dict[str, str]:
    more = [str(python_path)] if python_path else []
    versions = {}
    for package in ("sentencepiece", "tokenizers", "transformers"):
        found = next(iter(metadata.distributions(name=package, path=more + sys.path)), None)
        if found is not None:
            versions[package] = found.version
    return versions


def _sha256(path: Path | None) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path else None


if __name__ == "__main__":
    sys.exit(main())
