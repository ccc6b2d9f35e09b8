"""The recipe's augmentation, and the randomness it draws from.

Every draw is a function of (seed, stream, epoch, position), never of what was drawn before. A run
that was stopped therefore continues with the very same images, whatever the number of worker
processes, and no generator state is saved.

There are two ways: albumentations, image by image on the CPU (`build_transform`, `augment`), and
tensor operations, batch by batch on any device (`augment_batch`, `mix_batch`). Each of the latter
is a free function from uint8 images (B, H, W, 3) to a new tensor of the same shape and type; it
never writes to its arguments and never waits for a GPU.
"""

import functools
import math
import os
import random
import warnings
from collections.abc import Callable
from enum import IntEnum
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from tinylab.recipe import SIZE, Recipe

if TYPE_CHECKING:
    import albumentations


class Stream(IntEnum):
    """Uses of randomness that never share a generator. Numbers are never given to another use:
    results hang on them."""

    ORDER = 0
    AUGMENT = 1
    MIX = 2
    FLIP = 3
    STATISTICS = 4


def generator(seed: int, stream: Stream, epoch: int, position: int = 0) -> np.random.Generator:
    """The random generator of one use: Philox keyed by its four numbers (0 <= seed < 2**63; the
    others < 2**28)."""
    return np.random.Generator(
        np.random.Philox(key=[seed, (stream << 56) | (epoch << 28) | position])
    )


def build_transform(recipe: Recipe) -> "albumentations.Compose":
    """The published augmentation on one uint8 (64, 64, 3) image: flip, reflect-pad, random crop,
    one hole of the mean.

    Normalisation is not part of it: it runs in batch on the device, for training and test images
    alike (`normalise`). Edit a copy of this function to try other transforms; call `augment` on
    each image so that draws stay reproducible.
    """
    os.environ.setdefault(
        "NO_ALBUMENTATIONS_UPDATE", "1"
    )  # its import asks the network for newer versions otherwise
    import albumentations
    import cv2

    steps = []
    with warnings.catch_warnings():
        # Arguments it does not know are dropped with a warning, which silently trains something
        # else.
        warnings.filterwarnings("error", message=".*not valid for transform.*")
        steps.append(albumentations.HorizontalFlip(p=recipe.flip_probability))
        if recipe.pad_to > SIZE:
            reflect = cv2.BORDER_REFLECT_101
            steps.append(
                albumentations.PadIfNeeded(recipe.pad_to, recipe.pad_to, border_mode=reflect)
            )
            steps.append(albumentations.RandomCrop(SIZE, SIZE))
        if recipe.hole_size > 0 and recipe.hole_probability > 0:
            size = (recipe.hole_size, recipe.hole_size)
            steps.append(
                albumentations.CoarseDropout(
                    num_holes_range=(1, 1),
                    hole_height_range=size,
                    hole_width_range=size,
                    fill=_mean_colour(recipe),
                    p=recipe.hole_probability,
                )
            )
    return albumentations.Compose(steps)


def augment(
    transform: "albumentations.Compose", image: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """`transform` applied to one uint8 (64, 64, 3) image with draws from `rng` alone; returns the
    same shape and type.

    The state is set on the composed transform for every image because both of albumentations
    2.0.8's own ways go wrong: unseeded, worker processes repeat each other; with `seed=`, the
    transforms of a composition draw alike.
    """
    transform.set_random_state(rng, random.Random(int(rng.integers(2**63))))
    return transform(image=image)["image"]


class Draws:
    """Random numbers for the images at `positions` of one batch of `batch` images.

    Every call draws for the whole batch and keeps the numbers of `positions` (int64 (b,), default
    all; may repeat). So a process that holds a part of a batch sees the numbers that a process with
    all of it sees. The numbers stay on the host, in numpy: working out a few hundred corners there
    costs nothing, and a GPU gets the result by `send`.
    """

    def __init__(
        self,
        rng: np.random.Generator,
        batch: int,
        positions: np.ndarray | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self._rng, self._batch = rng, batch
        self._positions = np.arange(batch) if positions is None else positions
        self._device = torch.device(device)

    def __len__(self) -> int:
        return len(self._positions)

    def uniform(self, low: float = 0.0, high: float = 1.0) -> np.ndarray:
        """One number per image from [low, high): float64 (b,)."""
        return self._rng.uniform(low, high, self._batch)[self._positions]

    def integers(self, count: int) -> np.ndarray:
        """One whole number per image from 0 to count - 1: int64 (b,)."""
        return self._rng.integers(count, size=self._batch)[self._positions]

    def once(self, low: float = 0.0, high: float = 1.0) -> float:
        """One number from [low, high) for the whole batch."""
        return float(self._rng.uniform(low, high))

    def once_integers(self, count: int) -> int:
        """One whole number from 0 to count - 1 for the whole batch."""
        return int(self._rng.integers(count))

    def beta(self, alpha: float) -> float:
        """One number from Beta(alpha, alpha) for the whole batch, inside [0, 1]; as alpha nears 0
        it is 0 or 1."""
        return float(
            self._rng.beta(max(alpha, 1e-6), max(alpha, 1e-6))
        )  # far below that some versions return NaN

    def send(self, values: np.ndarray) -> torch.Tensor:
        """`values` on the device, without waiting for it."""
        tensor = torch.from_numpy(values)
        if self._device.type == "cuda":
            tensor = tensor.pin_memory()  # else the copy waits for the device
        return tensor.to(self._device, non_blocking=True)


def augment_batch(
    images: torch.Tensor,
    recipe: Recipe,
    draws: Draws,
    mirrored_first: torch.Tensor | None,
    epoch: int,
) -> torch.Tensor:
    """What the recipe does to each image by itself: crop (resized, or padded), flip, jitter, hole;
    (B, H, W, 3) uint8.

    `mirrored_first`: bool (B,) on the device, for alternating flips only; `epoch` counts from 1.
    What the recipe does not ask for draws nothing. Raises `ValueError` if `draws` are not for as
    many images.
    """
    if len(images) != len(draws):
        raise ValueError(f"{len(images)} images, but draws for {len(draws)}")
    resized = None
    if recipe.crop_probability > 0:
        resized = draws.uniform() < recipe.crop_probability
        images = _crop_and_resize(images, resized, recipe.crop_min_area, draws)
    shifts = mirror = None
    if recipe.pad_to > images.shape[1] and recipe.crop_probability < 1:
        shifts = _crop_shifts(images, recipe.pad_to, draws)
        if resized is not None:
            shifts[:, resized] = 0  # an image is cropped one way or the other
    if recipe.alternating_flip:
        mirror = _mirrored_in(mirrored_first, epoch)
    elif recipe.flip_probability > 0:
        mirror = draws.send(draws.uniform() < recipe.flip_probability)
    if shifts is not None:
        images = _shift_and_flip(images, draws.send(shifts), mirror, recipe.pad_to)
    elif mirror is not None:
        images = _flip(images, mirror)
    if recipe.brightness > 0 or recipe.contrast > 0:
        images = jitter(images, recipe.brightness, recipe.contrast, draws)
    if recipe.hole_size > 0 and recipe.hole_probability > 0:
        images = hole(
            images, recipe.hole_size, _mean_colour(recipe), recipe.hole_probability, draws
        )
    return images


def random_flip(images: torch.Tensor, probability: float, draws: Draws) -> torch.Tensor:
    """Each image (B, H, W, 3) uint8 mirrored left to right with that probability."""
    return _flip(images, draws.send(draws.uniform() < probability))


def alternating_flip(
    images: torch.Tensor, mirrored_first: torch.Tensor, epoch: int
) -> torch.Tensor:
    """Images (B, H, W, 3) uint8 mirrored where `mirrored_first` (bool (B,)) says so in odd epochs
    (the first is 1), and all the others in even ones: two epochs show both views of every image
    (Jordan, 94% on CIFAR-10 in 3.29 s, 2024).
    """
    return _flip(images, _mirrored_in(mirrored_first, epoch))


def _mirrored_in(mirrored_first: torch.Tensor, epoch: int) -> torch.Tensor:
    return mirrored_first if epoch % 2 else ~mirrored_first


def _flip(images: torch.Tensor, mirror: torch.Tensor) -> torch.Tensor:
    return torch.where(mirror[:, None, None, None], images.flip(2), images)


def pad_crop(images: torch.Tensor, pad_to: int, draws: Draws) -> torch.Tensor:
    """Each image (B, H, W, 3) uint8 reflected at its edges, not repeating them, to `pad_to` pixels
    per side, and a crop of the old size from a uniform place. If padding is odd, bottom and right
    get one more pixel, as albumentations' PadIfNeeded has it. Raises `ValueError` if `pad_to` is
    less than the images have.
    """
    return _shift_and_flip(images, draws.send(_crop_shifts(images, pad_to, draws)), None, pad_to)


def _crop_shifts(images: torch.Tensor, pad_to: int, draws: Draws) -> np.ndarray:
    """By how many pixels the crop is off the image, down and to the right: int64 (2, B)."""
    pads = [pad_to - size for size in images.shape[1:3]]
    if min(pads) < 0:
        raise ValueError(
            f"images of {images.shape[1]} x {images.shape[2]} pixels cannot be padded to {pad_to}"
        )
    return np.stack([draws.integers(pad + 1) - pad // 2 for pad in pads])


def _shift_and_flip(
    images: torch.Tensor, shifts: torch.Tensor, mirror: torch.Tensor | None, pad_to: int
) -> torch.Tensor:
    """Crops of images (B, H, W, 3) uint8 that reflect at their edges without end, `shifts` int64
    (2, B) pixels down and to the right; then mirrored left to right where `mirror` (bool (B,)) says
    so. All in one gather.

    A reflected row repeats every 2 W - 2 pixels and is its own mirror image. So a mirrored crop is
    just a crop from another column, and every crop is 3 W neighbouring bytes of each row of one
    extended copy: whole rows are copied, five times as fast as pixels are.
    """
    batch, height, width, _ = images.shape
    last, margin = width - 1, (pad_to - width + 1) // 2
    extended = _reflected_columns(images, -margin, last + margin + width)
    down, across = shifts
    if mirror is not None:
        across = torch.where(mirror, last - across, across)
    rows = _reflect(down[:, None] + torch.arange(height, device=images.device), height)
    rows = rows + torch.arange(0, batch * height, height, device=images.device)[:, None]
    first_pixels = rows * extended.shape[2] + (across + margin)[:, None]
    windows = extended.view(-1).unfold(0, 3 * width, 3)
    return windows.index_select(0, first_pixels.flatten()).view(images.shape)


def _reflect(index: torch.Tensor, size: int) -> torch.Tensor:
    """Where in 0..size - 1 an index lies after reflection at both ends: -1 -> 1, size -> size - 2,
    and so on."""
    index = index.remainder(max(2 * size - 2, 1))
    return torch.minimum(index, 2 * size - 2 - index)


def _reflected_columns(images: torch.Tensor, first: int, end: int) -> torch.Tensor:
    """Columns `first` to `end` - 1 of images that reflect at their edges without end: (B, H, end -
    first, 3)."""
    period = torch.cat([images, images[:, :, 1:-1].flip(2)], dim=2)
    parts = []
    while first < end:
        column = first % period.shape[2]
        parts.append(period[:, :, column : column + end - first])
        first += parts[-1].shape[2]
    return torch.cat(parts, dim=2)


def hole(
    images: torch.Tensor, size: int, fill: tuple[int, int, int], probability: float, draws: Draws
) -> torch.Tensor:
    """With that probability one square of `size` pixels per side of an image (B, H, W, 3) uint8
    takes the colour `fill` (0..255). It lies wholly inside; all places are equally likely, as in
    albumentations' CoarseDropout with one hole. (DeVries and Taylor 2017 let it stick out.)
    """
    _, height, width, _ = images.shape
    chosen = np.flatnonzero(draws.uniform() < probability)
    top, left = draws.integers(height - size + 1)[chosen], draws.integers(width - size + 1)[chosen]
    corners = draws.send((chosen * height + top) * width + left)
    side = torch.arange(size, device=images.device)
    inside = corners[:, None, None] + side[:, None] * width + side
    images = images.clone(memory_format=torch.contiguous_format)
    images.view(-1, 3)[inside] = _colour(fill, images.device)
    return images


def random_resized_crop(
    images: torch.Tensor, min_area: float, probability: float, draws: Draws
) -> torch.Tensor:
    """With that probability an image (B, H, W, 3) uint8 is replaced by a crop of it, enlarged to
    the old size (bilinear); the others stay as they are, bit by bit.

    The crop keeps a share of the area uniform in [min_area, 1], with an aspect ratio log-uniform in
    [3/4, 4/3], rounded to whole pixels, at a uniform place (Szegedy et al. 2015, torchvision's
    RandomResizedCrop). torchvision draws again, up to ten times, when a crop is wider or higher
    than the image; here the ratio is drawn from the part of its range that fits. For a given area
    both have the same ratios, but large areas, which torchvision often refuses, stay as likely as
    small ones.
    """
    return _crop_and_resize(images, draws.uniform() < probability, min_area, draws)


def _crop_and_resize(
    images: torch.Tensor, chosen: np.ndarray, min_area: float, draws: Draws
) -> torch.Tensor:
    """Random crops of the images where `chosen` (bool (B,)); draws for all of them."""
    boxes = _crop_boxes(images.shape[1], images.shape[2], min_area, draws)
    rows = np.flatnonzero(chosen)
    if not len(rows):
        return images
    index = draws.send(rows)
    crops = _resized_crops(images.index_select(0, index), draws.send(boxes[:, rows]))
    return images.index_copy(0, index, crops)


def _crop_boxes(height: int, width: int, min_area: float, draws: Draws) -> np.ndarray:
    """Top, left, height and width of a crop per image, whole numbers: float32 (4, B)."""
    share = draws.uniform(min_area, 1.0)
    narrowest = np.maximum(math.log(3 / 4), np.log(share * width / height))
    widest = np.minimum(math.log(4 / 3), np.log(width / height / share))
    ratio = np.exp(narrowest + draws.uniform() * (widest - narrowest))
    area = share * height * width
    high = np.clip(np.rint(np.sqrt(area / ratio)), 1, height)
    wide = np.clip(np.rint(np.sqrt(area * ratio)), 1, width)
    top = np.floor(draws.uniform() * (height - high + 1))
    left = np.floor(draws.uniform() * (width - wide + 1))
    return np.stack([top, left, high, wide]).astype(np.float32)


def _resized_crops(images: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """The boxes, float32 (4, B) of top, left, height and width, enlarged bilinearly to the images'
    own size.

    No pixel outside a box is looked at: sampling stops at the centres of the pixels along its
    edges.
    """
    top, left, high, wide = boxes
    rows = _sampling_places(top, high, images.shape[1])
    columns = _sampling_places(left, wide, images.shape[2])
    grid = torch.stack(torch.broadcast_tensors(columns[:, None, :], rows[:, :, None]), dim=3)
    crops = F.grid_sample(
        images.permute(0, 3, 1, 2).float(), grid, padding_mode="border", align_corners=False
    )
    return _to_bytes(crops).permute(0, 2, 3, 1)


def _sampling_places(first: torch.Tensor, length: torch.Tensor, size: int) -> torch.Tensor:
    """Where along one axis `length` pixels from `first` on are sampled to make `size`; -1 and 1 are
    the outer edges."""
    places = (torch.arange(size, device=first.device) + 0.5) * (length / size)[:, None] - 0.5
    places = first[:, None] + torch.minimum(places.clamp_(min=0), length[:, None] - 1)
    return (2 * places + 1) / size - 1


def jitter(images: torch.Tensor, brightness: float, contrast: float, draws: Draws) -> torch.Tensor:
    """Images (B, H, W, 3) uint8 times a factor per image, uniform in [1 - brightness, 1 +
    brightness]; then their distance from their mean grey times another, uniform in [1 - contrast, 1
    + contrast]; values stay within 0..255.

    As torchvision's adjust_brightness and adjust_contrast, but rounded once, at the end. 0 leaves
    out that step.
    """
    values = images.float()
    if brightness > 0:
        factor = draws.send(draws.uniform(1 - brightness, 1 + brightness).astype(np.float32))
        values = values.mul_(factor[:, None, None, None]).clamp_(0, 255)
    if contrast > 0:
        factor = draws.send(draws.uniform(1 - contrast, 1 + contrast).astype(np.float32))
        red, green, blue = values.mean(dim=(1, 2)).unbind(1)
        grey = 0.2989 * red + 0.587 * green + 0.114 * blue  # Rec. 601
        values = values.mul_(factor[:, None, None, None]).add_(
            ((1 - factor) * grey)[:, None, None, None]
        )
    return _to_bytes(values)


def resize(images: torch.Tensor, resolution: int) -> torch.Tensor:
    """Images (B, H, W, 3) uint8 -> (B, resolution, resolution, 3) uint8: bilinear, and shrinking
    averages over all pixels that a new one covers (antialiasing), so that it does not alias. Images
    of that size are returned themselves.
    """
    return (
        images
        if images.shape[1:3] == (resolution, resolution)
        else _resample(images, resolution, resolution)
    )


def _resample(images: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """`resize` to any height and width. In float32: CUDA has no such operation on bytes."""
    values = images.permute(0, 3, 1, 2).float()
    values = F.interpolate(
        values, (height, width), mode="bilinear", antialias=True, align_corners=False
    )
    return _to_bytes(values).permute(0, 2, 3, 1).contiguous()


def _to_bytes(values: torch.Tensor) -> torch.Tensor:
    """Rounded to uint8; overwrites its argument."""
    return values.round_().clamp_(0, 255).to(torch.uint8)


def mixing_of(recipe: Recipe, draws: Draws, epoch: int) -> str | None:
    """How a batch of epoch number `epoch` (from 1) is mixed: "cutmix", "mixup", "resizemix" or not
    at all.

    Asks no image, so that neighbours are fetched only when they are needed. Takes the first number
    of `draws`, or none if nothing can be mixed: `mix_batch` wants new draws from the same key.
    """
    if recipe.mixing_probability == 0 or epoch > round(recipe.epochs * (1 - recipe.unmixed_share)):
        return None
    rest = draws.once()
    for way in ("cutmix", "mixup", "resizemix"):
        rest -= getattr(recipe, f"{way}_probability")
        if rest < 0:
            return way
    return None


def mix_batch(
    images: torch.Tensor,
    partner_images: torch.Tensor,
    labels: torch.Tensor,
    partner_labels: torch.Tensor,
    recipe: Recipe,
    draws: Draws,
    epoch: int,
) -> tuple[torch.Tensor, torch.Tensor | None, float]:
    """Mixes images (B, H, W, 3) uint8 with their partners, the way that `mixing_of` draws for the
    whole batch.

    Returns the images, the labels that were mixed in (int64 (B,); None if none were), and the share
    of `labels`: the loss is share x loss(labels) + (1 - share) x loss(partner_labels).
    """
    way = mixing_of(recipe, draws, epoch)
    if way is None:
        return images, None, 1.0
    if way == "cutmix":
        mixed, share = cutmix(images, partner_images, recipe.cutmix_alpha, draws)
    elif way == "mixup":
        mixed, share = mixup(images, partner_images, recipe.mixup_alpha, draws)
    else:
        mixed, share = resizemix(images, partner_images, draws)
    return mixed, partner_labels, share


def cutmix(
    images: torch.Tensor, partner_images: torch.Tensor, alpha: float, draws: Draws
) -> tuple[torch.Tensor, float]:
    """One rectangle for the whole batch, filled from the partners; all uint8 (B, H, W, 3). Yun et
    al. 2019.

    It has the images' aspect ratio and 1 - Beta(alpha, alpha) of their area, its centre is uniform,
    and what sticks out is cut off (the box of torchvision's v2.CutMix). The returned share is that
    of the pixels that stayed.
    """
    _, height, width, _ = images.shape
    half = 0.5 * math.sqrt(1 - draws.beta(alpha))
    middle_x, middle_y = draws.once_integers(width), draws.once_integers(height)
    half_width, half_height = int(half * width), int(half * height)
    left, right = max(middle_x - half_width, 0), min(middle_x + half_width, width)
    top, bottom = max(middle_y - half_height, 0), min(middle_y + half_height, height)
    mixed = images.clone(memory_format=torch.contiguous_format)
    mixed[:, top:bottom, left:right] = partner_images[:, top:bottom, left:right]
    return mixed, 1 - (bottom - top) * (right - left) / (height * width)


def mixup(
    images: torch.Tensor, partner_images: torch.Tensor, alpha: float, draws: Draws
) -> tuple[torch.Tensor, float]:
    """share x images + (1 - share) x partners, rounded, with one share from Beta(alpha, alpha) for
    the whole batch; all uint8 (B, H, W, 3). Zhang et al. 2018.
    """
    share = draws.beta(alpha)
    return _to_bytes(torch.lerp(partner_images.float(), images.float(), share)), share


def resizemix(
    images: torch.Tensor, partner_images: torch.Tensor, draws: Draws
) -> tuple[torch.Tensor, float]:
    """The whole partner, shrunk to a part of each side that is uniform in [0.1, 0.8], pasted at a
    uniform place, both the same for the whole batch; all uint8 (B, H, W, 3). The returned share is
    that of the pixels that stayed. Qin et al. 2020: unlike CutMix, what is pasted always shows what
    its label says.
    """
    _, height, width, _ = images.shape
    scale = draws.once(0.1, 0.8)
    high, wide = max(int(height * scale), 1), max(int(width * scale), 1)
    top, left = draws.once_integers(height - high + 1), draws.once_integers(width - wide + 1)
    mixed = images.clone(memory_format=torch.contiguous_format)
    mixed[:, top : top + high, left : left + wide] = _resample(partner_images, high, wide)
    return mixed, 1 - high * wide / (height * width)


def normalise(images: torch.Tensor, recipe: Recipe) -> torch.Tensor:
    """uint8 (B, 64, 64, 3) on any device -> float32 (B, 3, 64, 64) in channels-last memory: (x /
    255 - mean) / std.

    The images are stored channels-last, so the permutation moves no memory.
    """
    mean, scale = _mean_and_scale(recipe.mean, recipe.std, images.device)
    return ((images.float() - mean) * scale).permute(0, 3, 1, 2)


def network_input(recipe: Recipe) -> Callable[[torch.Tensor], torch.Tensor]:
    """The function that makes of images uint8 (n, 64, 64, 3) what a network of `recipe` is tested
    on: float32 (n, 3, R, R), R being its test_resolution."""
    return lambda images: normalise(resize(images, recipe.test_resolution), recipe)


@functools.cache
def _mean_and_scale(
    mean: tuple, std: tuple, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Made once per device: copying numbers to a GPU waits for it."""
    return torch.tensor(mean, device=device) * 255, 1 / (torch.tensor(std, device=device) * 255)


@functools.cache
def _colour(fill: tuple[int, int, int], device: torch.device) -> torch.Tensor:
    """uint8 (3,), made once per device, for the same reason."""
    return torch.tensor(fill, dtype=torch.uint8, device=device)


def _mean_colour(recipe: Recipe) -> tuple[int, int, int]:
    """The recipe's mean on the scale 0..255: about zero to the network."""
    red, green, blue = (round(255 * channel) for channel in recipe.mean)
    return red, green, blue
