"""Batched augmentation: each operation against a plain loop over images, and its statistics against
albumentations'."""

import random
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import albumentations
import cv2
import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as tv
from test_augment import Draw, assert_share, assert_unrelated, chart, recognise
from torchvision.transforms import v2

from tinylab.data.augment import (
    Draws,
    Stream,
    alternating_flip,
    augment,
    augment_batch,
    build_transform,
    cutmix,
    generator,
    hole,
    jitter,
    mix_batch,
    mixing_of,
    mixup,
    pad_crop,
    random_flip,
    random_resized_crop,
    resize,
    resizemix,
)
from tinylab.recipe import Recipe
from tinylab.recipes import published

FILL = (113, 20, 250)
MIRRORED_FIRST = (True, False, False, True, True, False, True, False)
BATCH = len(MIRRORED_FIRST)


def noise(count: int = BATCH, height: int = 64, width: int = 64, seed: int = 0) -> torch.Tensor:
    """Random pixels, uint8 (count, height, width, 3)."""
    return torch.from_numpy(
        np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)
    )


def smooth(count: int = BATCH) -> torch.Tensor:
    """Noise blown up from 8 to 64 pixels per side: neighbouring pixels are alike, as in
    photographs."""
    return resize(noise(count, 8, 8), 64)


def charts(count: int) -> torch.Tensor:
    """Images whose red says their column and whose green says their row."""
    return torch.from_numpy(chart()).expand(count, -1, -1, -1).contiguous()


def new_draws(count: int = BATCH, key: int = 0, **options) -> Draws:
    """Draws that are the same for the same key."""
    return Draws(generator(5, Stream.AUGMENT, 1, key), count, **options)


def pictures(images: torch.Tensor) -> list[torch.Tensor]:
    """The images one by one, as torchvision has them: (3, H, W)."""
    return list(images.permute(0, 3, 1, 2))


def largest_difference(images: torch.Tensor, expected: list[torch.Tensor]) -> float:
    """In grey levels, over all pixels; `expected` are (3, H, W) on the scale 0..255."""
    return float((images.double() - torch.stack(expected).permute(0, 2, 3, 1).double()).abs().max())


OPERATIONS: dict[str, Callable[[torch.Tensor, Draws], torch.Tensor]] = {
    "random_flip": lambda images, draws: random_flip(images, 0.5, draws),
    "pad_crop": lambda images, draws: pad_crop(images, 80, draws),
    "hole": lambda images, draws: hole(images, 16, FILL, 0.5, draws),
    "random_resized_crop": lambda images, draws: random_resized_crop(images, 0.35, 0.5, draws),
    "jitter": lambda images, draws: jitter(images, 0.3, 0.3, draws),
    "cutmix": lambda images, draws: cutmix(images, 255 - images, 1.0, draws)[0],
    "mixup": lambda images, draws: mixup(images, 255 - images, 1.0, draws)[0],
    "resizemix": lambda images, draws: resizemix(images, 255 - images, draws)[0],
    "augment_batch": lambda images, draws: augment_batch(images, everything(), draws, None, 1),
}
"""Every operation that draws; each does something to most images."""


def everything() -> Recipe:
    """A recipe that asks for every augmentation of single images."""
    return batched(crop_probability=0.5, brightness=0.3, contrast=0.3)


def batched(**changes) -> Recipe:
    """The published recipe, augmented in batches."""
    return replace(
        published(), **({"name": "batched", "augmentation": "batched", "epochs": 10} | changes)
    )


MIXED = {"cutmix_probability": 0.35, "mixup_probability": 0.2, "resizemix_probability": 0.25}


# --- Draws ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPERATIONS)
def test_equal_keys_make_equal_images_and_other_keys_others(name: str) -> None:
    operation, images = OPERATIONS[name], noise()
    first = operation(images, new_draws())
    assert torch.equal(operation(images, new_draws()), first)
    assert not torch.equal(operation(images, new_draws(key=1)), first)


@pytest.mark.numerical
@pytest.mark.parametrize("name", OPERATIONS)
def test_a_part_of_a_batch_is_augmented_like_the_whole(name: str) -> None:
    """Wherever it begins and even if it wraps around, as the neighbours of the first image do."""
    operation, images = OPERATIONS[name], noise()
    whole = operation(images, new_draws())
    for positions in (
        np.arange(3),
        np.arange(3, 8),
        np.array([7, 0, 1]),
        np.array([2, 2]),
        np.array([5]),
    ):
        part = operation(images[torch.from_numpy(positions)], new_draws(positions=positions))
        assert torch.equal(part, whole[torch.from_numpy(positions)])


@pytest.mark.parametrize("name", OPERATIONS)
def test_images_are_read_only_and_results_contiguous_bytes(name: str) -> None:
    images = noise(9)[1:]
    before = images.clone()
    result = OPERATIONS[name](images, new_draws())
    assert torch.equal(images, before)
    assert result.data_ptr() != images.data_ptr()
    assert (result.shape, result.dtype, result.is_contiguous()) == (images.shape, torch.uint8, True)


@pytest.mark.parametrize("name", OPERATIONS)
def test_no_other_generator_is_touched(name: str) -> None:
    def states() -> tuple:
        return torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()

    before = states()
    OPERATIONS[name](noise(), new_draws())
    assert states() == before


@pytest.mark.parametrize("name", sorted(set(OPERATIONS) - {"augment_batch", "pad_crop"}))
def test_any_height_and_width_will_do(name: str) -> None:
    images = noise(BATCH, 24, 40)
    result = OPERATIONS[name](images, new_draws())
    assert result.shape == images.shape
    assert not torch.equal(result, images)


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_batch_of_one_will_do(name: str) -> None:
    results = [OPERATIONS[name](noise(1), new_draws(1, key)) for key in range(20)]
    assert any(not torch.equal(result, noise(1)) for result in results)


def test_numbers_stay_in_their_ranges() -> None:
    draws = new_draws(5000)
    numbers = draws.uniform(-2.0, 3.0)
    assert (numbers.shape, numbers.dtype) == ((5000,), np.float64)
    assert -2 <= numbers.min() < -1.99
    assert 2.99 < numbers.max() < 3
    whole = draws.integers(7)
    assert (whole.shape, whole.dtype, whole.min(), whole.max()) == ((5000,), np.int64, 0, 6)
    assert {draws.once_integers(3) for _ in range(50)} == {0, 1, 2}
    assert all(0.1 <= draws.once(0.1, 0.8) < 0.8 for _ in range(1000))
    assert len(Draws(generator(0, Stream.AUGMENT, 1), 10, np.array([3, 3, 4]))) == 3


@pytest.mark.parametrize("alpha", [1e-300, 1e-8, 1e-3, 0.2, 1.0, 100.0])
def test_beta_is_a_number_between_0_and_1(alpha: float) -> None:
    draws = new_draws()
    values = np.array([draws.beta(alpha) for _ in range(400)])
    assert values.min() >= 0
    assert values.max() <= 1
    assert values.mean() == pytest.approx(0.5, abs=0.12)
    assert values.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.25)


def test_epochs_batches_streams_and_calls_are_unrelated() -> None:
    def numbers(stream: Stream, epoch: int, batch: int) -> np.ndarray:
        return Draws(generator(1, stream, epoch, batch), 2000).uniform()

    first = numbers(Stream.AUGMENT, 1, 0)
    for other in (
        (Stream.AUGMENT, 1, 1),
        (Stream.AUGMENT, 2, 0),
        (Stream.MIX, 1, 0),
        (Stream.FLIP, 1, 0),
    ):
        assert_unrelated(first, numbers(*other))
    assert_unrelated(numbers(Stream.STATISTICS, 1, 0), numbers(Stream.FLIP, 1, 0))
    draws = new_draws(2000)
    assert_unrelated(draws.uniform(), draws.uniform())


def test_streams_keep_their_numbers() -> None:
    """Another number would change every result of a seed."""
    assert dict(Stream.__members__) == {
        "ORDER": 0,
        "AUGMENT": 1,
        "MIX": 2,
        "FLIP": 3,
        "STATISTICS": 4,
    }


def test_draws_for_another_number_of_images_are_refused() -> None:
    with pytest.raises(ValueError, match="8 images, but draws for 7"):
        augment_batch(noise(), batched(), new_draws(7), None, 1)


# --- Each operation against a plain loop ----------------------------------------------------------


def test_random_flips_against_a_plain_loop() -> None:
    images, chosen = noise(), new_draws().uniform() < 0.5
    assert 0 < chosen.sum() < BATCH
    expected = [
        image.flip(1) if flip else image for image, flip in zip(images, chosen, strict=True)
    ]
    assert torch.equal(random_flip(images, 0.5, new_draws()), torch.stack(expected))


def test_alternating_flips_show_both_views_in_two_epochs() -> None:
    images, first = noise(), torch.tensor(MIRRORED_FIRST)
    odd, even = alternating_flip(images, first, 1), alternating_flip(images, first, 2)
    for image, mirrored, in_odd, in_even in zip(images, first, odd, even, strict=True):
        assert torch.equal(in_odd, image.flip(1) if mirrored else image)
        assert torch.equal(in_even, image if mirrored else image.flip(1))
    assert torch.equal(alternating_flip(images, first, 3), odd)
    assert torch.equal(first, torch.tensor(MIRRORED_FIRST))


@pytest.mark.parametrize("pad_to", [64, 65, 70, 71, 80, 127, 128, 190, 191])
def test_crops_are_cut_from_what_albumentations_pads(pad_to: int) -> None:
    images, draws = noise(32), new_draws(32)
    down, across = draws.integers(pad_to - 63), draws.integers(pad_to - 63)
    pad = albumentations.PadIfNeeded(pad_to, pad_to, border_mode=cv2.BORDER_REFLECT_101)
    result = pad_crop(images, pad_to, new_draws(32)).numpy()
    for image, crop, y, x in zip(images.numpy(), result, down, across, strict=True):
        padded = pad(image=image)["image"]
        assert np.array_equal(crop, padded[y : y + 64, x : x + 64])


@pytest.mark.parametrize(("height", "width"), [(24, 40), (40, 24), (7, 1), (1, 7), (2, 2)])
def test_crops_of_other_shapes_reflect_as_numpy_does(height: int, width: int) -> None:
    """However often: numpy's "reflect" goes on and on, too."""
    images, draws = noise(BATCH, height, width), new_draws()
    down, across = draws.integers(49 - height), draws.integers(49 - width)
    result = pad_crop(images, 48, new_draws()).numpy()
    above, before = (48 - height) // 2, (48 - width) // 2
    widths = ((above, 48 - height - above), (before, 48 - width - before), (0, 0))
    for image, crop, y, x in zip(images.numpy(), result, down, across, strict=True):
        padded = np.pad(image, widths, mode="reflect")
        assert np.array_equal(crop, padded[y : y + height, x : x + width])


def test_padding_to_less_than_the_image_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot be padded to 63"):
        pad_crop(noise(), 63, new_draws())


@pytest.mark.parametrize("size", [1, 16, 64])
def test_holes_against_a_plain_loop(size: int) -> None:
    images, draws = noise(), new_draws()
    chosen, top, left = draws.uniform() < 0.5, draws.integers(65 - size), draws.integers(65 - size)
    result = hole(images, size, FILL, 0.5, new_draws())
    expected = images.clone()
    for image, holed, y, x in zip(expected, chosen, top, left, strict=True):
        if holed:
            image[y : y + size, x : x + size] = torch.tensor(FILL, dtype=torch.uint8)
    assert 0 < chosen.sum() < BATCH
    assert torch.equal(result, expected)


def box_of(crop: torch.Tensor) -> tuple[int, int, int, int]:
    """Top, left, height, width of the crop, read from a chart's corners: they show the box's corner
    pixels."""
    (left, top), (right, bottom) = crop[0, 0, :2].tolist(), crop[-1, -1, :2].tolist()
    return top, left, bottom - top + 1, right - left + 1


@pytest.mark.numerical
@pytest.mark.parametrize("antialias", [True, False])
def test_resized_crops_against_torchvision(antialias: bool) -> None:
    images = smooth(64)
    boxes = [box_of(crop) for crop in random_resized_crop(charts(64), 0.1, 1.0, new_draws(64))]
    expected = [
        tv.resized_crop(image, *box, [64, 64], antialias=antialias)
        for image, box in zip(pictures(images), boxes, strict=True)
    ]
    result = random_resized_crop(images, 0.1, 1.0, new_draws(64))
    assert largest_difference(result, expected) <= 1
    in_float = [
        tv.resized_crop(image.float(), *box, [64, 64], antialias=antialias)
        for image, box in zip(pictures(noise(64)), boxes, strict=True)
    ]
    result = random_resized_crop(noise(64), 0.1, 1.0, new_draws(64))
    assert largest_difference(result, in_float) < 0.51


def test_images_that_are_not_cropped_stay_as_they_are() -> None:
    images, chosen = noise(), new_draws().uniform() < 0.5
    result = random_resized_crop(images, 0.35, 0.5, new_draws())
    same = [torch.equal(image, before) for image, before in zip(result, images, strict=True)]
    assert 0 < chosen.sum() < BATCH
    assert same == [not each for each in chosen]
    assert torch.equal(random_resized_crop(images, 0.35, 0.0, new_draws()), images)


@pytest.mark.numerical
def test_jitter_against_torchvision() -> None:
    images, draws = smooth(), new_draws()
    bright, contrast = draws.uniform(0.6, 1.4), draws.uniform(0.5, 1.5)
    expected = [
        255 * tv.adjust_contrast(tv.adjust_brightness(image.float() / 255, float(b)), float(c))
        for image, b, c in zip(pictures(images), bright, contrast, strict=True)
    ]
    assert largest_difference(jitter(images, 0.4, 0.5, new_draws()), expected) < 0.52


@pytest.mark.numerical
@pytest.mark.parametrize("part", ["brightness", "contrast"])
def test_jitter_of_one_kind_against_torchvision_on_bytes(part: str) -> None:
    images, factors = smooth(), new_draws().uniform(0.6, 1.4)
    adjust = tv.adjust_brightness if part == "brightness" else tv.adjust_contrast
    expected = [
        adjust(image, float(factor))
        for image, factor in zip(pictures(images), factors, strict=True)
    ]
    strength = {"brightness": 0.0, "contrast": 0.0} | {part: 0.4}
    result = jitter(images, **strength, draws=new_draws())
    assert largest_difference(result, expected) <= 1
    assert not torch.equal(result, images)


@pytest.mark.numerical
@pytest.mark.parametrize("resolution", [8, 32, 40, 48, 56, 72, 96, 128])
def test_resizing_against_torchvision(resolution: int) -> None:
    for images in (smooth(4), noise(4)):
        result = resize(images, resolution)
        assert (result.shape, result.dtype) == ((4, resolution, resolution, 3), torch.uint8)
        assert result.is_contiguous()
        expected = [
            tv.resize(image, [resolution, resolution], antialias=True) for image in pictures(images)
        ]
        assert largest_difference(result, expected) <= 1


def test_resizing_to_the_same_size_is_nothing() -> None:
    images = noise()
    assert resize(images, 64) is images
    assert resize(noise(2, 64, 32), 64).shape == (2, 64, 64, 3)


# --- Statistics -----------------------------------------------------------------------------------


def recognised(key: int, count: int = 1000, recipe: Recipe | None = None) -> list[Draw]:
    """What was done to a batch of charts."""
    result = augment_batch(charts(count), recipe or batched(), new_draws(count, key), None, 1)
    return [recognise(image) for image in result.numpy()]


@pytest.fixture(scope="module")
def draws() -> list[Draw]:
    return [draw for key in range(3) for draw in recognised(key)]


@pytest.fixture(scope="module")
def one_by_one() -> list[Draw]:
    """What albumentations did, image by image."""
    transform, image = build_transform(published()), chart()
    return [
        recognise(augment(transform, image, generator(7, Stream.AUGMENT, 1, i)))
        for i in range(3000)
    ]


def assert_alike(first: list, second: list, outcomes: int) -> None:
    """Both samples, equally large, are of one distribution over `outcomes` values, as far as a
    chi-square test sees."""
    values = sorted(set(first) | set(second))
    counts = np.array([[sample.count(value) for value in values] for sample in (first, second)])
    assert len(values) == outcomes
    distance = ((counts[0] - counts[1]) ** 2 / counts.sum(axis=0)).sum()
    freedom = outcomes - 1
    assert distance < freedom + 4.5 * (2 * freedom) ** 0.5


def test_the_published_augmentation_has_the_statistics_of_albumentations(
    draws: list[Draw], one_by_one: list[Draw]
) -> None:
    assert_alike([draw.flip for draw in draws], [draw.flip for draw in one_by_one], 2)
    assert_alike([draw.down for draw in draws], [draw.down for draw in one_by_one], 7)
    assert_alike([draw.across for draw in draws], [draw.across for draw in one_by_one], 7)
    joint = [[(draw.down, draw.across) for draw in sample] for sample in (draws, one_by_one)]
    assert_alike(*joint, 49)
    assert_alike(
        [draw.hole is None for draw in draws], [draw.hole is None for draw in one_by_one], 2
    )
    holes = [[draw.hole for draw in sample if draw.hole][:2000] for sample in (draws, one_by_one)]
    for axis in (0, 1):
        assert_alike(*([compute[axis] for compute in sample] for sample in holes), 33)


def test_the_published_augmentation_has_the_published_rates(draws: list[Draw]) -> None:
    """`recognise` has seen to it that holes are 32 x 32 pixels of the mean, and that padding
    reflects."""
    assert_share(sum(draw.flip for draw in draws), len(draws), 0.7)
    holes = [draw.hole for draw in draws if draw.hole]
    assert_share(len(holes), len(draws), 0.7)
    for offset in range(7):
        assert_share(sum(draw.down == offset for draw in draws), len(draws), 1 / 7)
        assert_share(sum(draw.across == offset for draw in draws), len(draws), 1 / 7)
    for compute in range(33):
        assert_share(sum(top == compute for top, _ in holes), len(holes), 1 / 33)
        assert_share(sum(left == compute for _, left in holes), len(holes), 1 / 33)


def test_the_draws_of_one_image_are_independent(draws: list[Draw]) -> None:
    columns = [
        [float(getattr(draw, part)) for draw in draws] for part in ("flip", "down", "across")
    ]
    columns.append([draw.hole is not None for draw in draws])
    for i, first in enumerate(columns):
        for second in columns[:i]:
            assert_unrelated(first, second)
    with_hole = [draw for draw in draws if draw.hole]
    tops, lefts = zip(*(draw.hole for draw in with_hole), strict=True)
    assert_unrelated(tops, lefts)
    for part in ("flip", "down", "across"):
        values = [float(getattr(draw, part)) for draw in with_hole]
        assert_unrelated(tops, values)
        assert_unrelated(lefts, values)


def test_neighbours_and_batches_are_independent(draws: list[Draw]) -> None:
    for part in ("flip", "down", "across"):
        values = [float(getattr(draw, part)) for draw in draws]
        assert_unrelated(values[:-1], values[1:])
        assert_unrelated(values[:1000], values[1000:2000])


@pytest.fixture(scope="module")
def boxes() -> np.ndarray:
    """Top, left, height and width of 4000 resized crops, from half the area on."""
    crops = random_resized_crop(charts(4000), 0.5, 1.0, new_draws(4000))
    return np.array([box_of(crop) for crop in crops])


def test_resized_crops_keep_uniform_shares_of_the_area(boxes: np.ndarray) -> None:
    _, _, height, width = boxes.T
    share = height * width / 4096
    assert share.min() > 0.48  # whole pixels
    parts = np.arange(0.1, 1, 0.1)
    assert np.quantile(share, parts) == pytest.approx(0.5 + 0.5 * parts, abs=0.015)


def test_resized_crops_have_log_uniform_aspect_ratios(boxes: np.ndarray) -> None:
    """Where every ratio fits into the image, that is up to 3/4 of its area."""
    _, _, height, width = boxes[boxes[:, 2] * boxes[:, 3] < 0.74 * 4096].T
    ratio = np.log(width / height) / np.log(4 / 3)
    assert 0.95 < np.abs(ratio).max() < 1.1  # whole pixels
    parts = np.arange(0.1, 1, 0.1)
    assert np.quantile(ratio, parts) == pytest.approx(2 * parts - 1, abs=0.08)


def test_resized_crops_lie_anywhere(boxes: np.ndarray) -> None:
    top, left, height, width = boxes.T
    for first, length in ((top, height), (left, width)):
        assert first.min() == 0
        assert (first + length).max() == 64
        room = 65 - length
        compute = ((first + 0.5) / room)[room >= 10]  # the middles of equal parts of 0..1
        assert compute.mean() == pytest.approx(0.5, abs=0.03)
        assert compute.var() == pytest.approx(1 / 12, abs=0.006)
    assert_unrelated((top + height / 2).tolist(), (left + width / 2).tolist())


def test_resized_crops_of_all_the_area_are_the_image() -> None:
    images = noise()
    assert torch.equal(random_resized_crop(images, 1.0, 1.0, new_draws()), images)


def test_brightness_factors_are_uniform() -> None:
    images = torch.full((4000, 1, 1, 3), 100, dtype=torch.uint8)
    factors = jitter(images, 0.3, 0.0, new_draws(4000))[:, 0, 0, 0].numpy() / 100
    parts = np.arange(0.1, 1, 0.1)
    assert (factors.min(), factors.max()) == (0.7, 1.3)
    assert np.quantile(factors, parts) == pytest.approx(0.7 + 0.6 * parts, abs=0.03)


# --- A recipe's augmentation ----------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 32])
@pytest.mark.parametrize("pad_to", [64, 71])
def test_a_batch_is_augmented_step_by_step(pad_to: int, size: int) -> None:
    recipe = batched(pad_to=pad_to, hole_size=size, brightness=0.2)
    images, draws = noise(), new_draws()
    expected = pad_crop(images, pad_to, draws) if pad_to > 64 else images
    expected = jitter(random_flip(expected, 0.7, draws), 0.2, 0.0, draws)
    if size:
        expected = hole(expected, size, (113, 113, 113), 0.7, draws)
    assert torch.equal(augment_batch(images, recipe, new_draws(), None, 1), expected)


@pytest.mark.parametrize("epoch", [1, 2])
@pytest.mark.parametrize("pad_to", [64, 70])
def test_alternating_flips_take_the_place_of_random_ones(pad_to: int, epoch: int) -> None:
    recipe = batched(pad_to=pad_to, hole_size=0, alternating_flip=True)
    images, first, draws = noise(), torch.tensor(MIRRORED_FIRST), new_draws()
    expected = pad_crop(images, pad_to, draws) if pad_to > 64 else images
    result = augment_batch(images, recipe, new_draws(), first, epoch)
    assert torch.equal(result, alternating_flip(expected, first, epoch))


def test_an_image_is_cropped_one_way_or_the_other() -> None:
    recipe = batched(crop_probability=0.3, pad_to=80, flip_probability=0.0, hole_size=0)
    result = (
        augment_batch(charts(2000), recipe, new_draws(2000), None, 1)[..., :2].numpy().astype(int)
    )
    steps = np.diff(result[:, 32, :, 0], axis=1), np.diff(result[:, :, 32, 1], axis=1)
    padded = np.array([all((np.abs(step[i]) == 1).all() for step in steps) for i in range(2000)])
    enlarged = np.array([all((step[i] >= 0).all() for step in steps) for i in range(2000)])
    assert (padded | enlarged).all(), "some image was both enlarged and reflected"
    assert_share(int((~padded).sum()), 2000, 0.3)
    reflected = np.array([any((step[i] < 0).any() for step in steps) for i in range(2000)])
    assert reflected[padded].mean() > 0.98  # all but shifts of 0 and 0
    always = replace(recipe, crop_probability=1.0)
    boxes = [box_of(image) for image in augment_batch(charts(200), always, new_draws(200), None, 1)]
    assert min(height * width for _, _, height, width in boxes) > 0.34 * 4096


def test_what_is_not_asked_for_is_not_done_and_draws_nothing() -> None:
    rng = generator(0, Stream.AUGMENT, 1)
    before = str(rng.bit_generator.state)
    recipe = batched(flip_probability=0.0, pad_to=64, hole_size=0)
    assert torch.equal(augment_batch(noise(), recipe, Draws(rng, BATCH), None, 1), noise())
    alternating = replace(recipe, alternating_flip=True, hole_size=8, hole_probability=0.0)
    augment_batch(noise(), alternating, Draws(rng, BATCH), torch.tensor(MIRRORED_FIRST), 1)
    assert mixing_of(recipe, Draws(rng, BATCH), 1) is None
    assert mixing_of(batched(**MIXED, unmixed_share=0.1), Draws(rng, BATCH), 10) is None
    assert str(rng.bit_generator.state) == before
    unpadded = batched(crop_probability=1.0, pad_to=64)
    expected = augment_batch(noise(), unpadded, new_draws(), None, 1)
    assert torch.equal(
        augment_batch(noise(), replace(unpadded, pad_to=80), new_draws(), None, 1), expected
    )


# --- Mixing ---------------------------------------------------------------------------------------


def as_torchvision_draws(
    monkeypatch: pytest.MonkeyPatch, transform: v2.Transform, alpha: float, key: int
) -> None:
    """Gives torchvision's CutMix or MixUp the numbers that `new_draws(key=key)` gives ours."""
    draws = new_draws(key=key)
    weight = draws.beta(alpha)
    monkeypatch.setattr(
        transform,
        "_dist",
        SimpleNamespace(sample=lambda _: torch.tensor(weight, dtype=torch.float64)),
    )
    monkeypatch.setattr(
        torch, "randint", lambda count, size: torch.tensor([draws.once_integers(count)])
    )


@pytest.mark.parametrize("key", range(20))
@pytest.mark.parametrize("kind", ["cutmix", "mixup"])
def test_mixing_against_torchvision(kind: str, key: int, monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = noise(), torch.arange(BATCH)
    partners, partner_labels = images.roll(1, 0), labels.roll(1, 0)
    operation, transform = (cutmix, v2.CutMix) if kind == "cutmix" else (mixup, v2.MixUp)
    transform = transform(num_classes=BATCH)
    as_torchvision_draws(monkeypatch, transform, 1.0, key)
    expected, targets = transform(images.permute(0, 3, 1, 2).float(), labels)
    mixed, share = operation(images, partners, 1.0, new_draws(key=key))
    assert largest_difference(mixed, list(expected)) < 0.51
    assert torch.allclose(
        targets[labels, labels], torch.tensor(share, dtype=targets.dtype), atol=1e-6
    )
    assert torch.allclose(
        targets[labels, partner_labels], torch.tensor(1 - share, dtype=targets.dtype), atol=1e-6
    )


@pytest.mark.parametrize("shape", [(64, 64), (24, 40), (9, 7)])
@pytest.mark.parametrize("kind", ["cutmix", "resizemix"])
def test_the_share_is_that_of_the_pixels(kind: str, shape: tuple[int, int]) -> None:
    images = torch.zeros(2, *shape, 3, dtype=torch.uint8)
    shares = []
    for key in range(200):
        draws = new_draws(2, key)
        partners = torch.full_like(images, 255)
        mixed, share = (
            cutmix(images, partners, 1.0, draws)
            if kind == "cutmix"
            else resizemix(images, partners, draws)
        )
        assert isinstance(share, float)
        assert share == pytest.approx(float((mixed == 0).float().mean()), abs=1e-6)
        assert set(mixed.unique().tolist()) <= {0, 255}
        shares.append(share)
    assert len(set(shares)) > 3


def test_mixup_weighs_pixels_as_it_weighs_labels() -> None:
    images = torch.zeros(2, 8, 8, 3, dtype=torch.uint8)
    shares = []
    for key in range(200):
        mixed, share = mixup(images, torch.full_like(images, 200), 0.8, new_draws(2, key))
        assert (mixed == round(200 * (1 - share))).all()
        shares.append(share)
    assert np.mean(shares) == pytest.approx(0.5, abs=0.1)
    assert np.var(shares) == pytest.approx(1 / (4 * 2.6), abs=0.02)


def test_resizemix_pastes_the_whole_shrunk_partner() -> None:
    images, partners = torch.zeros(BATCH, 64, 64, 3, dtype=torch.uint8), smooth().clamp(min=1)
    sides, tops, lefts = [], [], []
    for key in range(300):
        mixed, _ = resizemix(images, partners, new_draws(key=key))
        rows, columns = (
            torch.nonzero((mixed != 0).any(3).any(axis).any(0)).flatten() for axis in (2, 1)
        )
        top, left, high, wide = int(rows[0]), int(columns[0]), len(rows), len(columns)
        assert high == wide
        pasted = mixed[:, top : top + high, left : left + wide]
        if key < 20:
            expected = [
                tv.resize(image, [high, wide], antialias=True) for image in pictures(partners)
            ]
            assert largest_difference(pasted, expected) <= 1
        sides.append(high)
        tops.append(top / (64 - high))
        lefts.append(left / (64 - wide))
    assert (min(sides), max(sides)) == (6, 51)  # 0.1 and 0.8 of 64, rounded down
    assert np.mean(sides) == pytest.approx(0.45 * 64 - 0.5, abs=3)
    for places in (tops, lefts):
        assert (min(places), max(places)) == (0, 1)
        assert np.mean(places) == pytest.approx(0.5, abs=0.08)
    assert_unrelated(tops, lefts)
    assert_unrelated(sides, tops)


def test_batches_are_mixed_as_often_as_the_recipe_says() -> None:
    recipe = batched(**MIXED)
    ways = [mixing_of(recipe, Draws(generator(3, Stream.MIX, 1, i), BATCH), 1) for i in range(3000)]
    for way, probability in (("cutmix", 0.35), ("mixup", 0.2), ("resizemix", 0.25), (None, 0.2)):
        assert_share(ways.count(way), 3000, probability)


@pytest.mark.parametrize(
    ("way", "operation"), [("cutmix", cutmix), ("mixup", mixup), ("resizemix", resizemix)]
)
def test_a_batch_is_mixed_the_way_that_was_announced(way: str, operation: Callable) -> None:
    recipe = batched(**{f"{way}_probability": 1.0}, cutmix_alpha=0.7, mixup_alpha=0.4)
    images, labels = noise(), torch.arange(BATCH)
    partners, partner_labels = images.roll(1, 0), labels.roll(1)
    assert mixing_of(recipe, new_draws(), 1) == way
    draws = new_draws()
    draws.once()  # the choice
    alpha = {"cutmix": [0.7], "mixup": [0.4], "resizemix": []}[way]
    expected, share = operation(images, partners, *alpha, draws)
    mixed, mixed_in, weight = mix_batch(
        images, partners, labels, partner_labels, recipe, new_draws(), 1
    )
    assert torch.equal(mixed, expected)
    assert mixed_in is partner_labels
    assert weight == share


def test_mixing_agrees_with_its_announcement() -> None:
    recipe, seen = batched(**MIXED), set()
    images, labels = noise(2), torch.tensor([4, 9])
    for key in range(60):
        way = mixing_of(recipe, new_draws(2, key), 1)
        mixed, partners, share = mix_batch(
            images, images.roll(1, 0), labels, labels.roll(1), recipe, new_draws(2, key), 1
        )
        seen.add(way)
        if way is None:
            assert (partners, share) == (None, 1.0)
            assert torch.equal(mixed, images)
        else:
            assert partners.tolist() == [9, 4]
            assert 0 <= share <= 1
    assert seen == {"cutmix", "mixup", "resizemix", None}


def test_the_last_epochs_are_not_mixed() -> None:
    recipe = batched(cutmix_probability=1.0, unmixed_share=0.3)
    ways = [mixing_of(recipe, new_draws(), epoch) for epoch in range(1, 11)]
    assert ways == ["cutmix"] * 7 + [None] * 3
    images, labels = noise(), torch.arange(BATCH)
    mixed, partners, share = mix_batch(
        images, images.roll(1, 0), labels, labels.roll(1), recipe, new_draws(), 8
    )
    assert torch.equal(mixed, images)
    assert (partners, share) == (None, 1.0)


# --- On a GPU -------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", [*OPERATIONS, "resize"])
def test_a_gpu_makes_the_same_images_without_being_waited_for(name: str) -> None:
    operation = OPERATIONS.get(name, lambda images, _: resize(images, 40))
    expected = operation(smooth(), new_draws())
    images = smooth().cuda()
    for waits in ("default", "error"):  # the first call allocates, and copies constants
        torch.cuda.set_sync_debug_mode(waits)
        try:
            result = operation(images, new_draws(device="cuda"))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert (
        int((result.cpu().int() - expected.int()).abs().max()) <= 1
    )  # float32 rounds in another order there
    if name in ("random_flip", "pad_crop", "hole", "cutmix"):
        assert torch.equal(result.cpu(), expected)
