"""What the chain on a GPU does, in which order, and by which rules it decides; pure data and functions.

`one-sitting` is meant for half an hour of an H100; `full` asks every question, in the order that promises most:
throughput, the published recipe as the point of reference, learning rate and decay, loss and schedule and average,
crops, mixing, small things; then the final runs, the speedrun, and the long recipe of the official split. Choices are
made on the split `select` alone, which holds no test image of `merged`. It does hold official validation images (667 of
its 7,000 held-out ones), so nothing is chosen for `official` here: that recipe runs as it was written down.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field

from tinylab.exceptions import UserError
from tinylab.results import GOAL


@dataclass(frozen=True)
class Candidate:
    """changes: fields of the recipe as it stands so far. options: `compiled` and `precision` of the run."""

    label: str
    changes: dict = field(default_factory=dict)
    options: dict = field(default_factory=dict)


BASE = Candidate("as it stands")


@dataclass(frozen=True)
class Outcome:
    """What a candidate's runs gave, a value for each seed: top-1 in percent on the held-out images of `select`, the
    mean loss of the last epoch's training in nats, seconds of training. A run that failed has none, and `failed` says
    why."""

    label: str
    top1: list[float]
    train_loss: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    failed: str = ""

    @property
    def mean(self) -> float:
        return statistics.mean(self.top1) if self.top1 and not self.failed else float("-inf")


Rule = Callable[[list[Outcome]], tuple[str, str]]
"""From the outcomes, the recipe as it stands first, to the label of the one chosen and the reason in a sentence."""


def gain(points: float) -> Rule:
    """The best one, if it is at least so many points above the recipe as it stands."""

    def decide(outcomes: list[Outcome]) -> tuple[str, str]:
        base = outcomes[0]
        others = [outcome for outcome in outcomes[1:] if outcome.mean > float("-inf")]
        if not others:
            return base.label, "no other run came to its end: nothing changes"
        best = max(others, key=lambda outcome: outcome.mean)
        if base.mean == float("-inf"):
            return (
                best.label,
                f"the recipe as it stands failed; {best.label} is the best of the others",
            )
        above = best.mean - base.mean
        said = f"{best.label} is the best of the others, {above:+.2f} points from the recipe as it stands"
        if round(above, 6) < points:
            return base.label, f"{said}; {points:.2f} are asked for: nothing changes"
        return best.label, f"{said}; {points:.2f} are asked for: adopted"

    return decide


def fastest_reaching(top1: float) -> Rule:
    """Of those that reach so many percent the one with least training time; of none the most accurate."""

    def decide(outcomes: list[Outcome]) -> tuple[str, str]:
        alive = [outcome for outcome in outcomes if outcome.mean > float("-inf")]
        if not alive:
            return outcomes[0].label, "no run came to its end: nothing changes"
        reaching = [outcome for outcome in alive if outcome.mean >= top1]
        if reaching:
            best = min(reaching, key=lambda outcome: statistics.mean(outcome.seconds))
            seconds = statistics.mean(best.seconds)
            return (
                best.label,
                f"{best.label} is the fastest that reaches {top1:.2f} %: {seconds:.1f} s of training",
            )
        best = max(alive, key=lambda outcome: outcome.mean)
        return (
            best.label,
            f"none reaches {top1:.2f} %; {best.label} comes nearest: {best.mean:.2f} %",
        )

    return decide


def fastest_of_same_loss(share: float) -> Rule:
    """The one with least training time among those whose training loss is at most so much above the first one's.
    Raises `UserError` if that one failed."""

    def decide(outcomes: list[Outcome]) -> tuple[str, str]:
        alive = [outcome for outcome in outcomes if outcome.train_loss and not outcome.failed]
        if outcomes[0] not in alive:
            raise UserError(
                f"{outcomes[0].label}, which the others are judged by, failed: {outcomes[0].failed}"
            )
        reference = statistics.mean(outcomes[0].train_loss)
        same = [o for o in alive if statistics.mean(o.train_loss) <= reference * (1 + share)]
        best = min(same, key=lambda outcome: statistics.mean(outcome.seconds))
        return best.label, (
            f"{best.label} is the fastest, {statistics.mean(best.seconds):.1f} s of training, of {len(same)} whose "
            f"training loss is within {share * 100:g} % of {outcomes[0].label}'s {reference:.4f}"
        )

    return decide


# --- The steps --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Throughput:
    """The table of `bench_throughput.py`, or its first, most telling `rows`."""

    name: str = "throughput"
    rows: int | None = 6


@dataclass(frozen=True)
class Stage:
    """A question about a recipe, answered on `select`; what is chosen holds for all later steps. `changes` go into all
    of its runs but are not adopted. rule_in_words: the stop rule, for the log."""

    name: str
    recipe: str
    question: str
    candidates: tuple[Candidate, ...]
    rule: Rule
    rule_in_words: str
    changes: dict = field(default_factory=dict)
    seeds: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class Final:
    """A run whose number is published. cold: in a new process that finds no compiled code of an earlier one, so that
    its cold clock counts; the others' warm clocks are as good."""

    recipe: str
    protocol: str
    seed: int
    cold: bool = False

    @property
    def name(self) -> str:
        return f"{self.recipe}-{self.protocol}-s{self.seed}"


@dataclass(frozen=True)
class Figures:
    """Maps, tables and figures of a final run, for the README."""

    of: Final

    @property
    def name(self) -> str:
        return f"figures-{self.of.name}"


@dataclass(frozen=True)
class Notebook:
    """The committed notebook executed: it shows the published recipe's run, which is finished by then."""

    of: Final

    @property
    def name(self) -> str:
        return "notebook"


Step = Throughput | Stage | Final | Figures | Notebook

N1 = "one seed: at least 0.40 points above the recipe as it stands"
N2 = "two seeds: a mean at least 0.20 points above the recipe as it stands"


def _stage(name: str, recipe: str, question: str, *candidates: Candidate, **more: object) -> Stage:
    settings = {"rule": gain(0.4), "rule_in_words": N1} | more
    return Stage(name, recipe, question, (BASE, *candidates), **settings)


def _one(field_: str, *values: object, **more: object) -> tuple[Candidate, ...]:
    """Candidates that differ in one field."""
    return tuple(Candidate(f"{field_} {value}", {field_: value} | more) for value in values)


FORMATS = Stage(
    "formats",
    "accurate",
    "which number format, and compiled or not?",
    (
        Candidate("fp32 (convolutions in TF32)", options={"precision": "fp32"}),
        Candidate("fp16, eager", options={"precision": "fp16"}),
        Candidate("bf16, compiled", options={"precision": "bf16", "compiled": True}),
    ),
    fastest_of_same_loss(0.02),
    "one epoch: the fastest whose training loss is within 2 % of that of fp32 as PyTorch computes it by default",
    {"epochs": 1},
)
"""Decides how every later run computes; on a CPU there is one way only."""


def _rate_and_decay(name: str, pairs: list[tuple[float, float]], **more: object) -> Stage:
    candidates = [
        Candidate(f"lr {rate:g}, wd {decay:g}", {"max_learning_rate": rate, "weight_decay": decay})
        for rate, decay in pairs
    ]
    return _stage(
        name,
        "accurate",
        "which peak learning rate and weight decay? (Base: 1.0, 5e-4.)",
        *candidates,
        **more,
    )


def _mix(cutmix: float, mixup: float, **more: object) -> Candidate:
    label = f"CutMix {cutmix:g}, MixUp {mixup:g}" + (", to the end" if more else "")
    return Candidate(label, {"cutmix_probability": cutmix, "mixup_probability": mixup} | more)


def one_sitting() -> list[Step]:
    """Throughput, the reference, the one choice that promises most, in 12 epochs, first final numbers; what is left of
    the time goes to more seeds."""
    published, best = Final("published", "merged", 0), Final("accurate", "merged", 0)
    return [
        Throughput(),
        published,
        FORMATS,
        _rate_and_decay("lr-wd-12", [(2.0, 5e-4), (1.0, 1e-3)], changes={"epochs": 12}),
        best,
        Final("speedrun", "merged", 0, cold=True),
        Notebook(published),
        Figures(best),
        *(Final("speedrun", "merged", seed) for seed in range(1, 5)),
        *(Final("accurate", "merged", seed) for seed in (1, 2)),
        Throughput("throughput-rest", None),
    ]


def full() -> list[Step]:
    """All questions, several hours; each call goes on where the last one ended."""
    published, best = Final("published", "merged", 0), Final("accurate", "merged", 0)
    grid = [
        (rate, decay)
        for rate in (0.5, 1.0, 2.0)
        for decay in (2.5e-4, 5e-4, 1e-3)
        if (rate, decay) != (1.0, 5e-4)
    ]
    return [
        Throughput(),
        published,
        FORMATS,
        _rate_and_decay("lr-wd", grid),
        *_loss_schedule_average(),
        *_augmentation(),
        _small_things(),
        best,
        Notebook(published),
        Figures(best),
        *(Final("accurate", "merged", seed) for seed in range(1, 5)),
        *_speedrun(),
        *(Final("official", "official", seed) for seed in range(3)),
        *(Final("published", "merged", seed) for seed in (1, 2)),
        Throughput("throughput-rest", None),
    ]


def _loss_schedule_average() -> list[Step]:
    return [
        _stage(
            "label-smoothing",
            "accurate",
            "how much label smoothing?",
            *_one("label_smoothing", 0.0, 0.1, 0.2),
        ),
        _stage(
            "schedule",
            "accurate",
            "which shape and end of the schedule? (Base: a line to a hundredth of the peak.)",
            Candidate("cosine", {"anneal": "cos"}),
            Candidate("to 0", {"final_divisor": 1e4}),
            Candidate("to a twentieth", {"final_divisor": 2.0}),
        ),
        _stage(
            "average",
            "accurate",
            "how long is the running average?",
            *_one("ema_decay", 0.99, 0.999),
            Candidate("no average", {"ema_decay": None}),
            Candidate("statistics from 100 batches", {"ema_bn_batches": 100}),
        ),
    ]


def _augmentation() -> list[Step]:
    light = {"crop_probability": 1.0, "crop_min_area": 0.35}
    return [
        _stage(
            "crops",
            "accurate",
            "which crops, flips and holes?",
            Candidate("pad by 4", {"pad_to": 72}),
            Candidate("light resized crops", light),
            Candidate("light resized crops, tested at 72 px", light | {"test_resolution": 72}),
            Candidate("every other crop resized", light | {"crop_probability": 0.5}),
            Candidate("heavy resized crops", {"crop_probability": 1.0, "crop_min_area": 0.08}),
            Candidate("flips by chance", {"alternating_flip": False}),
            Candidate("no holes", {"hole_size": 0, "hole_probability": 0.0}),
        ),
        _stage(
            "mixing",
            "accurate",
            "how many batches are mixed, and how?",
            _mix(0.0, 0.0),
            _mix(0.3, 0.0),
            _mix(0.0, 0.3),
            _mix(0.3, 0.3),
            _mix(0.15, 0.15, unmixed_share=0.0),
        ),
    ]


def _small_things() -> Step:
    return _stage(
        "small-things",
        "accurate",
        "does any of these help?",
        Candidate("blocks start in full", {"zero_init_residual": False}),
        Candidate("decay everywhere", {"decay_1d": True}),
        Candidate("batch 256, half the rate", {"batch_size": 256, "max_learning_rate": 0.5}),
        Candidate("batch 1024", {"batch_size": 1024}),
        Candidate("no jitter", {"brightness": 0.0, "contrast": 0.0}),
        rule=gain(0.2),
        rule_in_words=N2,
        seeds=(0, 1),
    )


def _speedrun() -> list[Step]:
    ramps = {
        "40/48/64 px": ((40, 0.25), (48, 0.35)),
        "32/48/64 px": ((32, 0.3), (48, 0.3)),
        "64 px": (),
    }
    frontier = [
        Candidate(f"{epochs} epochs, {name}", {"epochs": epochs, "ramp": ramp})
        for epochs in (10, 12, 14)
        for name, ramp in ramps.items()
        if (epochs, name) != (12, "40/48/64 px")
    ]
    return [
        _stage(
            "frontier",
            "speedrun",
            "how few epochs, at which sizes? (Base: 12; 40, 48, 64 px.)",
            *frontier,
            rule=fastest_reaching(GOAL),
            rule_in_words=f"least training time among those that reach {GOAL} % on `select`, with a tenth fewer "
            "training images than the final run has",
        ),
        _stage(
            "muon",
            "speedrun",
            "Muon for the convolution weights, at equal epochs?",
            *(
                Candidate(f"Muon {rate:g}", {"optimizer": "muon", "muon_learning_rate": rate})
                for rate in (0.02, 0.05, 0.1, 0.24)
            ),
            rule=gain(0.5),
            rule_in_words="one seed: at least 0.50 points above the recipe as it stands",
        ),
        *(Final("speedrun", "merged", seed, cold=seed < 3) for seed in range(10)),
    ]


PLANS = {"one-sitting": one_sitting, "full": full}
