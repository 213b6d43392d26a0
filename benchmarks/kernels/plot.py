"""Draw a result of cross_entropy.py: each implementation's share of the copy ceiling by shape.

python benchmarks/kernels/plot.py benchmarks/results/cross_entropy_DEVICE.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt

OURS = {"ours": "black", "ours, triton": "dimgrey", "ours, cuda": "dimgrey"}


def share(result: dict[str, Any], name: str) -> float:
    """Of the copy ceiling, both passes; 0 where it did not run."""
    found = result["implementations"].get(name, {})
    value: float = found["both"]["share_of_copy"] if "both" in found else 0.0
    return value


def draw(record: dict[str, Any], path: Path) -> None:
    """Write the plot."""
    shapes = sorted(record["shapes"], key=lambda shape: (shape["vocab"], shape["tokens"]))
    names = list(record["shapes"][0]["implementations"])
    width = 0.8 / len(names)
    figure, axes = plt.subplots(figsize=(max(7, 1.6 * len(shapes)), 4.2), layout="constrained")
    for index, name in enumerate(names):
        places = [number + (index - len(names) / 2) * width for number in range(len(shapes))]
        heights = [100 * share(shape, name) for shape in shapes]
        axes.bar(places, heights, width, label=name, color=OURS.get(name))
    labels = [f"{shape['tokens']}\n{shape['vocab']}" for shape in shapes]
    axes.set_xticks(range(len(shapes)), labels)
    axes.axhline(100, color="grey", lw=0.8)
    axes.set_ylabel("% of the copy ceiling")
    axes.set_xlabel("tokens, vocabulary")
    axes.set_title(f"Cross-entropy, forward and backward: {record['device']}, {record['date']}")
    axes.legend(fontsize=7, ncols=3)
    figure.savefig(path, dpi=110)


def main() -> int:
    """Draw beside the file."""
    path = Path(sys.argv[1])
    draw(json.loads(path.read_text()), path.with_suffix(".png"))
    print(path.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
