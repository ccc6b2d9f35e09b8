"""The published numbers, and the target recipes', one by one; what follows from them; and what a
recipe refuses."""

import csv
import dataclasses
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tinylab.exceptions import UserError
from tinylab.recipe import BATCHED_ONLY, Recipe, training_petaflop
from tinylab.recipes import RECIPES, accurate, cpu, named, official, published, smoke, speedrun
from tinylab.training.optim import schedule

PUBLISHED = {
    "name": "published",
    "epochs": 30,
    "batch_size": 256,
    "max_learning_rate": 0.02,
    "warmup_share": 1 / 3,
    "anneal": "linear",
    "start_divisor": 10,
    "final_divisor": 10,
    "base_momentum": 0.85,
    "max_momentum": 0.95,
    "nesterov": True,
    "weight_decay": 0.0001,
    "flip_probability": 0.7,
    "pad_to": 70,
    "hole_size": 32,
    "hole_probability": 0.7,
    "mean": (0.442, 0.442, 0.442),
    "std": (0.278, 0.278, 0.278),
    "width": 64,
    "resolution": 64,
    # What the notebook does not have:
    "micro_batch": None,
    "ramp": (),
    "test_resolution": 64,
    "drop_last": False,
    "split": "merged",
    "augmentation": "albumentations",
    "alternating_flip": False,
    "crop_probability": 0,
    "crop_min_area": 0.35,
    "brightness": 0,
    "contrast": 0,
    "cutmix_probability": 0,
    "mixup_probability": 0,
    "resizemix_probability": 0,
    "cutmix_alpha": 1,
    "mixup_alpha": 0.2,
    "unmixed_share": 0.0,
    "label_smoothing": 0,
    "optimizer": "sgd",
    "muon_learning_rate": 0.02,
    "muon_weight_decay": 0.075,
    "decay_1d": True,
    "ema_decay": None,
    "ema_bn_batches": 20,
    "initialisation": "torch",
    "zero_init_residual": False,
    "bn_momentum": 0.1,
}
"""From the published notebook, typed in by hand: a second opinion on recipe.py."""

COMMON = PUBLISHED | {
    "drop_last": True,
    "base_momentum": 0.9,
    "max_momentum": 0.9,
    "start_divisor": 10,
    "decay_1d": False,
    "initialisation": "kaiming",
    "zero_init_residual": True,
    "augmentation": "batched",
    "alternating_flip": True,
    "flip_probability": 0.5,
    "mean": (0.481, 0.448, 0.398),
    "std": (0.277, 0.269, 0.282),
}

ACCURATE = COMMON | {
    "name": "accurate",
    "batch_size": 512,
    "max_learning_rate": 1,
    "weight_decay": 0.0005,
    "warmup_share": 3 / 30,
    "anneal": "linear",
    "final_divisor": 10,  # of a tenth: a hundredth of the peak
    "label_smoothing": 0.15,
    "pad_to": 64 + 2 * 8,
    "hole_size": 16,
    "hole_probability": 0.5,
    "brightness": 0.3,
    "contrast": 0.3,
    "cutmix_probability": 0.3 / 2,
    "mixup_probability": 0.3 / 2,
    "unmixed_share": 1 / 6,
    "ema_decay": 0.997,
}

SPEEDRUN = COMMON | {
    "name": "speedrun",
    "epochs": 12,
    "batch_size": 512,
    "ramp": ((40, 0.25), (48, 0.35)),
    "max_learning_rate": 1.2,
    "weight_decay": 0.0008,
    "warmup_share": 1.5 / 12,
    "anneal": "linear",
    "final_divisor": 5,  # of a tenth: a fiftieth of the peak
    "label_smoothing": 0.2,
    "pad_to": 64 + 2 * 4,
    "hole_size": 0,
    "hole_probability": 0,
    "ema_decay": 0.99,
    "bn_momentum": 0.3,
}

OFFICIAL = COMMON | {
    "name": "official",
    "split": "official",
    "epochs": 200,
    "batch_size": 256,
    "max_learning_rate": 0.5,
    "weight_decay": 0.0003,
    "warmup_share": 5 / 200,
    "anneal": "cos",
    "final_divisor": 1000,  # of a tenth: as good as zero
    "label_smoothing": 0.1,
    "pad_to": 64 + 2 * 8,
    "crop_probability": 0.5,
    "crop_min_area": 0.35,
    "hole_size": 26,
    "hole_probability": 0.1,
    "cutmix_probability": 0.35,
    "resizemix_probability": 0.25,
    "mixup_probability": 0.2,
    "mixup_alpha": 0.8,
    "unmixed_share": 0.0,
    "ema_decay": 0.99985,
    "ema_bn_batches": 40,
    "alternating_flip": False,
}
"""The three target recipes, typed in by hand from the study that they come from."""

IMPOSSIBLE = {
    "epochs": [0, -1, 2.5, "3", True],
    "batch_size": [0, 1.5],
    "width": [0],
    "max_learning_rate": [0.0, -0.1, math.nan, math.inf, "0.1"],
    "warmup_share": [0.0, 1.0],
    "anneal": ["cubic"],
    "start_divisor": [0.0],
    "final_divisor": [-1.0],
    "base_momentum": [-0.1, 0.96],
    "max_momentum": [1.0],
    "nesterov": ["no"],
    "weight_decay": [-0.0001, math.nan],
    "flip_probability": [1.1, -0.1, None],
    "hole_probability": [2.0],
    "pad_to": [63, 192, 70.5],
    "hole_size": [65, -1],
    "mean": [(0.4, math.nan, 0.4), (0.4,), (0.4, 0.4, 2.0), 0.4],
    "std": [(0.3, 0.0, 0.3), (0.3, 0.3), 0.3],
    "resolution": [0, 4, 60, 264, 64.0],
    "test_resolution": [0, 65, 512, None],
    "ramp": [None, 32, (32, 0.5), ((32,),), ((32, 0.5, 1),), [(32, 0.5)], (("32", 0.5),),
        ((32, math.nan),), ((33, 0.5),), ((32.0, 0.5),), ((0, 0.5),), ((32, 0.0),), ((32, -0.5),),
        ((32, 1.0),), ((32, 0.6), (48, 0.6)), ((40, 0.5), (48, 0.5))],
    "drop_last": [1, None],
    "augmentation": ["none", None],
    "alternating_flip": [1],
    "crop_probability": [1.1, -0.1, math.nan],
    "crop_min_area": [0.0, 1.1, "0.5"],
    "brightness": [-0.1, 1.1, math.inf],
    "contrast": [-0.1, 1.1, None],
    "cutmix_probability": [-0.1, 1.1],
    "mixup_probability": [-0.1, 1.1],
    "resizemix_probability": [-0.1, 1.1, True],
    "cutmix_alpha": [0.0, 101.0],
    "mixup_alpha": [0.0, -1.0, math.nan],
    "unmixed_share": [-0.1, 1.0],
    "label_smoothing": [-0.1, 1.0, math.nan],
    "optimizer": ["adam", None],
    "muon_learning_rate": [0.0, -0.02, math.nan],
    "muon_weight_decay": [-0.1, math.inf],
    "micro_batch": [0, 2.5, "auto"],
    "split": ["train", None],
    "decay_1d": [0],
    "ema_decay": [0.0, 1.0, -0.1, math.nan, False, "0.9"],
    "ema_bn_batches": [0, 100001, 1.5],
    "initialisation": ["xavier", None],
    "zero_init_residual": ["yes"],
    "bn_momentum": [0.0, 1.1, None],
    "name": ["", "../elsewhere", "two words", 3],
}  # fmt: skip

BATCHED = replace(published(), augmentation="batched")


def one_cycle(
    step: int, total: int, share: float, start: float, peak: float, end: float, cosine: bool
) -> float:
    """A value that moves from start to peak and on to end, written out by hand."""
    top, last = share * total - 1, total - 1
    share_done, here, there = (
        (step / top, start, peak) if step <= top else ((step - top) / (last - top), peak, end)
    )
    if cosine:
        share_done = (1 - math.cos(math.pi * share_done)) / 2
    return here + (there - here) * share_done


def test_the_published_recipe_has_the_published_numbers() -> None:
    assert dataclasses.asdict(published()) == PUBLISHED


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [(accurate, ACCURATE), (speedrun, SPEEDRUN), (official, OFFICIAL)],
    ids=lambda each: "",
)
def test_the_target_recipes_have_the_numbers_of_the_study(
    recipe: Callable[[], Recipe], expected: dict
) -> None:
    assert dataclasses.asdict(recipe()) == expected


def test_the_cpu_recipe_keeps_to_its_budget() -> None:
    """A quarter of a million images of 64 x 64 pixels, which are 3.33 PFLOP; `published` takes
    30.8."""
    assert training_petaflop(cpu(), 77_000) <= 250_000 * 13.33 / 1e6
    assert training_petaflop(published(), 77_000) == pytest.approx(
        30 * 77_000 * 13.33 / 1e6, rel=1e-3
    )
    assert training_petaflop(replace(cpu(), width=32), 77_000) == pytest.approx(
        training_petaflop(cpu(), 77_000) / 4, rel=1e-3
    )


def test_smoke_is_the_published_recipe_shrunk() -> None:
    changed = {
        name for name, value in dataclasses.asdict(smoke()).items() if value != PUBLISHED[name]
    }
    assert changed == {"name", "epochs", "batch_size", "width"}


def test_recipes_go_by_their_own_names() -> None:
    assert {name: recipe().name for name, recipe in RECIPES.items()} == {
        name: name for name in RECIPES
    }
    with pytest.raises(UserError, match=r"'nope'.*published.*smoke"):
        named("nope")


def test_importing_recipes_loads_no_torch(subprocess_environment: dict[str, str]) -> None:
    code = "import sys, tinylab.recipe; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], env=subprocess_environment, timeout=120
        ).returncode
        == 0
    )


@pytest.mark.parametrize("field", IMPOSSIBLE)
def test_an_impossible_value_is_refused_by_name(field: str) -> None:
    """In a recipe whose augmentation allows every field: it is the value that is refused."""
    for value in IMPOSSIBLE[field]:
        with pytest.raises(UserError, match=rf"^{field} must be [^\n]+, not [^\n]*$"):
            replace(BATCHED, **{field: value})


def test_every_field_has_an_impossible_value() -> None:
    assert IMPOSSIBLE.keys() == {field.name for field in dataclasses.fields(Recipe)}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("resolution", 16),
        ("resolution", 256),
        ("test_resolution", 80),
        ("ramp", ((16, 0.1), (256, 0.2), (24, 0.6))),
        ("crop_min_area", 1.0),
        ("brightness", 1.0),
        ("cutmix_probability", 1.0),
        ("label_smoothing", 0.0),
        ("optimizer", "muon"),
        ("ema_decay", None),
        ("ema_decay", 0.5),
        ("bn_momentum", 1.0),
        ("unmixed_share", 0.99),
    ],
)
def test_a_possible_value_is_taken(field: str, value: object) -> None:
    assert getattr(replace(BATCHED, **{field: value}), field) == value


@pytest.mark.parametrize("field", BATCHED_ONLY)
def test_what_albumentations_would_ignore_is_refused(field: str) -> None:
    change = {field: True if field == "alternating_flip" else 0.25}
    with pytest.raises(
        UserError, match=rf"^{field} must be left alone unless augmentation is 'batched'"
    ):
        replace(published(), **change)
    assert getattr(replace(BATCHED, **change), field) == change[field]


def test_the_ways_of_mixing_share_one_probability() -> None:
    thirds = {f"{way}_probability": 1 / 3 for way in ("cutmix", "mixup", "resizemix")}
    assert replace(BATCHED, **thirds).mixing_probability == pytest.approx(1)
    assert official().mixing_probability == pytest.approx(0.8)
    with pytest.raises(UserError, match=r"cutmix_probability must be at most 1 together"):
        replace(BATCHED, **thirds | {"mixup_probability": 0.4})


def test_nesterov_needs_momentum_at_every_step() -> None:
    with pytest.raises(UserError, match="nesterov"):
        replace(published(), base_momentum=0.0)
    assert replace(published(), base_momentum=0.0, nesterov=False).base_momentum == 0


def test_a_recipe_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        published().epochs = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("images", "steps"), [(77_000, 301), (76_800, 300), (76_801, 301), (1, 1), (256, 1)]
)
def test_the_last_smaller_batch_is_a_step(images: int, steps: int) -> None:
    assert published().steps_per_epoch(images) == steps


@pytest.mark.parametrize(
    ("images", "steps"), [(77_000, 150), (76_800, 150), (1023, 1), (512, 1), (511, 0)]
)
def test_a_last_smaller_batch_that_is_left_out_is_no_step(images: int, steps: int) -> None:
    assert accurate().steps_per_epoch(images) == steps


@pytest.mark.parametrize(
    ("recipe", "phases"),
    [
        (speedrun(), {40: 3, 48: 4, 64: 5}),
        (cpu(), {32: 4, 40: 2, 48: 1, 56: 1}),
        (replace(speedrun(), epochs=100), {40: 25, 48: 35, 64: 40}),
        (replace(speedrun(), epochs=16), {40: 4, 48: 6, 64: 6}),
        (replace(speedrun(), epochs=2), {48: 1, 64: 1}),
        (replace(speedrun(), ramp=((64, 0.5),), resolution=56), {64: 6, 56: 6}),
        (replace(speedrun(), ramp=()), {64: 12}),
        (replace(published(), resolution=32), {32: 30}),
    ],
    ids=lambda value: "",
)
def test_the_resolution_goes_up_the_ramp_once(recipe: Recipe, phases: dict[int, int]) -> None:
    expected = [resolution for resolution, epochs in phases.items() for _ in range(epochs)]
    assert [recipe.resolution_at(epoch) for epoch in range(1, recipe.epochs + 1)] == expected


def test_the_logged_learning_rates_come_out_bit_for_bit(repository: Path) -> None:
    with open(repository / "results" / "reference" / "published_run.csv", newline="") as file:
        logged = [float(row["lr_at_epoch_start"]) for row in csv.DictReader(file)]
    ours = [learning_rate for _, learning_rate, _ in schedule(published(), 77_000)]
    assert len(logged) == 30
    assert len(ours) == 30 * 301
    assert [ours[301 * epoch] for epoch in range(30)] == logged


def test_momentum_falls_while_the_learning_rate_rises() -> None:
    steps = list(schedule(published(), 77_000))
    momenta = [momentum for _, _, momentum in steps]
    assert momenta[0] == pytest.approx(0.95, abs=1e-12)
    assert momenta[-1] == pytest.approx(0.95, abs=1e-12)
    peak = max(steps, key=lambda row: row[1])
    assert peak[1] == pytest.approx(0.02, rel=1e-3)
    assert peak[2] == min(momenta) == pytest.approx(0.85, rel=1e-3)
    assert steps[-1][1] == pytest.approx(0.02 / 10 / 10)


@pytest.mark.parametrize(
    "change",
    [
        lambda recipe: recipe,
        lambda recipe: replace(recipe, epochs=50),
        lambda recipe: replace(recipe, anneal="cos", warmup_share=0.2, epochs=3),
        lambda recipe: replace(
            recipe, start_divisor=25.0, final_divisor=1e4, base_momentum=0.5, epochs=2
        ),
    ],
    ids=["published", "50 epochs", "cosine", "other ends"],
)
def test_every_step_is_on_the_curve(change: Callable) -> None:
    recipe = change(published())
    total = recipe.epochs * 301
    start = recipe.max_learning_rate / recipe.start_divisor
    shape = {"total": total, "share": recipe.warmup_share, "cosine": recipe.anneal == "cos"}
    count = 0
    for step, learning_rate, momentum in schedule(recipe, 77_000):
        assert step == count
        expected = one_cycle(
            step,
            start=start,
            peak=recipe.max_learning_rate,
            end=start / recipe.final_divisor,
            **shape,
        )
        assert learning_rate == pytest.approx(expected, rel=1e-9, abs=1e-12)
        expected = one_cycle(
            step,
            start=recipe.max_momentum,
            peak=recipe.base_momentum,
            end=recipe.max_momentum,
            **shape,
        )
        assert momentum == pytest.approx(expected, rel=1e-9)
        count += 1
    assert count == total


@pytest.mark.parametrize("steps", range(1, 8))
def test_a_run_of_a_few_steps_has_a_schedule(steps: int) -> None:
    """With three steps and a third of them rising, the rise takes no time at all."""
    rows = list(schedule(replace(published(), epochs=1), 256 * steps))
    assert len(rows) == steps
    for _, learning_rate, momentum in rows:
        assert 0 < learning_rate <= 0.02 + 1e-9
        assert 0.85 - 1e-9 <= momentum <= 0.95 + 1e-9
