"""What NVRTC makes of the CUDA kernels: registers, spills, instructions a logit.

    python -m tests.kernels.resources

Compiles for three architectures, needs no GPU, and ends with status 1 where a kernel exceeds its
bounds. A main loop is the loop with four 16-byte loads; its instructions are counted in the machine
code, which `nvdisasm` prints. It comes with triton, which torch's CUDA builds depend on.
"""

from __future__ import annotations

import importlib.util
import io
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from megatron_rw.kernels import cuda_launch

ARCHITECTURES = ("sm_80", "sm_90a", "sm_100")
MOST_REGISTERS = 64
# For one logit, in the main loop of the kernels that training uses most.
MOST_INSTRUCTIONS = {
    "statistics<bf16, false>": 7.0,
    "statistics<half, false>": 7.0,
    "statistics<float, false>": 8.0,
    "statistics<bf16, true>": 10.0,
    "gradient<bf16>": 6.0,
    "gradient<half>": 6.0,
    "gradient<float>": 6.0,
}


class Resources(NamedTuple):
    """Of one kernel on one architecture; bytes spilled, and instructions a logit."""

    architecture: str
    kernel: str
    registers: int
    spilled: int
    instructions: float | None

    @property
    def excess(self) -> str:
        """What is beyond the bounds; empty where nothing is."""
        bound = MOST_INSTRUCTIONS.get(self.kernel)
        if self.spilled:
            return "spills"
        if not 0 < self.registers <= MOST_REGISTERS:
            return f"more than {MOST_REGISTERS} registers"
        if bound is not None and (self.instructions is None or self.instructions > bound):
            return f"more than {bound} instructions a logit"
        return ""


def resources(architecture: str) -> list[Resources]:
    """Compile all kernels and read the assembler's report and the machine code."""
    log = io.StringIO()
    code = cuda_launch.compile_kernels(architecture, log)
    reports = re.split("Compiling entry function '", log.getvalue())[1:]
    by_symbol = {report.split("'")[0]: report for report in reports}
    loops = _main_loops(bytes(code.code))
    found = []
    for kernel in cuda_launch.KERNELS:
        symbol = code.symbol_mapping[kernel].decode()
        report = by_symbol[symbol]
        registers = sum(map(int, re.findall(r"Used (\d+) registers", report)))
        spills = re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", report)
        logits = 4 * (4 if "<float" in kernel else 8)
        loop = loops[symbol] / logits if symbol in loops else None
        found.append(Resources(architecture, kernel, registers, sum(map(int, spills)), loop))
    return found


def _main_loops(cubin: bytes) -> dict[str, int]:
    """Instructions of the smallest loop of each function that has four 16-byte loads."""
    package = importlib.util.find_spec("triton")
    assert package is not None and package.origin is not None  # noqa: PT018
    nvdisasm = Path(package.origin).parent / "backends/nvidia/bin/nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(nvdisasm), "-c", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found: dict[str, int] = {}
    for function in re.split(r"^\.text\.", text, flags=re.MULTILINE)[1:]:
        symbol, _, body = function.partition(":")
        # Labels and instructions in order. A loop ends in a branch back to a label.
        lines = re.findall(r"^(\.L\w+):|^\s+/\*[0-9a-f]+\*/\s+(.*?);", body, re.MULTILINE)
        places = {label: place for place, (label, _) in enumerate(lines) if label}
        for place, (_, instruction) in enumerate(lines):
            branch = re.search(r"BRA.*?(\.L\w+)", instruction)
            if branch and places.get(branch[1], place) < place:
                loop = [text for label, text in lines[places[branch[1]] : place + 1] if not label]
                if sum("LDG" in text and ".128" in text for text in loop) == 4:
                    found[symbol] = min(len(loop), found.get(symbol, len(loop)))
    return found


def main() -> int:
    """Print a line a kernel and architecture, and one of all."""
    line = "{:8}{:36}{:>10}{:>9}{:>15}  {}"
    print(line.format("arch", "kernel", "registers", "spilled", "instr./logit", ""))
    every = [found for architecture in ARCHITECTURES for found in resources(architecture)]
    for found in every:
        per_logit = "-" if found.instructions is None else f"{found.instructions:.2f}"
        print(line.format(*found[:-1], per_logit, found.excess))
    wrong = sum(bool(found.excess) for found in every)
    print(
        f"{len(every)} kernels: at most {max(found.registers for found in every)} registers, "
        f"{sum(found.spilled for found in every)} bytes spilled, {wrong} beyond their bounds"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
