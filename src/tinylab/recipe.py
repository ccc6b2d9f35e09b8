"""What a run is: one frozen dataclass, a range beside each field.

A variant is `replace(published(), epochs=50)`; the command line overrides any field by its name.
Imports no torch, so that a bad recipe is refused before anything heavy is loaded.
"""

import math
import re
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Literal, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from tinylab.exceptions import UserError

SIZE = 64
"""Pixels per side of the data set's images."""

GFLOP_PER_IMAGE = 13.33
"""Arithmetic of one training image of 64 x 64 pixels, width 64: three times a forward pass, a
multiplication and an addition being two. (torch.utils.flop_counter has 13.32: no gradient goes to
the image itself.)"""

Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
Between = Annotated[float, Field(gt=0, lt=1)]
Pixels = Annotated[int, Field(ge=16, le=256, multiple_of=8)]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Every choice that changes the result of a run, apart from data, split and seed.

    Raises `UserError`, naming the field, when a value is impossible.
    """

    name: str
    """Name of the recipe; the run folder starts with it."""
    epochs: Annotated[int, Field(ge=1, le=100_000)]
    """Passes over the training images; the schedule is stretched to fit them."""
    batch_size: Annotated[int, Field(ge=1, le=1_000_000)]
    """Images per optimiser step, over all processes. The last, smaller batch of an epoch is kept
    unless `drop_last`."""
    max_learning_rate: Positive
    """Peak of the one-cycle schedule, per step of the mean cross-entropy."""
    warmup_share: Between
    """Share of all steps in which the learning rate rises (OneCycleLR's pct_start), inside (0, 1).
    """
    anneal: Literal["linear", "cos"]
    """Shape of rise and fall."""
    start_divisor: Positive
    """The first learning rate is max_learning_rate / start_divisor."""
    final_divisor: Positive
    """The last learning rate is the first one / final_divisor."""
    base_momentum: BelowOne
    """Momentum while the learning rate peaks."""
    max_momentum: BelowOne
    """Momentum at both ends of the cycle."""
    nesterov: bool
    """Nesterov's form of momentum."""
    weight_decay: Annotated[float, Field(ge=0)]
    """L2 pull, added to the gradient, on what SGD moves."""
    flip_probability: Share
    """Probability of a horizontal flip."""
    pad_to: Annotated[int, Field(ge=64, le=191)]
    """Pixels per side after reflect padding, before the random crop back to 64; 64: no crop."""
    hole_size: Annotated[int, Field(ge=0, le=64)]
    """Pixels per side of the one square hole, filled with `mean`; 0: no hole."""
    hole_probability: Share
    """Probability of the hole."""
    mean: tuple[Share, Share, Share]
    """Subtracted from red, green, blue, on the scale 0..1."""
    std: tuple[Positive, Positive, Positive]
    """Divides red, green, blue, on the scale 0..1."""
    width: Annotated[int, Field(ge=1, le=1024)] = 64
    """Channels of the first stage; the others have 2, 4 and 8 times as many. 64 is ResNet-18."""
    resolution: Pixels = 64
    """Pixels per side of what the network sees in training (at its end, with a `ramp`);
    augmentation comes before it, at the data set's 64. A multiple of 8, and at least 16: of 8 the
    last stage would leave a single value."""

    # From here on the defaults are what the course run did: it had none of this.
    split: Literal["merged", "official", "select"] = "merged"
    """Which images train and which test: `merged` pools training and validation images 70 : 30."""
    micro_batch: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    """Most images in one forward pass, in each process; none: the whole batch. The step stays the
    same but for batch norm, which sees the pieces: where memory is short, or where a CPU's cache is
    faster with less."""
    ramp: tuple[tuple[Pixels, Between], ...] = ()
    """(resolution, share of the epochs) of the phases before the last, which has `resolution` and
    the rest."""
    test_resolution: Pixels = 64
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
    crop_probability: Share = 0.0
    """Probability that an image gets a random resized crop in place of pad-and-crop."""
    crop_min_area: Annotated[float, Field(ge=0.01, le=1)] = 0.35
    """Smallest share of the image's area that such a crop keeps; the largest is all of it."""
    brightness: Share = 0.0
    """Factor on all values of an image, drawn from 1 - brightness to 1 + brightness; 0: none."""
    contrast: Share = 0.0
    """Factor on the distance of all values from the image's mean grey, drawn likewise; 0: none."""
    cutmix_probability: Share = 0.0
    """Probability that a batch is mixed by CutMix: a rectangle of each image comes from its
    neighbour in the batch."""
    mixup_probability: Share = 0.0
    """Probability that a batch is mixed by MixUp: each image is a weighted mean with its neighbour.
    """
    resizemix_probability: Share = 0.0
    """Probability that a batch is mixed by ResizeMix: the whole neighbour, shrunk, is pasted over
    each image."""
    cutmix_alpha: Annotated[float, Field(ge=1e-6, le=100)] = 1.0
    """CutMix keeps a share of the area drawn from Beta(alpha, alpha); 1: uniform."""
    mixup_alpha: Annotated[float, Field(ge=1e-6, le=100)] = 0.2
    """MixUp's weight is drawn from Beta(alpha, alpha); below 1: mostly near 0 or 1."""
    unmixed_share: BelowOne = 0.0
    """Last share of the epochs, in which nothing is mixed, so that the network ends on whole
    images."""
    label_smoothing: BelowOne = 0.0
    """Share of the target that is spread evenly over all classes, in training only."""
    optimizer: Literal["sgd", "muon"] = "sgd"
    """muon: convolution weights move by orthogonalised momentum, all other parameters by SGD."""
    muon_learning_rate: Positive = 0.02
    """Peak of the same schedule for the convolution weights, if `optimizer` is muon."""
    muon_weight_decay: Annotated[float, Field(ge=0, le=1000)] = 0.075
    """Each step multiplies the convolution weights by 1 - Muon's learning rate x this: decoupled,
    so that each of the two numbers acts by itself."""
    decay_1d: bool = True
    """Weight decay also on parameters with one dimension: batch-norm scales and shifts, biases."""
    ema_decay: Between | None = None
    """Share of the running average of the weights that each step keeps (less in its first steps, so
    that the first weights fade); the average is tested and saved. Inside (0, 1); none: no average.
    """
    ema_bn_batches: Annotated[int, Field(ge=1, le=100_000)] = 20
    """Training batches, without augmentation and of 500 images at most, that estimate the averaged
    network's batch-norm statistics."""
    initialisation: Literal["torch", "kaiming"] = "torch"
    """First convolution weights: PyTorch's default (uniform, by fan-in), or He's (normal, by
    fan-out)."""
    zero_init_residual: bool = False
    """The last batch-norm scale of each block starts at 0, so that each block starts as its
    shortcut."""
    bn_momentum: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Share of the newest batch in batch norm's running statistics."""

    def __post_init__(self) -> None:
        # ---- each field by itself ----
        try:
            schema().model_validate(vars(self))
        except ValidationError as error:
            first = error.errors()[0]
            _, _, wanted = first["msg"].partition("Input should be ")
            self._refuse(first["loc"][0], wanted or "of another length")

        # ---- rules between fields ----
        rules = [
            ("name", "up to 64 letters, digits, '.', '_', '-'", re.fullmatch(NAME, self.name)),
            ("base_momentum", "at most max_momentum", self.base_momentum <= self.max_momentum),
            ("nesterov", "false if base_momentum is 0", not self.nesterov or self.base_momentum),
            ("ramp", "of shares that leave some", sum(each for _, each in self.ramp) < 1 - 1e-9),
            (
                "cutmix_probability",
                "at most 1 together with mixup_probability and resizemix_probability",
                self.mixing_probability <= 1 + 1e-9,
            ),
        ]
        for needed, value, only in (
            ("augmentation", "batched", BATCHED_ONLY), ("optimizer", "muon", MUON_ONLY),
        ):  # fmt: skip
            unused = f"left alone unless {needed} is '{value}'"
            serves = getattr(self, needed) == value
            rules += [(x, unused, serves or getattr(self, x) == getattr(Recipe, x)) for x in only]
        for field, wanted, kept in rules:
            if not kept:
                self._refuse(field, wanted)

    def _refuse(self, field: str, wanted: str) -> None:
        raise UserError(f"{field} must be {wanted}, not {getattr(self, field)!r}")

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


NAME = r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}"
BATCHED_ONLY = (
    "alternating_flip", "crop_probability", "crop_min_area", "brightness", "contrast",
    "cutmix_probability", "mixup_probability", "resizemix_probability", "cutmix_alpha",
    "mixup_alpha", "unmixed_share",
)  # fmt: skip
MUON_ONLY = ("muon_learning_rate", "muon_weight_decay")
"""Fields that do nothing, and so are refused, unless `augmentation` is batched and `optimizer` is
muon."""


@cache
def schema() -> type[BaseModel]:
    """Return what checks the fields one by one: 30.0 and "30" are no epochs, NaN is no number."""
    hints = get_type_hints(Recipe, include_extras=True)
    strict = ConfigDict(strict=True, allow_inf_nan=False)
    return create_model("Fields", __config__=strict, **{name: (hints[name], ...) for name in hints})


def training_petaflop(recipe: Recipe, train_images: int, gflop: float | None = None) -> float:
    """PFLOP of a run's forward and backward passes; tests and the optimiser come on top.

    It goes by the area of the images and by the square of the width, and does not depend on the
    machine: what makes runs on different machines comparable. gflop: of an image of 64 x 64, if
    the network is another one.
    """
    areas = sum((recipe.resolution_at(epoch) / SIZE) ** 2 for epoch in range(1, recipe.epochs + 1))
    images = min(train_images, recipe.steps_per_epoch(train_images) * recipe.batch_size)
    gflop = gflop or GFLOP_PER_IMAGE * (recipe.width / 64) ** 2
    petaflop = areas * images * gflop / 1e6
    return float(f"{petaflop:.4g}")
