"""The toy regression of the paper's Figure 7, with the method as a library in plain torch.

A linear model learns by SGD from fresh batches, whose samples `loss_weights` weights by their
losses. What it has not learnt is its excess risk, E ½(x·θ − x·θ*)². In Figure 7 of Sow et al.,
arXiv 2502.06733, LinUpper is the fastest, and Quadratic is better than uniform. That order appears
here if all labels are exact and all arms share a rate far below the best. The other columns ask
why: they give each step the length of the plain gradient's, or each arm the rate that suits it
best. Other problems have noise in their labels, of one variance, in all of them or in a few.

What it does not show: the dimensions, rate and noise of the paper's figure are not known here, and
neither a linear model nor SGD at a constant rate says what a language model under Adam does.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Self

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import normalize
from tyro.conf import arg

from megatron_rw.command_line import parse, require
from megatron_rw.errors import UserError, reported
from megatron_rw.kernels.options import WeightStrategy
from megatron_rw.platform.files import complete_file, write_complete
from megatron_rw.reweighting import loss_weights

DIMENSIONS, BATCH, STEPS = 50, 32, 60
NOISE_VARIANCE = 0.25  # Over all labels, noisy or not; without noise their variance is 1.
RATES = torch.logspace(-3, 0, 61, dtype=torch.float64)  # Each 1.12 times the one before.


@dataclass(frozen=True)
class Arm:
    """A way to weight the samples of a batch."""

    strategy: WeightStrategy
    temperature: float = 1.0

    def __str__(self) -> str:
        return self.strategy if self == UNIFORM else f"{self.strategy} r {self.temperature:g}"

    def weights(self, losses: Tensor) -> Tensor:
        """Returns the weights of one batch, `[n]`."""
        # The unit of the losses changes no weight. In this one their range stays above 1e-6, below
        # which loss_weights would take them for equal.
        return loss_weights(losses / losses.amax(), self.strategy, self.temperature)


@dataclass(frozen=True)
class Labels:
    """What is wrong with the labels: this share of them has all the noise."""

    name: str
    noisy_share: float


@dataclass(frozen=True)
class Steps:
    """How long the steps are."""

    name: str
    rate: float | None  # Over uniform's best one; None stands for each arm's own best one.
    plain_length: bool = False  # As long as the gradient of the plain mean would make them.


UNIFORM = Arm("uniform")
LINUPPER, QUADRATIC, EXTREMES = Arm("linupper"), Arm("quadratic"), Arm("extremes")
SHARPER = (Arm("linupper", 0.4), Arm("quadratic", 0.4), Arm("extremes", 0.4))
ARMS = (UNIFORM, LINUPPER, QUADRATIC, EXTREMES, *SHARPER)

EXACT = Labels("exact labels", 0.0)
ALL_NOISY = Labels("noise in all labels", 1.0)
SOME_NOISY = Labels("the same noise in 30 % of the labels", 0.3)
OUTLIERS = Labels("the same noise in 5 % of the labels", 0.05)
LABELS = (EXACT, ALL_NOISY, SOME_NOISY, OUTLIERS)

LOW = Steps("rate/4", 0.25)
LOW_PLAIN = Steps("rate/4, plain length", 0.25, plain_length=True)
BEST = Steps("rate", 1.0)
OWN = Steps("own best rate", None)
STEPS_TAKEN = (LOW, LOW_PLAIN, BEST, OWN)

COLOURS = {QUADRATIC: "#2e86ab", EXTREMES: "#e0a030", LINUPPER: "#d1495b", UNIFORM: "#222222"}
# What is drawn, and what a reader sees in it.
PANELS: tuple[tuple[Labels, Steps, str], ...] = (
    (EXACT, LOW, "Exact labels,\none low rate for all:\nLinUpper is fastest"),
    (EXACT, LOW_PLAIN, "The same, but steps as\nlong as uniform's:\nno arm gains"),
    (EXACT, OWN, "Exact labels,\neach at its best rate:\nuniform is fastest"),
    (ALL_NOISY, OWN, "Noise in all labels,\neach at its best rate:\nnearly a tie"),
    (SOME_NOISY, OWN, "Same noise in 30 %,\neach at its best rate:\nLinUpper is worst"),
    (OUTLIERS, OWN, "Same noise in 5 %,\neach at its best rate:\nLinUpper is worst"),
)


@dataclass(frozen=True)
class Problem:
    """A regression for each seed. The tensors are fp64."""

    optimum: Tensor  # `[seeds, d]`, θ*, of length 1.
    inputs: Tensor  # `[steps, seeds, batch, d]`, standard normal.
    labels: Tensor  # `[steps, seeds, batch]`.

    @classmethod
    def draw(cls, labels: Labels, seeds: int, generator: torch.Generator) -> Self:
        """Draws as many numbers whatever the labels, so that problems differ in the noise alone."""

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        optimum = normalize(normal(seeds, DIMENSIONS), dim=-1)
        inputs = normal(STEPS, seeds, BATCH, DIMENSIONS)
        exact = torch.einsum("tsbd,sd->tsb", inputs, optimum)
        noisy = torch.rand(exact.shape, generator=generator) < labels.noisy_share
        noise_sd = (NOISE_VARIANCE / (labels.noisy_share or 1.0)) ** 0.5
        return cls(optimum, inputs, exact + noisy * noise_sd * normal(*exact.shape))


@dataclass(frozen=True)
class Run:
    """What an arm did at each of some rates, `[rates, seeds, steps]`."""

    rates: Tensor  # `[rates]`.
    excess: Tensor  # Excess risk before each step and, one more, after the last.
    lengths: Tensor  # Length of the weighted gradient over that of the plain one.

    def decades(self) -> Tensor:
        """Returns log10 of the excess risk after the last step, `[rates, seeds]`."""
        return self.excess[..., -1].log10()


def descend(problem: Problem, arm: Arm, rates: Tensor, plain_length: bool = False) -> Run:
    """Learns from θ = 0 for all seeds and rates at once."""
    weights_of = torch.vmap(torch.vmap(arm.weights))
    theta = torch.zeros(len(rates), *problem.optimum.shape, dtype=torch.float64)
    thetas, lengths = [theta], []
    for inputs, labels in zip(problem.inputs, problem.labels, strict=True):
        errors = torch.einsum("rsd,sbd->rsb", theta, inputs) - labels
        weights = weights_of(0.5 * errors.square())
        gradient = torch.einsum("rsb,sbd->rsd", weights * errors, inputs)
        plain = torch.einsum("rsb,sbd->rsd", errors / BATCH, inputs)
        length = gradient.norm(dim=-1) / plain.norm(dim=-1)
        if plain_length:
            gradient = gradient / length[..., None]
        theta = theta - rates[:, None, None] * gradient
        thetas.append(theta)
        lengths.append(length)
    excess = 0.5 * (torch.stack(thetas, dim=2) - problem.optimum[:, None]).square().sum(-1)
    return Run(rates, excess, torch.stack(lengths, dim=2))


def best_rate(problem: Problem, arm: Arm) -> Tensor:
    """Returns that of RATES whose median excess risk over the seeds is lowest in the end, `[1]`."""
    final = descend(problem, arm, RATES).excess[..., -1].median(dim=1).values
    return RATES[final.nan_to_num(nan=torch.inf).argmin(dim=0, keepdim=True)]


type Runs = dict[tuple[Labels, Steps, Arm], Run]


def study(seeds: int) -> Runs:
    """Runs all arms on the same data, with rates that were chosen on as many other seeds."""
    runs: Runs = {}
    for labels in LABELS:
        generator = torch.Generator().manual_seed(0)
        tuning = Problem.draw(labels, seeds, generator)
        problem = Problem.draw(labels, seeds, generator)
        best = {arm: best_rate(tuning, arm) for arm in ARMS}
        for steps, arm in itertools.product(STEPS_TAKEN, ARMS):
            rates = best[arm] if steps.rate is None else steps.rate * best[UNIFORM]
            runs[labels, steps, arm] = descend(problem, arm, rates, steps.plain_length)
    return runs


def table(runs: Runs) -> str:
    """Returns what the arms have reached in the end, as text."""
    lines = [
        f"log10 of the excess risk after {STEPS} steps: that of uniform, and the others' minus it, "
        "mean ± s.d. of paired\nseeds; below 0 is better. In brackets: the rate; `rate` itself is "
        "uniform's best one. Plain length: steps as long as\nthe plain mean's gradient makes them. "
        "|g|/|plain g|: the weighted gradient over that one, mean at rate/4."
    ]
    for labels in LABELS:
        names = "".join(f"{steps.name:>22}" for steps in STEPS_TAKEN)
        lines.append(f"\n{labels.name}\n{'':16}|g|/|plain g|{names}")
        for arm in ARMS:
            line = f"{arm!s:16}{runs[labels, LOW, arm].lengths.mean():13.2f}"
            for steps in STEPS_TAKEN:
                run = runs[labels, steps, arm]
                cell = f"{run.decades().mean():.2f}"
                if arm != UNIFORM:
                    change = run.decades() - runs[labels, steps, UNIFORM].decades()
                    cell = f"{change.mean():+.2f} ± {change.std():.2f}"
                if arm == UNIFORM or steps == OWN:
                    cell += f" ({run.rates.item():.3f})"
                line += f"{cell:>22}"
            lines.append(line)
    return "\n".join(lines)


def draw(runs: Runs, path: Path) -> None:
    """Draws the panels; a line is the median over the seeds, its band holds 80 % of them."""
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    panels: Sequence[Axes] = figure.subplots(1, len(PANELS))
    scales: dict[bool, Axes] = {}
    for axes, (labels, steps, title) in zip(panels, PANELS, strict=True):
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("step")
        axes.margins(y=0.14)
        for arm, colour in COLOURS.items():
            excess = runs[labels, steps, arm].excess[0]
            low, middle, high = excess.quantile(excess.new_tensor([0.1, 0.5, 0.9]), dim=0)
            axes.semilogy(middle, color=colour, label=str(arm), linewidth=1.6)
            axes.fill_between(range(STEPS + 1), low, high, color=colour, alpha=0.15, linewidth=0)
        change = runs[labels, steps, LINUPPER].decades() - runs[labels, steps, UNIFORM].decades()
        text = f"LinUpper ends at\n{10 ** change.median():.2g} × uniform"
        axes.text(0.05, 0.04, text, transform=axes.transAxes, fontsize=9, color=COLOURS[LINUPPER])
        if axes is not (first := scales.setdefault(labels == EXACT, axes)):
            axes.sharey(first)
            axes.tick_params(labelleft=False)
    panels[0].set_ylabel("excess risk, median and 80 % of seeds")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    with complete_file(path) as file:
        figure.savefig(file, dpi=200, format="png")


@dataclass(frozen=True, kw_only=True)
class ToyConfig:
    """The flags of toy_regression."""

    output: Annotated[Path, arg(metavar="PREFIX")] = Path("toy_regression")
    """Write the picture to PREFIX.png, and the table that is printed to PREFIX.txt."""

    seeds: int = 24
    """Problems that are drawn, and solved by each arm."""

    def __post_init__(self) -> None:
        require(self.seeds > 1, "--seeds", self.seeds, "a number above 1")
        if not self.output.absolute().parent.is_dir():
            raise UserError(f"--output: there is no directory {self.output.parent}; make it")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    with reported("running the toy regression"):
        config = parse(ToyConfig, argv, "Reproduce the paper's toy regression, and explain it.")
        runs = study(config.seeds)
        text = table(runs)
        print(text)
        write_complete(Path(f"{config.output}.txt"), f"{text}\n")
        draw(runs, Path(f"{config.output}.png"))


if __name__ == "__main__":
    main()
