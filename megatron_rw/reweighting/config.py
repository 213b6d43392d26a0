"""The settings of the method, from which its flags, their help and their checks are made."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal, NoReturn, get_args, get_origin, get_type_hints

from megatron_rw.errors import UserError
from megatron_rw.kernels.options import (
    LARGEST_EXPONENT,
    LEAST_TEMPERATURE,
    SignalRange,
    Weighting,
    WeightStrategy,
)
from megatron_rw.reweighting.units import Unit

Strategy = Literal["none", WeightStrategy]
Signal = Literal["loss", "entropy", "excess", "learnability", "progress"]
Normalizer = Literal["sample", "token"]
Control = Literal["none", "permute", "random-drop"]
Scope = Literal["microbatch", "global", "deferred"]
Schedule = Literal["step", "linear", "cosine"]

STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)

# At this temperature, weights are 1/|S| up to a factor in e^(±2δ/100): nearly no reweighting.
WARMUP_TEMPERATURE = 100.0


@dataclass(frozen=True, kw_only=True)
class ReweightConfig:
    """Weight every training sample by its own loss (Sow et al., ICLR 2025, arXiv 2502.06733)."""

    strategy: Strategy = "none"
    """How a unit's weight follows from its signal. none: Megatron's own loss, the mean over
    tokens. uniform: the mean over units. linupper: more weight to higher signals, capped above
    the middle of the range. quadratic: more weight to signals near the middle. extremes: more
    weight to the lowest and highest signals. topk: keep --reweight-top-share of the units, those
    with the highest signals, and weight them alike. softmax: weights grow as
    e^(signal/temperature), whatever the range."""

    unit: Unit = "sequence"
    """What has a weight. sequence: a training sample, as in the paper. document: the part of a
    document in a training sample, which ends with its EOD token. token: a token. With token, the
    loss as signal teaches the model flatter predictions: prefer --reweight-signal entropy or
    excess."""

    normalizer: Normalizer = "sample"
    """What a weight is without a strategy. sample: the same for each unit, as in the paper. token:
    in proportion to the unit's tokens, so that uniform is the mean over all tokens of the set."""

    signal: Signal = "loss"
    """What weights follow; the objective stays the weighted sum of losses. entropy: that of the
    model's prediction, which depends on the context alone. excess: the loss above that of a
    reference, see --reweight-reference-load and --reweight-reference-scores. learnability: the loss
    of an early proxy above that of a late one, see --reweight-reference-scores. progress: the loss
    of the model itself at the last snapshot above its loss now."""

    reference_load: str | None = None
    """Checkpoint folder of the reference model of --reweight-signal excess. It scores every
    micro-batch in a forward pass of its own, and may have another shape, but not another
    tokenizer."""

    reference_scores: list[str] | None = None
    """Folders that tools/score_dataset.py wrote for the training data: one for --reweight-signal
    excess; two, of the early and then the late proxy, for learnability."""

    snapshot_interval: int | None = None
    """For --reweight-signal progress: steps between two snapshots of the model's weights. Each
    training step needs one more forward pass, and a snapshot the memory of the parameters."""

    sample_weights: str | None = None
    """Static weights that multiply the others: a .npy of float32, one for each document in the
    order of the .idx; for several datasets a folder with one <dataset>.npy for each."""

    top_share: float | None = None
    """For --reweight-strategy topk: the share of the units to keep. 1 keeps all."""

    target_ess: float | None = None
    """Choose the temperature so that the effective sample size is this fraction of the set. In the
    scope deferred the temperature is that of the previous step."""

    max_weight: float | None = None
    """No weight is more than this many times what it would be without a strategy; others get the
    rest in proportion. In the scope deferred the level that weights are cut at is the previous
    step's."""

    range: SignalRange = "minmax"
    """What is scaled to [-delta, delta]. minmax: all signals of the set. quantile: those between
    the quantiles 0.05 and 0.95, with the others clamped, so that a single one cannot stretch the
    range. With --reweight-strategy softmax they are clamped and not scaled."""

    until: str | None = None
    """Weight uniformly again after this iteration of the run, or, with decay, while the learning
    rate decays (--lr-decay-style WSD)."""

    control: Control = "none"
    """Control experiments. permute: deal the same weights to random samples of the set, which costs
    the same effective sample size. random-drop: let topk keep a random share."""

    control_seed: int = 0
    """Seed of the random numbers of --reweight-control. Each step draws others."""

    delta: float = 1.0
    """Half-width of the interval [-delta, delta] that the signals of a set are scaled to."""

    temperature: float = 1.0
    """Temperature r of the softmax over the units of a set: low is sharp, high is uniform. The
    authors' code has 1.0 and 0.4."""

    warmup_steps: int = 0
    """Steps at temperature 100, which is nearly uniform, before --reweight-temperature holds. With
    --reweight-top-share or --reweight-target-ess, steps at a share or target of 1."""

    warmup_schedule: Schedule = "step"
    """How the temperature goes from 100 to --reweight-temperature: step: stay at 100 for the
    warm-up and then switch, as the authors do. linear, cosine: fall over the whole warm-up."""

    scope: Scope = "microbatch"
    """Which samples compete for weight. microbatch: those of one micro-batch across the
    data-parallel group, as in the paper. global: the whole global batch, scored by a forward pass
    of its own. deferred: the whole global batch, scaled by the range of the previous step's
    signals; no forward pass of its own."""

    moment_decay: float = 0.0
    """For --reweight-scope deferred: how much of the earlier range of signals is kept, as the decay
    of an exponential moving average. 0: the previous step's alone."""

    log_samples: int = 0
    """Write the loss, weight and domain of the first N samples of the last set of every logged
    step into metrics.jsonl. Needs --log-dir."""

    gradient_interval: int = 0
    """Every N steps of reweighted training, run the step with uniform weights as well, and log the
    ratio of the gradients' norms, weighted over uniform, and the cosine between them. Training is
    unaffected; such a step takes twice as long. 0: never."""

    dump_samples: int = 0
    """Write the N units with the highest and the N with the lowest weights of every logged step,
    with dataset and document number, into samples.jsonl. Needs --log-dir."""

    def __post_init__(self) -> None:
        """Checks every setting, and settings that contradict each other."""
        self._check_values()
        if self.strategy == "none":
            self._refuse_idle_settings()
            return
        self._check_strategy()
        self._check_signal()
        self._check_scope()

    def _check_values(self) -> None:
        choices = {name: hint for name, hint in _HINTS.items() if get_origin(hint) is Literal}
        for name, choice in choices.items():
            if getattr(self, name) not in get_args(choice):
                self._refuse(name, f"choose one of {', '.join(get_args(choice))}")
        if not (math.isfinite(self.delta) and self.delta > 0):
            self._refuse("delta", "give a finite number above 0")
        if not (math.isfinite(self.temperature) and self.temperature > LEAST_TEMPERATURE):
            self._refuse("temperature", f"give a finite number above {LEAST_TEMPERATURE:g}")
        counts = ("warmup_steps", "log_samples", "gradient_interval", "dump_samples")
        for name in (*counts, "control_seed"):
            if getattr(self, name) < 0:
                self._refuse(name, "give 0 or more")
        for name in ("top_share", "target_ess"):
            share = getattr(self, name)
            if share is not None and not 0 < share <= 1:
                self._refuse(name, "give a fraction above 0 and up to 1")
        if self.max_weight is not None and not 1 <= self.max_weight < math.inf:
            self._refuse("max_weight", "give a finite number of 1 or more")
        if self.snapshot_interval is not None and self.snapshot_interval < 1:
            self._refuse("snapshot_interval", "give 1 or more")
        if not 0 <= self.moment_decay < 1:
            self._refuse("moment_decay", "give at least 0 and less than 1")
        if self.until not in (None, "decay") and not str(self.until).isdecimal():
            self._refuse("until", "give an iteration, or decay")
        if self.warmup_schedule != "step" and self.warmup_steps == 0:
            self._refuse(
                "warmup_schedule", f"it has nothing to act on: set {flag('warmup_steps')} as well"
            )

    def _refuse_idle_settings(self) -> None:
        # If --reweight-strategy was forgotten, the run would otherwise be a baseline unnoticed.
        idle = [
            flag(field.name)
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        ]
        if idle:
            raise UserError(
                f"{', '.join(idle)} without a strategy does nothing: add {flag('strategy')} "
                f"{'|'.join(s for s in STRATEGIES if s != 'none')}, or drop the flag."
            )

    def _check_strategy(self) -> None:
        if (self.strategy == "topk") != (self.top_share is not None):
            raise UserError(
                f"{flag('strategy')} topk and {flag('top_share')}, the share to keep, need each "
                "other: give both, or neither."
            )
        if self.strategy in ("uniform", "topk"):
            for name in ("target_ess", "max_weight", "range"):
                self._refuse_unless_default(name, f"{flag('strategy')} {self.strategy}")
        if self.target_ess is not None:
            self._refuse_unless_default("temperature", flag("target_ess"))
        idle = {
            "uniform": ("signal", "control", "until"),
            "topk": ("temperature", "delta"),
            "softmax": ("delta",),
        }
        for name in idle.get(self.strategy, ()):
            self._refuse_unless_default(name, f"{flag('strategy')} {self.strategy}")
        if self.control == "none":
            self._refuse_unless_default("control_seed", f"{flag('control')} none")
        if self.control == "random-drop":
            if self.strategy != "topk":
                self._refuse("control", f"it drops what {flag('strategy')} topk would: add that")
            self._refuse_unless_default("signal", f"{flag('control')} random-drop")
        if self.control == "permute" and (self.unit != "sequence" or self.scope == "deferred"):
            self._refuse(
                "control",
                f"it needs the whole set in one place: use {flag('unit')} sequence and "
                f"{flag('scope')} microbatch or global",
            )

    def _check_signal(self) -> None:
        scores = len(self.reference_scores or [])
        sources = (self.reference_load is not None, scores, self.snapshot_interval is not None)
        wanted: dict[str, tuple[tuple[tuple[bool, int, bool], ...], str]] = {
            "excess": (
                ((True, 0, False), (False, 1, False)),
                f"{flag('reference_load')} CHECKPOINT or one folder in {flag('reference_scores')}",
            ),
            "learnability": (
                ((False, 2, False),),
                f"{flag('reference_scores')} EARLY LATE, the folders of two proxies",
            ),
            "progress": (((False, 0, True),), f"{flag('snapshot_interval')} STEPS"),
        }
        if scores == 2 and len(set(self.reference_scores or [])) == 1:
            self._refuse("reference_scores", "the early and the late proxy are the same folder")
        possible, remedy = wanted.get(self.signal, (((False, 0, False),), "no reference"))
        if sources not in possible:
            raise UserError(
                f"{flag('signal')} {self.signal} takes {remedy}, and no other of "
                f"{flag('reference_load')}, {flag('reference_scores')} and "
                f"{flag('snapshot_interval')}."
            )

    def _check_scope(self) -> None:
        if self.scope != "deferred":
            self._refuse_unless_default("moment_decay", f"{flag('scope')} {self.scope}")
        if (self.scope, self.strategy, self.signal) == ("deferred", "topk", "progress"):
            self._refuse(
                "scope",
                "progress is 0 in a step that takes a snapshot, and topk would drop every unit by "
                f"the earlier threshold: use another {flag('scope')} or {flag('strategy')}",
            )
        if self.scope == "deferred" or self.unit != "sequence":
            lowest = weighting_at(self, self.warmup_steps).largest_score / LARGEST_EXPONENT
            if self.target_ess is None and self.temperature < lowest:
                where = f"{flag('scope')} deferred and {flag('unit')} document and token"
                self._refuse(
                    "temperature",
                    f"it is too low for {where}, whose gradients would underflow: use {lowest:g} "
                    "or more, or another scope or unit",
                )

    def _refuse_unless_default(self, name: str, beside: str) -> None:
        default = {field.name: field.default for field in dataclasses.fields(self)}[name]
        if getattr(self, name) != default:
            self._refuse(name, f"it does nothing beside {beside}: drop one of the two")

    def _refuse(self, name: str, remedy: str) -> NoReturn:
        raise UserError(f"{flag(name)} {getattr(self, name)}: {remedy}.")

    @property
    def enabled(self) -> bool:
        """Whether weights are in use."""
        return self.strategy != "none"

    @property
    def by_tokens(self) -> bool:
        """Whether a weight without a strategy is in proportion to the unit's tokens."""
        return self.normalizer == "token"


def flag(field_name: str) -> str:
    """Returns the command-line flag of a field of `ReweightConfig`."""
    return "--reweight-" + field_name.replace("_", "-")


def weighting_at(config: ReweightConfig, step: int) -> Weighting:
    """Returns how weights follow from signals in a step of reweighted training.

    Over the warm-up, the temperature comes from `WARMUP_TEMPERATURE`, and a share to keep or a
    target of the effective sample size from 1. `step` counts the completed steps of reweighted
    training, and is 0 in the first.
    """
    assert config.strategy != "none"
    progress = _warmed_up(config, step)

    def between(start: float, end: float) -> float:
        return end if progress == 1.0 else start + progress * (end - start)

    return Weighting(
        strategy=config.strategy,
        temperature=between(WARMUP_TEMPERATURE, config.temperature),
        delta=config.delta,
        top_share=between(1.0, config.top_share or 1.0),
        target_ess=None if config.target_ess is None else between(1.0, config.target_ess),
        max_weight=config.max_weight,
        range=config.range,
    )


def without_strategy(weighting: Weighting) -> Weighting:
    """Returns the weighting without a strategy, with the same range."""
    return dataclasses.replace(
        weighting,
        strategy="uniform",
        temperature=WARMUP_TEMPERATURE,
        target_ess=None,
        max_weight=None,
    )


def _warmed_up(config: ReweightConfig, step: int) -> float:
    """How much of the warm-up is over, between 0 and 1, by its schedule."""
    if step >= config.warmup_steps:
        return 1.0
    if config.warmup_schedule == "step":
        return 0.0
    progress = step / config.warmup_steps
    return (
        (1.0 - math.cos(math.pi * progress)) / 2.0
        if config.warmup_schedule == "cosine"
        else progress
    )


_HINTS = get_type_hints(ReweightConfig)
