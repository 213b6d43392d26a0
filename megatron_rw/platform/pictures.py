"""Pictures of histograms; needs matplotlib, which is optional."""

import importlib.util
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_rw.errors import UserError
from megatron_rw.platform.files import complete_file


def check_picture(path: Path) -> None:
    """Checks that the file of a --picture can be drawn on this host; a `UserError` if not."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError(
            "--picture needs a package that is not installed on "
            f"{socket.gethostname()}; run: pip install matplotlib",
            known_to_all=False,
        )
    from matplotlib.backend_bases import FigureCanvasBase

    kinds = sorted(FigureCanvasBase.get_supported_filetypes())
    if path.suffix[1:].lower() not in kinds:
        raise UserError(f"--picture {path}: no kind of picture; name it .{', .'.join(kinds)}")
    if not path.absolute().parent.is_dir():
        text = f"--picture {path}: there is no directory {path.parent}; make it"
        raise UserError(text, known_to_all=False)


def draw_histograms(
    shares: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    path: Path,
    labels: tuple[str, str],
) -> None:
    """Draws histograms as steps.

    `shares` maps a name to the heights of its bins and their edges, one more. `labels` are those of
    the two axes. The suffix of the path names the format.
    """
    from matplotlib.figure import Figure  # pyplot could open a window

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel=labels[0], ylabel=labels[1])
    for name, (heights, edges) in shares.items():
        axes.stairs(heights, edges, label=name)
    axes.legend(fontsize="small")
    with complete_file(path) as file:
        figure.savefig(file, dpi=150, format=path.suffix[1:])
