"""The published numbers, one by one; the schedule they make; and what a recipe refuses."""

import csv
import dataclasses
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tinylab.recipe import RECIPES, UserError, named, published, smoke
from tinylab.train import schedule

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
}
"""From the published notebook, typed in by hand: a second opinion on recipe.py."""

IMPOSSIBLE = [
    ("epochs", 0),
    ("epochs", -1),
    ("epochs", 2.5),
    ("epochs", "3"),
    ("epochs", True),
    ("batch_size", 0),
    ("batch_size", 1.5),
    ("width", 0),
    ("max_learning_rate", 0.0),
    ("max_learning_rate", -0.1),
    ("max_learning_rate", math.nan),
    ("max_learning_rate", math.inf),
    ("max_learning_rate", "0.1"),
    ("warmup_share", 0.0),
    ("warmup_share", 1.0),
    ("anneal", "cubic"),
    ("start_divisor", 0.0),
    ("final_divisor", -1.0),
    ("base_momentum", -0.1),
    ("base_momentum", 0.96),
    ("max_momentum", 1.0),
    ("nesterov", "no"),
    ("weight_decay", -1e-4),
    ("weight_decay", math.nan),
    ("flip_probability", 1.1),
    ("flip_probability", -0.1),
    ("flip_probability", None),
    ("hole_probability", 2.0),
    ("pad_to", 63),
    ("pad_to", 192),
    ("pad_to", 70.5),
    ("hole_size", 65),
    ("hole_size", -1),
    ("mean", (0.4, math.nan, 0.4)),
    ("mean", (0.4,)),
    ("mean", (0.4, 0.4, 2.0)),
    ("mean", 0.4),
    ("std", (0.3, 0.0, 0.3)),
    ("std", (0.3, 0.3)),
    ("std", 0.3),
    ("resolution", 32),
    ("name", ""),
    ("name", "../elsewhere"),
    ("name", "two words"),
    ("name", 3),
]


def one_cycle(step: int, total: int, share: float, start: float, peak: float, end: float, cosine: bool) -> float:
    """A value that moves from start to peak and on to end, written out by hand."""
    top, last = share * total - 1, total - 1
    share_done, here, there = (step / top, start, peak) if step <= top else ((step - top) / (last - top), peak, end)
    if cosine:
        share_done = (1 - math.cos(math.pi * share_done)) / 2
    return here + (there - here) * share_done


def test_the_published_recipe_has_the_published_numbers() -> None:
    assert dataclasses.asdict(published()) == PUBLISHED


def test_smoke_is_the_published_recipe_shrunk() -> None:
    changed = {name for name, value in dataclasses.asdict(smoke()).items() if value != PUBLISHED[name]}
    assert changed == {"name", "epochs", "batch_size", "width"}


def test_recipes_go_by_their_own_names() -> None:
    assert {name: recipe().name for name, recipe in RECIPES.items()} == {name: name for name in RECIPES}
    with pytest.raises(UserError, match=r"'nope'.*published.*smoke"):
        named("nope")


def test_importing_recipes_loads_no_torch(subprocess_environment: dict[str, str]) -> None:
    code = "import sys, tinylab.recipe; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=subprocess_environment, timeout=120).returncode == 0


@pytest.mark.parametrize(("field", "value"), IMPOSSIBLE)
def test_an_impossible_value_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(UserError, match=rf"\b{field}\b"):
        replace(published(), **{field: value})


def test_nesterov_needs_momentum_at_every_step() -> None:
    with pytest.raises(UserError, match="nesterov"):
        replace(published(), base_momentum=0.0)
    assert replace(published(), base_momentum=0.0, nesterov=False).base_momentum == 0


def test_a_recipe_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        published().epochs = 1  # type: ignore[misc]


@pytest.mark.parametrize(("images", "steps"), [(77_000, 301), (76_800, 300), (76_801, 301), (1, 1), (256, 1)])
def test_the_last_smaller_batch_is_a_step(images: int, steps: int) -> None:
    assert published().steps_per_epoch(images) == steps


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
        lambda recipe: replace(recipe, start_divisor=25.0, final_divisor=1e4, base_momentum=0.5, epochs=2),
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
            step, start=start, peak=recipe.max_learning_rate, end=start / recipe.final_divisor, **shape
        )
        assert learning_rate == pytest.approx(expected, rel=1e-9, abs=1e-12)
        expected = one_cycle(
            step, start=recipe.max_momentum, peak=recipe.base_momentum, end=recipe.max_momentum, **shape
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
