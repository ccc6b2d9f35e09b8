"""Augmentation: recognised in its own output, against plain loops, and the randomness behind it."""

import itertools
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import NamedTuple

import albumentations
import cv2
import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as tv
from torchvision.transforms import v2

from tinylab.data.augment import (
    Draws,
    Stream,
    augment,
    augment_batch,
    build_transform,
    generator,
    mix_batch,
    mixing_of,
    normalise,
    resize,
)
from tinylab.recipe import Recipe
from tinylab.recipes import published

DRAWS = 3000
FILL = 113  # round(0.442 * 255)
MIRRORED_FIRST = torch.tensor([True, False, False, True, True, False, True, False])
BATCH = len(MIRRORED_FIRST)
MIXED = {"cutmix_probability": 0.35, "mixup_probability": 0.2, "resizemix_probability": 0.25}


def batched(**changes) -> Recipe:
    """The published recipe, augmented in batches."""
    return replace(published(), **{"augmentation": "batched", "epochs": 10, **changes})


def only(**changes) -> Recipe:
    """A recipe that does nothing but what is named."""
    return batched(**{"flip_probability": 0.0, "pad_to": 64, "hole_size": 0, **changes})


OPERATIONS = {
    "flip": only(flip_probability=0.5),
    "pad and crop": only(pad_to=80),
    "hole": only(hole_size=16, hole_probability=0.5),
    "resized crop": only(crop_probability=0.5),
    "jitter": only(brightness=0.3, contrast=0.3),
    "everything": batched(crop_probability=0.5, brightness=0.3, contrast=0.3),
    "cutmix": only(cutmix_probability=1.0),
    "mixup": only(mixup_probability=1.0, mixup_alpha=1.0),
    "resizemix": only(resizemix_probability=1.0),
}
"""A recipe for every operation that draws; each does something to most images."""


def operate(name: str, images: torch.Tensor, draws: Draws) -> torch.Tensor:
    recipe = OPERATIONS[name]
    if recipe.mixing_probability:
        return mix_batch(images, 255 - images, name, recipe, draws.rng)[0]
    return augment_batch(images, recipe, draws, None, 1)


def new_draws(count: int = BATCH, key: int = 0, **options) -> Draws:
    """Draws that are the same for the same key."""
    return Draws(generator(5, Stream.AUGMENT, 1, key), count, **options)


def noise(count: int = BATCH, height: int = 64, width: int = 64) -> torch.Tensor:
    """Random pixels, uint8 (count, height, width, 3)."""
    rng = np.random.default_rng(0)
    return torch.from_numpy(rng.integers(0, 256, (count, height, width, 3), dtype=np.uint8))


def smooth(count: int = BATCH) -> torch.Tensor:
    """Noise blown up from 8 to 64 pixels per side: neighbours are alike, as in photographs."""
    return resize(noise(count, 8, 8), 64)


def chart() -> np.ndarray:
    """An image whose pixels say where they came from: column, row, and that it is no hole."""
    rows, columns = np.mgrid[:64, :64]
    return np.stack([columns, rows, np.full((64, 64), 255)], axis=2).astype(np.uint8)


def charts(count: int) -> torch.Tensor:
    return torch.from_numpy(chart()).expand(count, -1, -1, -1).contiguous()


def pictures(images: torch.Tensor) -> list[torch.Tensor]:
    """The images one by one, as torchvision has them: (3, H, W)."""
    return list(images.permute(0, 3, 1, 2))


def largest_difference(images: torch.Tensor, expected: list[torch.Tensor]) -> float:
    """In grey levels, over all pixels; `expected` are (3, H, W) on the scale 0..255."""
    return float((images.double() - torch.stack(expected).permute(0, 2, 3, 1).double()).abs().max())


def assert_share(hits: int, count: int, probability: float) -> None:
    """`hits` of `count` are as many as probable, within four and a half standard deviations."""
    spread = (probability * (1 - probability) / count) ** 0.5
    assert abs(hits / count - probability) < 4.5 * spread, f"{hits} of {count}, not {probability}"


def assert_unrelated(first: list, second: list) -> None:
    """No correlation beyond chance."""
    assert abs(np.corrcoef(first, second)[0, 1]) < 4.5 / len(first) ** 0.5


# --- The published augmentation, both ways --------------------------------------------------------


class Draw(NamedTuple):
    """What was done to one image."""

    flip: bool
    down: int
    across: int
    hole: tuple[int, int] | None


def recognise(image: np.ndarray) -> Draw:
    """Which flip, crop offset and hole lead from the chart to `image`. Fails if none does."""
    hole = image[..., 2] != 255
    rows, columns = np.flatnonzero(hole.any(axis=1)), np.flatnonzero(hole.any(axis=0))
    corner = None
    if len(rows):
        corner = (int(rows[0]), int(columns[0]))
        assert (len(rows), len(columns), hole.sum()) == (32, 32, 32 * 32)
        assert (image[hole] == FILL).all(), "the hole is not filled with the mean"
    # Reflection that does not repeat the edge: -1 -> 1, 64 -> 62.
    sources = [np.pad(np.arange(64), 3, mode="reflect")[i : i + 64] for i in range(7)]
    for flip, down, across in itertools.product((False, True), range(7), range(7)):
        columns = 63 - sources[across] if flip else sources[across]
        same = (image[..., 1] == sources[down][:, None]) & (image[..., 0] == columns)
        if same[~hole].all():
            return Draw(flip, down, across, corner)
    raise AssertionError("no flip, crop and hole of the published recipe make this image")


def one_by_one(epoch: int, count: int) -> list[Draw]:
    transform, image = build_transform(published()), chart()
    keys = [(7, Stream.AUGMENT, epoch, i) for i in range(count)]
    return [recognise(augment(transform, image, generator(*key))) for key in keys]


def in_batches(epoch: int, count: int) -> list[Draw]:
    keys = [(7, Stream.AUGMENT, epoch, i) for i in range(count // 500)]
    draws = [Draws(generator(*key), 500) for key in keys]
    batches = [augment_batch(charts(500), batched(), each, None, epoch) for each in draws]
    return [recognise(image) for batch in batches for image in batch.numpy()]


@pytest.fixture(scope="module", params=[one_by_one, in_batches])
def augmented(request: pytest.FixtureRequest) -> Callable[[int, int], list[Draw]]:
    return request.param


@pytest.fixture(scope="module")
def draws(augmented: Callable) -> list[Draw]:
    return augmented(1, DRAWS)


def test_the_published_augmentation_has_the_published_rates(draws: list[Draw]) -> None:
    holes = [draw.hole for draw in draws if draw.hole]
    assert_share(sum(draw.flip for draw in draws), DRAWS, 0.7)
    assert_share(len(holes), DRAWS, 0.7)
    for offset, axis in itertools.product(range(7), ("down", "across")):
        assert_share(sum(getattr(draw, axis) == offset for draw in draws), DRAWS, 1 / 7)
    for corner, axis in itertools.product(range(33), (0, 1)):
        assert_share(sum(hole[axis] == corner for hole in holes), len(holes), 1 / 33)


def test_draws_are_independent(draws: list[Draw], augmented: Callable) -> None:
    """With albumentations' own seeding the flip and the hole always come together."""

    def columns(some: list[Draw]) -> list[list]:
        return [[float(getattr(draw, part)) for draw in some] for part in Draw._fields[:3]]

    parts = [*columns(draws), [draw.hole is not None for draw in draws]]
    with_hole = [draw for draw in draws if draw.hole]
    corners = [*zip(*(draw.hole for draw in with_hole), strict=True)]
    for first, second in itertools.combinations(parts, 2):
        assert_unrelated(first, second)
    for first, second in itertools.combinations([*columns(with_hole), *corners], 2):
        assert_unrelated(first, second)
    for now, later in zip(columns(draws[:500]), columns(augmented(2, 500)), strict=True):
        assert_unrelated(now, later)
        assert_unrelated(now[:-1], now[1:])


# --- Image by image -------------------------------------------------------------------------------


def test_equal_keys_draw_equal_images_whatever_came_before() -> None:
    image, key = noise(1)[0].numpy(), (3, Stream.AUGMENT, 5, 17)
    before, used = image.copy(), build_transform(published())
    image.flags.writeable = False
    first = augment(build_transform(published()), image, generator(*key))
    for i in range(10):
        augment(used, image, generator(1, Stream.AUGMENT, 1, i))
    np.random.seed(0)
    assert np.array_equal(augment(used, image, generator(*key)), first)
    # What the network sees comes after augmentation.
    small = build_transform(replace(published(), resolution=32))
    assert np.array_equal(augment(small, image, generator(*key)), first)
    assert np.array_equal(image, before)


def test_every_part_of_the_key_leads_to_another_stream() -> None:
    last = 2**28 - 1
    keys = [(0, Stream.ORDER, 1, 0), (0, Stream.AUGMENT, 1, 0), (1, Stream.AUGMENT, 1, 0)]
    keys += [(0, Stream.AUGMENT, *rest) for rest in ((2, 0), (1, 1), (0, 1), (1, last))]
    keys += [(2**63 - 1, Stream.AUGMENT, last, last)]
    numbers = [generator(*key).uniform(size=2000) for key in keys]
    for first, second in itertools.combinations(numbers, 2):
        assert_unrelated(first, second)


def test_streams_keep_their_numbers() -> None:
    """Another number would change every result of a seed."""
    names = ("ORDER", "AUGMENT", "MIX", "FLIP", "STATISTICS", "NETWORK")
    assert dict(Stream.__members__) == {name: number for number, name in enumerate(names)}


def test_switched_off_parts_do_nothing() -> None:
    transform = build_transform(replace(published(), flip_probability=0, pad_to=64, hole_size=0))
    for i in range(20):
        rng = generator(0, Stream.AUGMENT, 1, i)
        assert np.array_equal(augment(transform, chart(), rng), chart())


@pytest.mark.parametrize("name", ["HorizontalFlip", "PadIfNeeded", "RandomCrop", "CoarseDropout"])
def test_an_argument_the_library_does_not_know_is_an_error(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library itself only warns, and goes on without it."""
    real = getattr(albumentations, name)
    monkeypatch.setattr(albumentations, name, lambda *a, **options: real(*a, **options, renamed=1))
    problem = pytest.raises(UserWarning, match="'renamed' are not valid for transform")
    with warnings.catch_warnings(action="ignore"), problem:
        build_transform(published())


def test_building_the_transform_asks_no_network(subprocess_environment: dict[str, str]) -> None:
    code = """
import socket, sys
asked = []
def ask(*where, **_):
    asked.append(where)
    sys.exit("network")
socket.getaddrinfo = socket.create_connection = ask
from tinylab.data.augment import build_transform
from tinylab.recipes import published
build_transform(published())
sys.exit(str(asked) if asked else 0)
"""
    environment = subprocess_environment | {"NO_ALBUMENTATIONS_UPDATE": ""}
    del environment["NO_ALBUMENTATIONS_UPDATE"]
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


# --- Every operation on batches -------------------------------------------------------------------


@pytest.mark.parametrize("name", OPERATIONS)
def test_equal_keys_make_equal_images_and_touch_nothing(name: str) -> None:
    images = noise(9)[1:]
    before, state = images.clone(), torch.get_rng_state().tolist()
    first = operate(name, images, new_draws())
    assert torch.equal(operate(name, images, new_draws()), first)
    assert not torch.equal(operate(name, images, new_draws(key=1)), first)
    assert torch.equal(images, before)
    assert torch.get_rng_state().tolist() == state
    assert (first.shape, first.dtype, first.is_contiguous()) == (images.shape, torch.uint8, True)
    alone = [operate(name, noise(1), new_draws(1, key)) for key in range(20)]
    assert any(not torch.equal(each, noise(1)) for each in alone)


@pytest.mark.numerical
@pytest.mark.parametrize("name", OPERATIONS)
def test_a_part_of_a_batch_is_augmented_like_the_whole(name: str) -> None:
    """Wherever it begins and even if it wraps around, as the neighbours of the first image do."""
    images = noise()
    whole = operate(name, images, new_draws())
    for positions in ([0, 1, 2], [3, 4, 5, 6, 7], [7, 0, 1], [2, 2], [5]):
        part = operate(name, images[positions], new_draws(positions=np.array(positions)))
        assert torch.equal(part, whole[positions])


# --- Against plain loops --------------------------------------------------------------------------


@pytest.mark.parametrize("pad_to", [64, 70])
def test_flips_against_a_plain_loop(pad_to: int) -> None:
    images, draws = noise(), new_draws()
    padded = augment_batch(images, only(pad_to=pad_to), draws, None, 1)
    flipped = draws.uniform() < 0.5
    mirrors = {True: padded.flip(2), False: padded}

    def loop(chosen: list) -> torch.Tensor:
        return torch.stack([mirrors[bool(flip)][i] for i, flip in enumerate(chosen)])

    random = only(pad_to=pad_to, flip_probability=0.5)
    assert torch.equal(augment_batch(images, random, new_draws(), None, 1), loop(flipped))
    alternating = only(pad_to=pad_to, flip_probability=0.5, alternating_flip=True)
    for epoch, chosen in ((1, MIRRORED_FIRST), (2, ~MIRRORED_FIRST), (3, MIRRORED_FIRST)):
        result = augment_batch(images, alternating, new_draws(), MIRRORED_FIRST, epoch)
        assert torch.equal(result, loop(chosen))


@pytest.mark.parametrize("pad_to", [65, 70, 71, 80, 127, 128, 190, 191])
def test_crops_are_cut_from_what_albumentations_pads(pad_to: int) -> None:
    images, draws = noise(32), new_draws(32)
    down, across = draws.integers(pad_to - 63), draws.integers(pad_to - 63)
    pad = albumentations.PadIfNeeded(pad_to, pad_to, border_mode=cv2.BORDER_REFLECT_101)
    result = augment_batch(images, only(pad_to=pad_to), new_draws(32), None, 1).numpy()
    for image, crop, y, x in zip(images.numpy(), result, down, across, strict=True):
        assert np.array_equal(crop, pad(image=image)["image"][y : y + 64, x : x + 64])


@pytest.mark.parametrize(("height", "width"), [(24, 40), (40, 24), (7, 1), (1, 7), (2, 2)])
def test_crops_of_other_shapes_reflect_as_numpy_does(height: int, width: int) -> None:
    """However often: numpy's "reflect" goes on and on, too."""
    images, draws = noise(BATCH, height, width), new_draws()
    down, across = draws.integers(71 - height), draws.integers(71 - width)
    result = augment_batch(images, only(pad_to=70), new_draws(), None, 1).numpy()
    above, before = (70 - height) // 2, (70 - width) // 2
    widths = ((above, 70 - height - above), (before, 70 - width - before), (0, 0))
    for image, crop, y, x in zip(images.numpy(), result, down, across, strict=True):
        padded = np.pad(image, widths, mode="reflect")
        assert np.array_equal(crop, padded[y : y + height, x : x + width])


@pytest.mark.parametrize("size", [1, 16, 64])
def test_holes_against_a_plain_loop(size: int) -> None:
    recipe = only(hole_size=size, hole_probability=0.5, mean=(0.4, 0.08, 0.98))
    images, draws = noise(), new_draws()
    chosen, top, left = draws.uniform() < 0.5, draws.integers(65 - size), draws.integers(65 - size)
    expected = images.clone()
    for image, holed, y, x in zip(expected, chosen, top, left, strict=True):
        if holed:
            image[y : y + size, x : x + size] = torch.tensor((102, 20, 250), dtype=torch.uint8)
    assert 0 < chosen.sum() < BATCH
    assert torch.equal(augment_batch(images, recipe, new_draws(), None, 1), expected)


def crops_of(images: torch.Tensor, min_area: float, probability: float = 1.0) -> torch.Tensor:
    recipe = only(crop_probability=probability, crop_min_area=min_area)
    return augment_batch(images, recipe, new_draws(len(images)), None, 1)


def box_of(crop: torch.Tensor) -> tuple[int, int, int, int]:
    """Top, left, height, width of a chart's crop: its corners show the box's corner pixels."""
    (left, top), (right, bottom) = crop[0, 0, :2].tolist(), crop[-1, -1, :2].tolist()
    return top, left, bottom - top + 1, right - left + 1


@pytest.mark.numerical
def test_resized_crops_against_torchvision() -> None:
    boxes = [box_of(crop) for crop in crops_of(charts(64), 0.1)]
    for images, floating, limit in ((smooth(64), False, 1), (noise(64), True, 0.51)):
        sources = [each.float() if floating else each for each in pictures(images)]
        pairs = zip(sources, boxes, strict=True)
        expected = [tv.resized_crop(each, *box, [64, 64], antialias=True) for each, box in pairs]
        assert largest_difference(crops_of(images, 0.1), expected) <= limit


def test_images_that_are_not_cropped_stay_as_they_are() -> None:
    images, chosen = noise(), new_draws().uniform() < 0.5
    result = crops_of(images, 0.35, 0.5)
    same = [torch.equal(image, before) for image, before in zip(result, images, strict=True)]
    assert 0 < chosen.sum() < BATCH
    assert same == [not each for each in chosen]
    assert torch.equal(crops_of(images, 1.0), images)


@pytest.mark.numerical
@pytest.mark.parametrize(("brightness", "contrast"), [(0.4, 0.5), (0.4, 0.0), (0.0, 0.5)])
def test_jitter_against_torchvision(brightness: float, contrast: float) -> None:
    images, draws, expected = (
        smooth(),
        new_draws(),
        [each.float() / 255 for each in pictures(smooth())],
    )
    for strength, adjust in (
        (brightness, tv.adjust_brightness), (contrast, tv.adjust_contrast)
    ):  # fmt: skip
        if strength:
            factors = draws.uniform(1 - strength, 1 + strength)
            pairs = zip(expected, factors, strict=True)
            expected = [adjust(image, float(factor)) for image, factor in pairs]
    recipe = only(brightness=brightness, contrast=contrast)
    result = augment_batch(images, recipe, new_draws(), None, 1)
    assert largest_difference(result, [255 * image for image in expected]) < 0.52


@pytest.mark.numerical
@pytest.mark.parametrize("resolution", [8, 32, 40, 48, 56, 72, 96, 128])
def test_resizing_against_torchvision(resolution: int) -> None:
    for images in (smooth(4), noise(4), noise(4, 64, 32)):
        result = resize(images, resolution)
        assert (result.shape, result.dtype) == ((4, resolution, resolution, 3), torch.uint8)
        assert result.is_contiguous()
        size = [resolution, resolution]
        expected = [tv.resize(image, size, antialias=True) for image in pictures(images)]
        assert largest_difference(result, expected) <= 1
    same = noise()
    assert resize(same, 64) is same


def test_normalisation_against_a_plain_loop() -> None:
    recipe = replace(published(), mean=(0.1, 0.4, 0.8), std=(0.2, 0.3, 0.5))
    with torch.inference_mode():
        result = normalise(noise(2), recipe)
    assert (result.shape, result.dtype) == ((2, 3, 64, 64), torch.float32)
    assert result.is_contiguous(memory_format=torch.channels_last)
    for image, channel, place in itertools.product(range(2), range(3), ((0, 63), (17, 4))):
        pixel = float(noise(2)[image, *place, channel])
        expected = (pixel / 255 - recipe.mean[channel]) / recipe.std[channel]
        assert float(result[image, channel, *place]) == pytest.approx(expected, abs=2e-6)
    # Whatever is kept from inference mode must serve where gradients are computed.
    layer = torch.nn.Conv2d(3, 1, 3)
    layer(normalise(noise(1), recipe)).sum().backward()
    assert layer.weight.grad is not None
    hole = torch.full((1, 64, 64, 3), FILL, dtype=torch.uint8)
    assert normalise(hole, published()).abs().max() < 0.5 / 255 / 0.278


# --- Statistics of what albumentations does not do ------------------------------------------------

TENTHS = np.arange(0.1, 1, 0.1)


def test_resized_crops_are_distributed_as_said() -> None:
    boxes = np.array([box_of(crop) for crop in crops_of(charts(4000), 0.5)])
    top, left, height, width = boxes.T
    share = height * width / 4096
    assert share.min() > 0.48  # whole pixels
    assert np.quantile(share, TENTHS) == pytest.approx(0.5 + 0.5 * TENTHS, abs=0.015)
    # Up to 3/4 of the area every aspect ratio fits into the image.
    ratio = (np.log(width / height) / np.log(4 / 3))[share < 0.74]
    assert 0.95 < np.abs(ratio).max() < 1.1
    assert np.quantile(ratio, TENTHS) == pytest.approx(2 * TENTHS - 1, abs=0.08)
    for first, length in ((top, height), (left, width)):
        assert (first.min(), (first + length).max()) == (0, 64)
        room = 65 - length
        place = ((first + 0.5) / room)[room >= 10]  # the middles of equal parts of 0..1
        assert place.mean() == pytest.approx(0.5, abs=0.03)
        assert place.var() == pytest.approx(1 / 12, abs=0.006)
    assert_unrelated((top + height / 2).tolist(), (left + width / 2).tolist())


def test_brightness_factors_are_uniform() -> None:
    images = torch.full((4000, 1, 1, 3), 100, dtype=torch.uint8)
    result = augment_batch(images, only(brightness=0.3), new_draws(4000), None, 1)
    factors = result[:, 0, 0, 0].numpy() / 100
    assert (factors.min(), factors.max()) == (0.7, 1.3)
    assert np.quantile(factors, TENTHS) == pytest.approx(0.7 + 0.6 * TENTHS, abs=0.03)


def test_an_image_is_cropped_one_way_or_the_other() -> None:
    recipe = only(crop_probability=0.3, pad_to=80)
    result = augment_batch(charts(2000), recipe, new_draws(2000), None, 1).numpy().astype(int)
    steps = np.diff(result[:, 32, :, 0], axis=1), np.diff(result[:, :, 32, 1], axis=1)
    padded = np.all([(np.abs(step) == 1).all(axis=1) for step in steps], axis=0)
    enlarged = np.all([(step >= 0).all(axis=1) for step in steps], axis=0)
    assert (padded | enlarged).all(), "some image was both enlarged and reflected"
    assert_share(int((~padded).sum()), 2000, 0.3)
    always = replace(recipe, crop_probability=1.0)
    boxes = [box_of(image) for image in augment_batch(charts(200), always, new_draws(200), None, 1)]
    assert min(height * width for _, _, height, width in boxes) > 0.34 * 4096


def test_what_is_not_asked_for_is_not_done_and_draws_nothing() -> None:
    draws = new_draws()
    before = str(draws.rng.bit_generator.state)
    assert torch.equal(augment_batch(noise(), only(), draws, None, 1), noise())
    alternating = only(alternating_flip=True, hole_size=8, hole_probability=0.0)
    augment_batch(noise(), alternating, draws, MIRRORED_FIRST, 1)
    assert mixing_of(only(), draws.rng, 1) is None
    assert mixing_of(batched(**MIXED, unmixed_share=0.1), draws.rng, 10) is None
    assert str(draws.rng.bit_generator.state) == before


# --- Mixing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", range(20))
@pytest.mark.parametrize(("way", "name"), [("cutmix", "CutMix"), ("mixup", "MixUp")])
def test_mixing_against_torchvision(
    way: str, name: str, key: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, labels = noise(), torch.arange(BATCH)
    ours, theirs = (generator(5, Stream.MIX, 1, key) for _ in range(2))
    transform, weight = getattr(v2, name)(num_classes=BATCH), theirs.beta(1.0, 1.0)
    sampled = torch.tensor(weight, dtype=torch.float64)
    monkeypatch.setattr(transform, "_dist", SimpleNamespace(sample=lambda _: sampled))
    monkeypatch.setattr(torch, "randint", lambda n, size: torch.tensor([int(theirs.integers(n))]))
    expected, targets = transform(images.permute(0, 3, 1, 2).float(), labels)
    mixed, share = mix_batch(images, images.roll(1, 0), way, OPERATIONS[way], ours)
    assert largest_difference(mixed, list(expected)) < 0.51
    assert targets[labels, labels].tolist() == pytest.approx([share] * BATCH, abs=1e-6)
    assert targets[labels, labels.roll(1)].tolist() == pytest.approx([1 - share] * BATCH, abs=1e-6)


@pytest.mark.parametrize("shape", [(64, 64), (24, 40), (9, 7)])
@pytest.mark.parametrize("way", ["cutmix", "mixup", "resizemix"])
def test_the_share_is_that_of_the_pixels(way: str, shape: tuple[int, int]) -> None:
    images = torch.zeros(2, *shape, 3, dtype=torch.uint8)
    shares = []
    for key in range(200):
        rng, partners = generator(5, Stream.MIX, 1, key), torch.full_like(images, 255)
        mixed, share = mix_batch(images, partners, way, OPERATIONS[way], rng)
        stayed = 1 - float(mixed.double().mean()) / 255
        assert isinstance(share, float)
        assert share == pytest.approx(stayed, abs=0.002 if way == "mixup" else 1e-6)
        shares.append(share)
    assert len(set(shares)) > 3
    if way == "mixup":  # of Beta(1, 1)
        assert np.mean(shares) == pytest.approx(0.5, abs=0.08)
        assert np.var(shares) == pytest.approx(1 / 12, abs=0.02)


def test_resizemix_pastes_the_whole_shrunk_partner() -> None:
    images, partners = torch.zeros(BATCH, 64, 64, 3, dtype=torch.uint8), smooth().clamp(min=1)
    sides, tops, lefts = [], [], []
    for key in range(300):
        rng = generator(5, Stream.MIX, 1, key)
        mixed, _ = mix_batch(images, partners, "resizemix", OPERATIONS["resizemix"], rng)
        pasted = (mixed != 0).any(3).any(0)
        rows, columns = (pasted.any(axis).nonzero().flatten().tolist() for axis in (1, 0))
        side = len(rows)
        assert side == len(columns)
        if key < 20:
            expected = [
                tv.resize(each, [side, side], antialias=True) for each in pictures(partners)
            ]
            shown = mixed[:, rows[0] : rows[0] + side, columns[0] : columns[0] + side]
            assert largest_difference(shown, expected) <= 1
        sides.append(side)
        tops.append(rows[0] / (64 - side))
        lefts.append(columns[0] / (64 - side))
    assert (min(sides), max(sides)) == (6, 51)  # 0.1 and 0.8 of 64, rounded down
    assert np.mean(sides) == pytest.approx(0.45 * 64 - 0.5, abs=3)
    for places in (tops, lefts):
        assert (min(places), max(places)) == (0, 1)
        assert np.mean(places) == pytest.approx(0.5, abs=0.08)
    assert_unrelated(tops, lefts)
    assert_unrelated(sides, tops)


def test_batches_are_mixed_as_often_as_the_recipe_says_but_for_the_last_epochs() -> None:
    rngs = [generator(3, Stream.MIX, 1, i) for i in range(DRAWS)]
    ways = [mixing_of(batched(**MIXED), rng, 1) for rng in rngs]
    for way, probability in (("cutmix", 0.35), ("mixup", 0.2), ("resizemix", 0.25), (None, 0.2)):
        assert_share(ways.count(way), DRAWS, probability)
    recipe = batched(cutmix_probability=1.0, unmixed_share=0.3)
    ways = [mixing_of(recipe, rngs[0], epoch) for epoch in range(1, 11)]
    assert ways == ["cutmix"] * 7 + [None] * 3


# --- On a GPU -------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", [*OPERATIONS, "resize"])
def test_a_gpu_makes_the_same_images_without_being_waited_for(name: str) -> None:
    def call(images: torch.Tensor) -> torch.Tensor:
        return resize(images, 40) if name == "resize" else operate(name, images, new_draws())

    expected, images = call(smooth()), smooth().cuda()
    for waits in ("default", "error"):  # the first call allocates, and copies constants
        torch.cuda.set_sync_debug_mode(waits)
        try:
            result = call(images)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    # float32 rounds in another order there
    assert (result.cpu().int() - expected.int()).abs().max() <= 1
    if name in ("flip", "pad and crop", "hole", "cutmix"):
        assert torch.equal(result.cpu(), expected)
