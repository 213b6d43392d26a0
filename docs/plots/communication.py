"""Extrapolate what each scope communicates per step to large jobs, from stated latencies.

    .venv/bin/python docs/plots/communication.py

The counts and sizes are those that `tests/exactness/test_collectives.py` counts; the times are a
model, not measurements:

    time of a collective = LAUNCH + 2·ceil(log2(ranks))·HOP + 2·bytes/BANDWIDTH
"""

from __future__ import annotations

import math

# Assumed: launching one NCCL collective, one hop of its tree across nodes, and a rank's bandwidth.
LAUNCH_S, HOP_S, BANDWIDTH = 20e-6, 5e-6, 25e9
TENSOR, PIPELINE, MICRO_BATCH_SIZE, MICRO_BATCHES = 8, 4, 1, 16
GPUS = (64, 1024, 8192)


def collective(ranks: int, size: int) -> float:
    """Seconds of an all-reduce or broadcast of `size` bytes."""
    hops = 2 * math.ceil(math.log2(ranks)) if ranks > 1 else 0
    return LAUNCH_S + hops * HOP_S + 2 * size / BANDWIDTH


def main() -> None:
    """Print the table."""
    print(
        f"TP {TENSOR}, PP {PIPELINE}, micro-batch size {MICRO_BATCH_SIZE}, {MICRO_BATCHES} "
        f"micro-batches; {LAUNCH_S * 1e6:.0f} us a collective + {HOP_S * 1e6:.0f} us a hop, "
        f"{BANDWIDTH / 1e9:.0f} GB/s\n"
    )
    print(
        "| GPUs | replicas | scope | \\|S\\| | collectives per step | bytes each | time per step |"
    )
    print("|---|---|---|---|---|---|---|")
    for gpus in GPUS:
        replicas = gpus // (TENSOR * PIPELINE)
        small = 12 * replicas * MICRO_BATCH_SIZE
        large = small * MICRO_BATCHES
        rows: tuple[tuple[str, int, list[int], list[int]], ...] = (
            ("microbatch", small, [small] * MICRO_BATCHES, []),
            ("global", large, [large], []),
            ("deferred", large, [large], [48]),
        )
        for scope, set_bytes, reduced, broadcast in rows:
            seconds = sum(collective(replicas, size) for size in reduced)
            seconds += sum(collective(PIPELINE, size) for size in broadcast)
            sizes = " + ".join(str(size) for size in dict.fromkeys(reduced + broadcast))
            print(
                f"| {gpus} | {replicas} | `{scope}` | {set_bytes // 12} "
                f"| {len(reduced + broadcast)} | {sizes} | {seconds * 1e3:.2f} ms |"
            )


if __name__ == "__main__":
    main()
