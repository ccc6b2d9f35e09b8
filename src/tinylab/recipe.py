"""What a run is: one frozen dataclass.

A variant is `replace(published(), epochs=50)`; the command line overrides any field by its name.
Imports no torch, so that the command line can refuse a bad recipe before anything heavy is loaded.
"""

import dataclasses
import math
import re
from dataclasses import dataclass
from typing import Literal

from tinylab.exceptions import UserError


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
    """Images per optimiser step, over all processes. The last, smaller batch of an epoch is kept
    unless `drop_last`."""
    max_learning_rate: float
    """Peak of the one-cycle schedule, per step of the mean cross-entropy."""
    warmup_share: float
    """Share of all steps in which the learning rate rises (OneCycleLR's pct_start), inside (0, 1).
    """
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
    """L2 pull, added to the gradient, on what SGD moves."""
    flip_probability: float
    """Probability of a horizontal flip."""
    pad_to: int
    """Pixels per side after reflect padding, before the random crop back to 64; 64: no crop."""
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
    """Pixels per side of what the network sees in training (at its end, with a `ramp`);
    augmentation comes before it, at the data set's 64. A multiple of 8, and at least 16: of 8 the
    last stage would leave a single value."""

    # From here on the defaults are what the published run did: it had none of this.
    micro_batch: int | None = None
    """Most images in one forward pass, in each process; none: the whole batch. The step stays the
    same but for batch norm, which sees the pieces: where memory is short, or where a CPU's cache is
    faster with less."""
    ramp: tuple[tuple[int, float], ...] = ()
    """(resolution, share of the epochs) of the phases before the last, which has `resolution` and
    the rest."""
    test_resolution: int = 64
    """Pixels per side of what the network sees when tested. A multiple of 8."""
    drop_last: bool = False
    """Leave out an epoch's last batch if it is smaller than the others, so that every step has one
    shape."""
    augmentation: Literal["albumentations", "batched"] = "albumentations"
    """Who augments: albumentations, image by image in worker processes, or tensor operations, batch
    by batch on the device. The fields from here to `unmixed_share` need the latter."""
    alternating_flip: bool = False
    """Each image is mirrored in every other epoch, in the first one by `flip_probability`; not
    drawn anew each time."""
    crop_probability: float = 0.0
    """Probability that an image gets a random resized crop in place of pad-and-crop."""
    crop_min_area: float = 0.35
    """Smallest share of the image's area that such a crop keeps; the largest is all of it."""
    brightness: float = 0.0
    """Factor on all values of an image, drawn from 1 - brightness to 1 + brightness; 0: none."""
    contrast: float = 0.0
    """Factor on the distance of all values from the image's mean grey, drawn likewise; 0: none."""
    cutmix_probability: float = 0.0
    """Probability that a batch is mixed by CutMix: a rectangle of each image comes from its
    neighbour in the batch."""
    mixup_probability: float = 0.0
    """Probability that a batch is mixed by MixUp: each image is a weighted mean with its neighbour.
    """
    resizemix_probability: float = 0.0
    """Probability that a batch is mixed by ResizeMix: the whole neighbour, shrunk, is pasted over
    each image."""
    cutmix_alpha: float = 1.0
    """CutMix keeps a share of the area drawn from Beta(alpha, alpha); 1: uniform."""
    mixup_alpha: float = 0.2
    """MixUp's weight is drawn from Beta(alpha, alpha); below 1: mostly near 0 or 1."""
    unmixed_share: float = 0.0
    """Last share of the epochs, in which nothing is mixed, so that the network ends on whole
    images."""
    label_smoothing: float = 0.0
    """Share of the target that is spread evenly over all classes, in training only."""
    optimizer: Literal["sgd", "muon"] = "sgd"
    """muon: convolution weights move by orthogonalised momentum, all other parameters by SGD."""
    muon_learning_rate: float = 0.02
    """Peak of the same schedule for the convolution weights, if `optimizer` is muon."""
    muon_weight_decay: float = 0.075
    """Each step multiplies the convolution weights by 1 - Muon's learning rate x this: decoupled,
    so that each of the two numbers acts by itself."""
    decay_1d: bool = True
    """Weight decay also on parameters with one dimension: batch-norm scales and shifts, biases."""
    ema_decay: float | None = None
    """Share of the running average of the weights that each step keeps (less in its first steps, so
    that the first weights fade); the average is tested and saved. Inside (0, 1); none: no average.
    """
    ema_bn_batches: int = 20
    """Training batches, without augmentation and of 500 images at most, that estimate the averaged
    network's batch-norm statistics."""
    initialisation: Literal["torch", "kaiming"] = "torch"
    """First convolution weights: PyTorch's default (uniform, by fan-in), or He's (normal, by
    fan-out)."""
    zero_init_residual: bool = False
    """The last batch-norm scale of each block starts at 0, so that each block starts as its
    shortcut."""
    bn_momentum: float = 0.1
    """Share of the newest batch in batch norm's running statistics."""

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
            self,
            "name",
            bool(re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}", self.name)),
            "up to 64 letters, digits, '.', '_' or '-', no '.' or '-' at its beginning",
        )
        _require(self, "max_momentum", 0 <= self.max_momentum < 1, "at least 0 and below 1")
        _require(
            self,
            "base_momentum",
            0 <= self.base_momentum <= self.max_momentum,
            "between 0 and max_momentum",
        )
        _require(
            self,
            "nesterov",
            not self.nesterov or self.base_momentum > 0,
            "false where momentum can be 0",
        )
        _require(self, "weight_decay", self.weight_decay >= 0, "0 or more")
        for field in ("flip_probability", "hole_probability"):
            _require(self, field, 0 <= getattr(self, field) <= 1, "between 0 and 1")
        for field in ("resolution", "test_resolution"):
            _require(
                self, field, _is_resolution(getattr(self, field)), "a multiple of 8 from 16 to 256"
            )
        _require(self, "pad_to", SIZE <= self.pad_to < 3 * SIZE, "from 64 to 191")
        _require(self, "hole_size", 0 <= self.hole_size <= SIZE, "from 0 to 64")
        _require(self, "mean", all(0 <= m <= 1 for m in self.mean), "three numbers between 0 and 1")
        _require(self, "std", all(s > 0 for s in self.std), "three numbers above 0")
        _check_augmentation(self)
        _check_ramp(self)
        _check_optimisation(self)

    def steps_per_epoch(self, images: int) -> int:
        """Optimiser steps in one pass over `images` training images."""
        return images // self.batch_size if self.drop_last else math.ceil(images / self.batch_size)

    def resolution_at(self, epoch: int) -> int:
        """Pixels per side that the network is trained at in epoch number `epoch` (from 1); in the
        last one always `resolution`."""
        end = 0.0
        for resolution, share in self.ramp:
            end += share
            if epoch <= min(round(end * self.epochs), self.epochs - 1):
                return resolution
        return self.resolution

    @property
    def mixing_probability(self) -> float:
        """Probability that a batch is mixed in one of the three ways."""
        return self.cutmix_probability + self.mixup_probability + self.resizemix_probability


SIZE = 64
"""Pixels per side of the data set's images."""

GFLOP_PER_IMAGE = 13.33
"""Arithmetic of one training image of 64 x 64 pixels, width 64: three times a forward pass, a
multiplication and an addition being two. (torch.utils.flop_counter has 13.32: no gradient goes to
the image itself.)"""


def training_petaflop(recipe: Recipe, train_images: int) -> float:
    """PFLOP of a run's forward and backward passes; tests and the optimiser come on top.

    It goes by the area of the images and by the square of the width, and does not depend on the
    machine: what makes runs on different machines comparable.
    """
    areas = sum((recipe.resolution_at(epoch) / SIZE) ** 2 for epoch in range(1, recipe.epochs + 1))
    images = min(train_images, recipe.steps_per_epoch(train_images) * recipe.batch_size)
    petaflop = areas * images * GFLOP_PER_IMAGE * (recipe.width / 64) ** 2 / 1e6
    return float(f"{petaflop:.4g}")


BATCHED_ONLY = (
    "alternating_flip",
    "crop_probability",
    "brightness",
    "contrast",
    "cutmix_probability",
    "mixup_probability",
    "resizemix_probability",
    "crop_min_area",
    "cutmix_alpha",
    "mixup_alpha",
    "unmixed_share",
)
"""Fields that do nothing unless `augmentation` is batched, and so are refused with albumentations.
"""


def _check_augmentation(recipe: Recipe) -> None:
    _require(
        recipe,
        "augmentation",
        recipe.augmentation in ("albumentations", "batched"),
        "'albumentations' or 'batched'",
    )
    defaults = {field.name: field.default for field in dataclasses.fields(Recipe)}
    for field in BATCHED_ONLY:
        harmless = recipe.augmentation == "batched" or getattr(recipe, field) == defaults[field]
        _require(recipe, field, harmless, "left alone unless augmentation is 'batched'")
    for field in (
        "crop_probability",
        "cutmix_probability",
        "mixup_probability",
        "resizemix_probability",
    ):
        _require(recipe, field, 0 <= getattr(recipe, field) <= 1, "between 0 and 1")
    if recipe.mixing_probability > 1 + 1e-9:
        raise UserError(
            "cutmix_probability, mixup_probability and resizemix_probability must add up to 1 or less"
        )
    _require(recipe, "crop_min_area", 0.01 <= recipe.crop_min_area <= 1, "between 0.01 and 1")
    for field in ("brightness", "contrast"):
        _require(recipe, field, 0 <= getattr(recipe, field) <= 1, "between 0 and 1")
    for field in ("cutmix_alpha", "mixup_alpha"):
        _require(recipe, field, 0 < getattr(recipe, field) <= 100, "above 0 and at most 100")
    _require(recipe, "unmixed_share", 0 <= recipe.unmixed_share < 1, "at least 0 and below 1")


def _check_ramp(recipe: Recipe) -> None:
    for resolution, share in recipe.ramp:
        _require(
            recipe,
            "ramp",
            _is_resolution(resolution),
            "of resolutions that are multiples of 8 from 16 to 256",
        )
        _require(recipe, "ramp", 0 < share < 1, "of shares between 0 and 1")
    left = 1 - sum(share for _, share in recipe.ramp)
    _require(recipe, "ramp", left > 1e-9, "of shares that leave some for the last")


def _check_optimisation(recipe: Recipe) -> None:
    _require(recipe, "label_smoothing", 0 <= recipe.label_smoothing < 1, "at least 0 and below 1")
    _require(recipe, "optimizer", recipe.optimizer in ("sgd", "muon"), "'sgd' or 'muon'")
    _require(recipe, "muon_learning_rate", recipe.muon_learning_rate > 0, "above 0")
    _require(
        recipe, "muon_weight_decay", 0 <= recipe.muon_weight_decay <= 1000, "between 0 and 1,000"
    )
    for field, default in (("muon_learning_rate", 0.02), ("muon_weight_decay", 0.075)):
        used = recipe.optimizer == "muon" or getattr(recipe, field) == default
        _require(recipe, field, used, "left alone unless optimizer is 'muon'")
    pieces = recipe.micro_batch is None or 1 <= recipe.micro_batch <= 1_000_000
    _require(recipe, "micro_batch", pieces, "at least 1, or none")
    in_range = recipe.ema_decay is None or 0 < recipe.ema_decay < 1
    _require(recipe, "ema_decay", in_range, "between 0 and 1, both excluded, or none")
    _require(recipe, "ema_bn_batches", 1 <= recipe.ema_bn_batches <= 100_000, "from 1 to 100,000")
    _require(
        recipe,
        "initialisation",
        recipe.initialisation in ("torch", "kaiming"),
        "'torch' or 'kaiming'",
    )
    _require(recipe, "bn_momentum", 0 < recipe.bn_momentum <= 1, "above 0 and at most 1")


def _is_resolution(value: object) -> bool:
    return type(value) is int and 16 <= value <= 256 and value % 8 == 0


def _require_type(recipe: Recipe, field: dataclasses.Field) -> None:
    """Refuses what a notebook's parameter cell may hold by mistake: 30.0 or "30" epochs, two means,
    a NaN."""
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
    elif field.name == "micro_batch":
        _require(recipe, field.name, value is None or type(value) is int, "a whole number or none")
    elif field.name == "ema_decay":
        _require(recipe, field.name, value is None or _is_finite(value), "a finite number or none")
    elif field.name == "ramp":
        pairs = isinstance(value, tuple) and all(
            isinstance(pair, tuple) and len(pair) == 2 for pair in value
        )
        _require(
            recipe,
            field.name,
            pairs and all(map(_is_finite, sum(value, ()))),
            "pairs of resolution and share",
        )


def _is_finite(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number that no float can hold
        return False


def _require(recipe: Recipe, field: str, holds: bool, wanted: str) -> None:
    if not holds:
        raise UserError(f"{field} must be {wanted}, not {getattr(recipe, field)}")
