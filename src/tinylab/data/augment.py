"""The recipe's augmentation, and the randomness it draws from.

Every draw is a function of (seed, stream, epoch, position) alone: a stopped run continues with the
very same images, whatever the number of workers, and no generator state is saved.

There are two ways: albumentations, image by image on the CPU, and tensor operations, batch by batch
on any device. The latter take uint8 images (B, H, W, 3) and return new ones; they write to no
argument and never wait for a GPU.
"""

import functools
import math
import os
import random
import warnings
from collections.abc import Callable
from enum import IntEnum
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from tinylab.exceptions import UserError
from tinylab.files import printable
from tinylab.recipe import SIZE, Recipe


class Stream(IntEnum):
    """Uses of randomness that never share a generator. Results hang on their numbers."""

    ORDER = 0
    AUGMENT = 1
    MIX = 2
    FLIP = 3
    STATISTICS = 4
    NETWORK = 5  # draws of an own network or loss: dropout, say


def generator(seed: int, stream: Stream, epoch: int, position: int = 0) -> np.random.Generator:
    """Return the random generator of one use: Philox, keyed by its four numbers.

    0 <= seed < 2**63; epoch and position < 2**28.
    """
    key = [seed, (stream << 56) | (epoch << 28) | position]
    return np.random.Generator(np.random.Philox(key=key))


# --- Image by image -------------------------------------------------------------------------------


def build_transform(recipe: Recipe) -> Callable:
    """Return the course run's augmentation: flip, reflect-pad, random crop, one hole of the mean.

    It is an albumentations.Compose, called by `augment`. Raise `UserError` if albumentations cannot
    be imported.
    """
    # Else its import asks the network for newer versions.
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
    try:
        import albumentations
        from cv2 import BORDER_REFLECT_101
    except Exception as error:  # it is archived, and what it rests on moves on
        reason = f"albumentations cannot be imported ({printable(error, 100)})"
        without = "--augmentation batched does without"
        raise UserError(f"{reason}: pip install -r requirements.txt; {without}") from error

    with warnings.catch_warnings():
        # An argument it does not know is dropped with a warning, which trains something else.
        warnings.filterwarnings("error", message=".*not valid for transform.*")
        steps = [albumentations.HorizontalFlip(p=recipe.flip_probability)]
        if recipe.pad_to > SIZE:
            size = (recipe.pad_to, recipe.pad_to)
            steps.append(albumentations.PadIfNeeded(*size, border_mode=BORDER_REFLECT_101))
            steps.append(albumentations.RandomCrop(SIZE, SIZE))
        if recipe.hole_size > 0:
            sides = (recipe.hole_size, recipe.hole_size)
            hole = {"num_holes_range": (1, 1), "fill": mean_colour(recipe)}
            hole |= {"hole_height_range": sides, "hole_width_range": sides}
            steps.append(albumentations.CoarseDropout(**hole, p=recipe.hole_probability))
    return albumentations.Compose(steps)


def augment(transform: Callable, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Apply the transform to one uint8 (64, 64, 3) image, with draws from `rng` alone.

    The state is set for every image, as both of albumentations 2.0.8's own ways go wrong: unseeded,
    worker processes repeat each other; with `seed=`, the transforms of a composition draw alike.
    """
    transform.set_random_state(rng, random.Random(int(rng.integers(2**63))))
    return transform(image=image)["image"]


def mean_colour(recipe: Recipe) -> tuple[int, int, int]:
    """Return the recipe's mean on the scale 0..255: about zero to the network."""
    return tuple(round(255 * channel) for channel in recipe.mean)


# --- Batch by batch -------------------------------------------------------------------------------


class Draws(NamedTuple):
    """Random numbers for the images at `positions` (int64 (b,); default: all) of `batch` images.

    Every call draws for all: a process with a part of a batch sees the numbers of the whole one.
    """

    rng: np.random.Generator
    batch: int
    positions: np.ndarray | slice = slice(None)

    def uniform(self, low: float = 0.0, high: float = 1.0) -> np.ndarray:
        """Draw one number per image from [low, high): float64 (b,)."""
        return self.rng.uniform(low, high, self.batch)[self.positions]

    def integers(self, count: int) -> np.ndarray:
        """Draw one whole number per image from 0 to count - 1: int64 (b,)."""
        return self.rng.integers(count, size=self.batch)[self.positions]


def send(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """Return the values on the device, on CUDA without waiting for it."""
    tensor = torch.from_numpy(values)
    if device.type != "cuda":  # Apple GPUs would read memory that is free again (pytorch#139550)
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def augment_batch(
    images: torch.Tensor, recipe: Recipe, draws: Draws, mirrored: torch.Tensor | None, epoch: int
) -> torch.Tensor:
    """Augment each image by itself as the recipe says. What it does not ask for draws nothing.

    mirrored: bool (B,) on the device, who is mirrored in odd epochs by alternating flips, which
    show both views in two epochs (Jordan, 94% on CIFAR-10 in 3.29 s, 2024). epoch: from 1.
    """
    pad_to, resized, mirror = recipe.pad_to, np.zeros(len(images), bool), None
    if recipe.crop_probability > 0:
        resized = draws.uniform() < recipe.crop_probability
        images = random_resized_crop(images, resized, recipe.crop_min_area, draws)
        pad_to = SIZE if recipe.crop_probability == 1 else pad_to
    # If padding is odd, bottom and right get one pixel more, as in albumentations.
    pads = [pad_to - size for size in images.shape[1:3]]
    shifts = [draws.integers(pad + 1) - pad // 2 for pad in pads]
    if recipe.alternating_flip:
        mirror = mirrored if epoch % 2 else ~mirrored
    elif recipe.flip_probability > 0:
        mirror = send(draws.uniform() < recipe.flip_probability, images.device)
    # An image is cropped one way or the other.
    images = shift_and_flip(images, np.where(resized, 0, shifts), mirror)
    if recipe.brightness > 0 or recipe.contrast > 0:
        images = jitter(images, recipe, draws)
    if recipe.hole_size > 0 and recipe.hole_probability > 0:
        images = hole(images, recipe, draws)
    return images


def shift_and_flip(
    images: torch.Tensor, shifts: np.ndarray, mirror: torch.Tensor | None
) -> torch.Tensor:
    """Crop images that reflect at their edges without end, then mirror those of `mirror`.

    shifts: int64 (2, B), pixels down and to the right; mirror: bool (B,).
    A reflected row repeats every 2 W - 2 pixels and is its own mirror image. So a mirrored crop is
    just a crop from another column, and every crop is 3 W neighbouring bytes of each row of one
    extended copy: whole rows are copied, five times as fast as pixels are.
    """
    batch, height, width, _ = images.shape
    extended = torch.cat([images, images[:, :, 1:-1].flip(2), images], dim=2)
    down, across = send(shifts, images.device)
    if mirror is not None:
        across = torch.where(mirror, width - 1 - across, across)
    columns = across.remainder(max(2 * width - 2, 1))
    rows = down[:, None] + torch.arange(height, device=images.device)
    rows = rows.remainder(max(2 * height - 2, 1))
    rows = torch.minimum(rows, 2 * height - 2 - rows)  # height -> height - 2
    rows = rows + torch.arange(0, batch * height, height, device=images.device)[:, None]
    first_pixels = rows * extended.shape[2] + columns[:, None]
    windows = extended.view(-1).unfold(0, 3 * width, 3)
    return windows.index_select(0, first_pixels.flatten()).view(images.shape)


def random_resized_crop(
    images: torch.Tensor, chosen: np.ndarray, min_area: float, draws: Draws
) -> torch.Tensor:
    """Replace the square images of `chosen`, bool (B,), by crops enlarged bilinearly.

    A crop keeps a share of the area uniform in [min_area, 1], with an aspect ratio log-uniform in
    [3/4, 4/3], rounded to whole pixels, at a uniform place (Szegedy et al. 2015). torchvision draws
    again when a crop does not fit into the image; here the ratio is drawn from the part of its
    range that fits, so that large areas stay as likely as small ones.
    """
    # ---- boxes in whole pixels, drawn for all images ----
    size = images.shape[1]
    share = draws.uniform(min_area, 1.0)
    narrowest = np.maximum(math.log(3 / 4), np.log(share))
    widest = np.minimum(math.log(4 / 3), np.log(1 / share))
    ratio = np.exp(narrowest + draws.uniform() * (widest - narrowest))
    area = share * size**2
    length = np.clip(np.rint(np.sqrt([area / ratio, area * ratio])), 1, size)  # down, across
    first = np.floor(np.stack([draws.uniform(), draws.uniform()]) * (size - length + 1))

    # ---- pixels of the chosen ones, sampled between the centres of a box's outermost pixels ----
    rows = np.flatnonzero(chosen)
    index = send(rows, images.device)
    first, length = send(np.stack([first, length])[..., rows].astype(np.float32), images.device)
    places = (torch.arange(size, device=images.device) + 0.5) * (length / size)[..., None] - 0.5
    places = first[..., None] + torch.minimum(places.clamp_(min=0), length[..., None] - 1)
    y, x = (2 * places + 1) / size - 1  # -1 and 1 are the image's edges
    grid = torch.stack(torch.broadcast_tensors(x[:, None, :], y[:, :, None]), dim=3)
    pixels = images.index_select(0, index).permute(0, 3, 1, 2).float()
    crops = F.grid_sample(pixels, grid, align_corners=False)
    return images.index_copy(0, index, to_bytes(crops).permute(0, 2, 3, 1))


def jitter(images: torch.Tensor, recipe: Recipe, draws: Draws) -> torch.Tensor:
    """Multiply each image, and then its distance from its mean grey, by a factor of its own.

    The factors are uniform in [1 - strength, 1 + strength], of `brightness` and of `contrast`. As
    torchvision's adjust_brightness and adjust_contrast, rounded only once.
    """

    def factors(strength: float) -> torch.Tensor:
        drawn = draws.uniform(1 - strength, 1 + strength).astype(np.float32)
        return send(drawn, images.device)[:, None, None, None]

    values = images.float()
    if recipe.brightness > 0:
        values.mul_(factors(recipe.brightness)).clamp_(0, 255)
    if recipe.contrast > 0:
        factor = factors(recipe.contrast)
        red, green, blue = values.mean(dim=(1, 2), keepdim=True).split(1, dim=3)
        grey = 0.2989 * red + 0.587 * green + 0.114 * blue  # Rec. 601
        values.mul_(factor).add_((1 - factor) * grey)
    return to_bytes(values)


def hole(images: torch.Tensor, recipe: Recipe, draws: Draws) -> torch.Tensor:
    """Fill one square of some images with the mean colour.

    It lies wholly inside, all places equally likely, as in albumentations' CoarseDropout with one
    hole. (DeVries and Taylor 2017 let it stick out.)
    """
    size, (height, width) = recipe.hole_size, images.shape[1:3]
    chosen = np.flatnonzero(draws.uniform() < recipe.hole_probability)
    top, left = draws.integers(height - size + 1)[chosen], draws.integers(width - size + 1)[chosen]
    corners = send((chosen * height + top) * width + left, images.device)
    side = torch.arange(size, device=images.device)
    inside = corners[:, None, None] + side[:, None] * width + side
    images = images.clone(memory_format=torch.contiguous_format)
    images.view(-1, 3)[inside] = constant(mean_colour(recipe), torch.uint8, images.device)
    return images


def resize(images: torch.Tensor, height: int, width: int | None = None) -> torch.Tensor:
    """Resize to uint8 (B, height, width or height, 3): bilinear, antialiased where it shrinks."""
    size = (height, width or height)
    if images.shape[1:3] == size:
        return images
    values = images.permute(0, 3, 1, 2).float()  # CUDA has no such operation on bytes
    values = F.interpolate(values, size, mode="bilinear", antialias=True, align_corners=False)
    return to_bytes(values).permute(0, 2, 3, 1).contiguous()


def to_bytes(values: torch.Tensor) -> torch.Tensor:
    """Round to uint8; overwrites its argument."""
    return values.round_().clamp_(0, 255).to(torch.uint8)


# --- Mixing ---------------------------------------------------------------------------------------


def mixing_of(recipe: Recipe, rng: np.random.Generator, epoch: int) -> str | None:
    """Draw how a batch of an epoch (from 1) is mixed. If nothing can be mixed, nothing is drawn."""
    if recipe.mixing_probability == 0 or epoch > round(recipe.epochs * (1 - recipe.unmixed_share)):
        return None
    rest = rng.uniform()
    for way in ("cutmix", "mixup", "resizemix"):
        rest -= getattr(recipe, f"{way}_probability")
        if rest < 0:
            return way
    return None


def mix_batch(
    images: torch.Tensor, partners: torch.Tensor, way: str, recipe: Recipe, rng: np.random.Generator
) -> tuple[torch.Tensor, float]:
    """Mix images with their partners, with one draw for the whole batch.

    Return also the images' share of the pixels, and so of the loss: the rest is of the partners.
    """
    if way == "mixup":  # Zhang et al. 2018
        share = rng.beta(recipe.mixup_alpha, recipe.mixup_alpha)
        return to_bytes(torch.lerp(partners.float(), images.float(), share)), share

    height, width = images.shape[1:3]
    mixed = images.clone(memory_format=torch.contiguous_format)
    if way == "cutmix":
        # Yun et al. 2019: a rectangle from the partners, of the images' aspect ratio. Its centre is
        # uniform, and what sticks out is cut off, as in torchvision's v2.CutMix.
        half = 0.5 * math.sqrt(1 - rng.beta(recipe.cutmix_alpha, recipe.cutmix_alpha))
        x, y = int(rng.integers(width)), int(rng.integers(height))
        left, right = max(x - int(half * width), 0), min(x + int(half * width), width)
        top, bottom = max(y - int(half * height), 0), min(y + int(half * height), height)
        mixed[:, top:bottom, left:right] = partners[:, top:bottom, left:right]
    else:
        # Qin et al. 2020: the whole partner, shrunk, so that it always shows what its label says.
        scale = rng.uniform(0.1, 0.8)
        high, wide = max(int(height * scale), 1), max(int(width * scale), 1)
        top, left = int(rng.integers(height - high + 1)), int(rng.integers(width - wide + 1))
        bottom, right = top + high, left + wide
        mixed[:, top:bottom, left:right] = resize(partners, high, wide)
    return mixed, 1 - (bottom - top) * (right - left) / (height * width)


# --- What the network sees ------------------------------------------------------------------------


def normalise(images: torch.Tensor, recipe: Recipe) -> torch.Tensor:
    """Return float32 (B, 3, H, W) of uint8 (B, H, W, 3): (x / 255 - mean) / std.

    In channels-last memory, as the images are stored: the permutation moves nothing.
    """
    mean = constant(recipe.mean, torch.float32, images.device) * 255
    scale = 1 / (constant(recipe.std, torch.float32, images.device) * 255)
    return ((images.float() - mean) * scale).permute(0, 3, 1, 2)


def network_input(recipe: Recipe) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the function from uint8 images (B, 64, 64, 3) to what a network is tested on."""
    return lambda images: normalise(resize(images, recipe.test_resolution), recipe)


@functools.cache
def constant(values: tuple, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return the values on the device, made once: copying numbers to a GPU waits for it."""
    return torch.tensor(values, dtype=dtype, device=device)
