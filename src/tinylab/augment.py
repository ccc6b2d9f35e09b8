"""The recipe's augmentation, and the randomness it draws from.

Every draw is a function of (seed, stream, epoch, position), never of what was drawn before. A run that was stopped
therefore continues with the very same images, whatever the number of worker processes, and no generator state is saved.
"""

import functools
import os
import random
import warnings
from enum import IntEnum
from typing import TYPE_CHECKING

import numpy as np
import torch

from tinylab.recipe import Recipe

if TYPE_CHECKING:
    import albumentations


class Stream(IntEnum):
    """Uses of randomness that never share a generator."""

    ORDER = 0
    AUGMENT = 1


def generator(seed: int, stream: Stream, epoch: int, position: int = 0) -> np.random.Generator:
    """The random generator of one use: Philox keyed by its four numbers (0 <= seed < 2**63; the others < 2**28)."""
    return np.random.Generator(np.random.Philox(key=[seed, (stream << 56) | (epoch << 28) | position]))


def build_transform(recipe: Recipe) -> "albumentations.Compose":
    """The published augmentation on one uint8 (64, 64, 3) image: flip, reflect-pad, random crop, one hole of the mean.

    Normalisation is not part of it: it runs in batch on the device, for training and test images alike (`normalise`).
    Edit a copy of this function to try other transforms; call `augment` on each image so that draws stay reproducible.
    """
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # its import asks the network for newer versions otherwise
    import albumentations
    import cv2

    fill = tuple(round(255 * channel) for channel in recipe.mean)
    steps = [albumentations.HorizontalFlip(p=recipe.flip_probability)]
    if recipe.pad_to > recipe.resolution:
        reflect = cv2.BORDER_REFLECT_101
        steps.append(albumentations.PadIfNeeded(recipe.pad_to, recipe.pad_to, border_mode=reflect))
        steps.append(albumentations.RandomCrop(recipe.resolution, recipe.resolution))
    if recipe.hole_size > 0 and recipe.hole_probability > 0:
        size = (recipe.hole_size, recipe.hole_size)
        with warnings.catch_warnings():
            # Arguments it does not know are dropped with a warning, which silently trains something else.
            warnings.filterwarnings("error", message=".*not valid for transform.*")
            steps.append(
                albumentations.CoarseDropout(
                    num_holes_range=(1, 1),
                    hole_height_range=size,
                    hole_width_range=size,
                    fill=fill,
                    p=recipe.hole_probability,
                )
            )
    return albumentations.Compose(steps)


def augment(transform: "albumentations.Compose", image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """`transform` applied to one uint8 (64, 64, 3) image with draws from `rng` alone; returns the same shape and type.

    The state is set on the composed transform for every image because both of albumentations 2.0.8's own ways go
    wrong: unseeded, worker processes repeat each other; with `seed=`, the transforms of a composition draw alike.
    """
    transform.set_random_state(rng, random.Random(int(rng.integers(2**63))))
    return transform(image=image)["image"]


def normalise(images: torch.Tensor, recipe: Recipe) -> torch.Tensor:
    """uint8 (B, 64, 64, 3) on any device -> float32 (B, 3, 64, 64) in channels-last memory: (x / 255 - mean) / std.

    The images are stored channels-last, so the permutation moves no memory.
    """
    mean, scale = _mean_and_scale(recipe.mean, recipe.std, images.device)
    return ((images.float() - mean) * scale).permute(0, 3, 1, 2)


@functools.cache
def _mean_and_scale(mean: tuple, std: tuple, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Made once per device: copying numbers to a GPU waits for it."""
    return torch.tensor(mean, device=device) * 255, 1 / (torch.tensor(std, device=device) * 255)
