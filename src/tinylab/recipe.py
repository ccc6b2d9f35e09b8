"""What a run is: one frozen dataclass, and every number that was ever published as a named recipe.

A variant is `replace(published(), epochs=50)`; the command line overrides any field by its name. Imports no torch, so
that the command line can refuse a bad recipe before anything heavy is loaded.
"""

import dataclasses
import math
import re
from dataclasses import dataclass, replace
from typing import Literal


class UserError(Exception):
    """Something the user can mend. The command line prints it as one line and exits with status 2."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Every choice that changes the result of a run, apart from data, split and seed.

    Raises `UserError`, naming the field, when a value is impossible.
    """

    name: str
    """Name of the recipe; the run folder starts with it."""
    epochs: int
    """Passes over the training images; the schedule is stretched to fit them."""
    batch_size: int
    """Images per optimiser step. The last, smaller batch of an epoch is kept."""
    max_learning_rate: float
    """Peak of the one-cycle schedule, per step of the mean cross-entropy."""
    warmup_share: float
    """Share of all steps in which the learning rate rises (OneCycleLR's pct_start), inside (0, 1)."""
    anneal: Literal["linear", "cos"]
    """Shape of rise and fall."""
    start_divisor: float
    """The first learning rate is max_learning_rate / start_divisor."""
    final_divisor: float
    """The last learning rate is the first one / final_divisor."""
    base_momentum: float
    """Momentum while the learning rate peaks."""
    max_momentum: float
    """Momentum at both ends of the cycle."""
    nesterov: bool
    """Nesterov's form of momentum."""
    weight_decay: float
    """L2 pull, added to the gradient of every parameter."""
    flip_probability: float
    """Probability of a horizontal flip."""
    pad_to: int
    """Pixels per side after reflect padding, before the random crop back to `resolution`; equal to it: no crop."""
    hole_size: int
    """Pixels per side of the one square hole, filled with `mean`; 0: no hole."""
    hole_probability: float
    """Probability of the hole."""
    mean: tuple[float, float, float]
    """Subtracted from red, green, blue, on the scale 0..1."""
    std: tuple[float, float, float]
    """Divides red, green, blue, on the scale 0..1."""
    width: int = 64
    """Channels of the first stage; the others have 2, 4 and 8 times as many. 64 is ResNet-18."""
    resolution: int = 64
    """Pixels per side of what the network sees; the data set's own size."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _require_type(self, field)
        for field, most in (("epochs", 100_000), ("batch_size", 1_000_000), ("width", 1024)):
            _require(self, field, getattr(self, field) >= 1, "at least 1")
            _require(self, field, getattr(self, field) <= most, f"at most {most:,}")
        for field in ("max_learning_rate", "start_divisor", "final_divisor"):
            _require(self, field, getattr(self, field) > 0, "above 0")
        _require(self, "warmup_share", 0 < self.warmup_share < 1, "between 0 and 1, both excluded")
        _require(self, "anneal", self.anneal in ("linear", "cos"), "'linear' or 'cos'")
        _require(
            self, "name", bool(re.fullmatch(r"[A-Za-z0-9._-]{1,64}", self.name)), "letters, digits, '.', '_' or '-'"
        )
        _require(self, "max_momentum", 0 <= self.max_momentum < 1, "at least 0 and below 1")
        _require(self, "base_momentum", 0 <= self.base_momentum <= self.max_momentum, "between 0 and max_momentum")
        _require(self, "nesterov", not self.nesterov or self.base_momentum > 0, "false where momentum can be 0")
        _require(self, "weight_decay", self.weight_decay >= 0, "0 or more")
        for field in ("flip_probability", "hole_probability"):
            _require(self, field, 0 <= getattr(self, field) <= 1, "between 0 and 1")
        _require(self, "resolution", self.resolution == 64, "64, the size of the data set's images")
        _require(self, "pad_to", self.resolution <= self.pad_to < 3 * self.resolution, "from 64 to 191")
        _require(self, "hole_size", 0 <= self.hole_size <= self.resolution, "from 0 to 64")
        _require(self, "mean", all(0 <= m <= 1 for m in self.mean), "three numbers between 0 and 1")
        _require(self, "std", all(s > 0 for s in self.std), "three numbers above 0")

    def steps_per_epoch(self, images: int) -> int:
        """Optimiser steps in one pass over `images` training images."""
        return math.ceil(images / self.batch_size)


def _require_type(recipe: Recipe, field: dataclasses.Field) -> None:
    """Refuses what a notebook's parameter cell may hold by mistake: 30.0 or "30" epochs, two means, a NaN."""
    value = getattr(recipe, field.name)
    if field.type is float:
        _require(recipe, field.name, _is_finite(value), "a finite number")
    elif field.type is int:
        _require(recipe, field.name, type(value) is int, "a whole number")
    elif field.type is bool:
        _require(recipe, field.name, type(value) is bool, "true or false")
    elif field.type is str:
        _require(recipe, field.name, isinstance(value, str), "text")
    elif field.name in ("mean", "std"):
        three = isinstance(value, tuple) and len(value) == 3
        _require(recipe, field.name, three and all(map(_is_finite, value)), "three finite numbers")


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _require(recipe: Recipe, field: str, holds: bool, wanted: str) -> None:
    if not holds:
        raise UserError(f"{field} must be {wanted}, not {getattr(recipe, field)}")


def published() -> Recipe:
    """The published course run, setting by setting.

    Result: not yet measured on all 200 classes. The published run reports 57.55 % after 30 epochs (one run, unseeded
    split, fp32, 79 minutes of training on a Colab GPU); `results/` holds what was measured here.
    Command: `tinylab train published`.

    Source of every number: the published notebook (gokul-pv, EVA6 assignments, session 10). Where it is silent this
    recipe says what was taken: network weights start from PyTorch's own defaults, and the padding mirrors without
    repeating the edge (OpenCV's and torch's "reflect"), as albumentations did by default when the notebook was written.
    """
    return Recipe(
        name="published",
        epochs=30,
        batch_size=256,  # 301 steps for 77,000 images, the last one of 200 images
        max_learning_rate=0.02,
        warmup_share=1 / 3,
        anneal="linear",
        start_divisor=10.0,
        final_divisor=10.0,
        base_momentum=0.85,
        max_momentum=0.95,
        nesterov=True,
        weight_decay=1e-4,
        flip_probability=0.7,
        pad_to=70,
        hole_size=32,
        hole_probability=0.7,
        mean=(0.442, 0.442, 0.442),
        std=(0.278, 0.278, 0.278),
    )


def smoke() -> Recipe:
    """The published recipe shrunk so that the made-up sample data trains in a minute on a CPU.

    Result: 83.3 % on the sample data with seed 0 (10 classes, 420 / 180 images; CPU with bf16, two threads, torch 2.15;
    81.7 % on one thread): the sample data is made so that it ends between 60 % and 95 %. It proves the chain, no more.
    Command: `tinylab train smoke --data data/sample`.
    """
    return replace(
        published(),
        name="smoke",
        epochs=12,
        batch_size=16,  # 27 steps per epoch on 420 images
        width=16,  # 1/16 of the published network's arithmetic
    )


RECIPES = {"published": published, "smoke": smoke}
"""Every recipe by its name; each value is a function without arguments."""


def named(name: str) -> Recipe:
    """The recipe of that name. Raises `UserError`, listing the names there are."""
    if name not in RECIPES:
        raise UserError(f"unknown recipe '{name}'; there are: {', '.join(RECIPES)}")
    return RECIPES[name]()
