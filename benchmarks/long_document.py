r"""Time and memory that one long document takes to tokenize: ours, and its library given the whole.

Each in a process of its own: processor time of the encoding, and the largest resident set since it
began, above what there was before, the document and the loaded tokenizer included in that. Both
must give the same ids, or the benchmark fails. Linux only.

    python benchmarks/long_document.py --corpus corpus/train --tokenizer-model bpe16k.model
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
import time
from collections.abc import Callable
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np
import torch

from benchmarks.bare_tokenizer import encoder_of
from benchmarks.kernels.record import about, results_file
from benchmarks.preprocess import TYPES, command_line, corpus_lines
from megatron_rw.data.tokenizers.tokenizer import Tokenizer, load_tokenizer
from megatron_rw.data.tokenizers.tokenizer_flags import TokenizerFlags


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--corpus", nargs="+", type=Path, required=True, help="as of preprocess.py")
    parser.add_argument("--megabytes", type=float, default=20.0, help="of text (20)")
    parser.add_argument("--tokenizer", choices=list(TYPES), default="sentencepiece")
    parser.add_argument("--tokenizer-model", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="(benchmarks/results/long_document_...)")
    options = parser.parse_args()
    cpu = torch.device("cpu")
    text = "\n\n".join(text for _, text in corpus_lines(options.corpus, options.megabytes))
    runs: dict[str, list[dict[str, Any]]] = {"ours": [], "library, whole": []}
    with get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for _ in range(options.rounds):
            for way, found in runs.items():
                arguments = (text, options.tokenizer, options.tokenizer_model, way == "ours")
                found.append(pool.apply(measure, arguments))
    if len({run.pop("ids_sha256") for found in runs.values() for run in found}) != 1:
        raise SystemExit("error: the ids differ")
    result = {
        "benchmark": "one long document to token ids",
        **about(cpu),
        "command": command_line("benchmarks/long_document.py"),
        "tokenizer": options.tokenizer,
        "characters": len(text),
        "runs": runs,
    }
    output = options.output or results_file(f"long_document_{options.tokenizer}", cpu)
    output.write_text(json.dumps(result, indent=2) + "\n")
    print(f"{'':14} {'CPU s':>7} {'MiB':>7} {'bytes/character':>16}   medians of {options.rounds}")
    for way, found in runs.items():
        seconds, peak = (np.median([run[key] for run in found]) for key in ("cpu_s", "peak_bytes"))
        print(f"{way:14} {seconds:7.2f} {peak / 2**20:7.0f} {peak / len(text):16.1f}")
    return 0


def measure(text: str, tokenizer: str, model: Path, ours: bool) -> dict[str, Any]:
    """Encodes the text once, in a new process."""
    encode: Callable[[str], Any]
    if ours:
        loaded = load_tokenizer(
            TokenizerFlags(tokenizer_type=TYPES[tokenizer], tokenizer_model=str(model))
        )
        encode = partial(_encode_one, loaded)
    else:
        encode = encoder_of(tokenizer, model)()
    encode("a first word")
    before = _reset_peak()
    start = time.process_time()
    ids = encode(text)
    seconds = time.process_time() - start
    peak = _status("VmHWM") - before
    digest = hashlib.sha256(np.asarray(ids, np.int32).tobytes()).hexdigest()
    return {"cpu_s": seconds, "peak_bytes": peak, "ids_sha256": digest}


def _encode_one(tokenizer: Tokenizer, text: str) -> Any:
    return tokenizer.encode_batch([text])[0]


def _reset_peak() -> int:
    """Makes the peak that of what follows; returns the resident bytes now."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


if __name__ == "__main__":
    sys.exit(main())
