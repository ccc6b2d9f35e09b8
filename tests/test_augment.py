"""The published augmentation, recognised in its own output, and the randomness behind it."""

import subprocess
import sys
import warnings
from dataclasses import replace
from typing import NamedTuple

import albumentations
import numpy as np
import pytest
import torch

from tinylab.data.augment import Stream, augment, build_transform, generator, normalise
from tinylab.recipes import published

DRAWS = 3000
FILL = 113  # round(0.442 * 255)


def chart() -> np.ndarray:
    """An image whose every pixel says where it came from: red its column, green its row, blue that
    it is no hole."""
    rows, columns = np.mgrid[:64, :64]
    return np.stack([columns, rows, np.full((64, 64), 255)], axis=2).astype(np.uint8)


def mirrored(index: np.ndarray) -> np.ndarray:
    """Reflection at 0 and 63 that does not repeat the edge: -1 -> 1, 64 -> 62."""
    index = np.abs(index)
    return np.where(index > 63, 126 - index, index)


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
        assert (len(rows), len(columns), hole.sum()) == (32, 32, 32 * 32), (
            "the hole is no 32 x 32 square"
        )
        assert (image[hole] == FILL).all(), "the hole is not filled with the mean"
    for flip in (False, True):
        for down in range(7):
            source_rows = mirrored(np.arange(64) + down - 3)
            if not (image[..., 1] == source_rows[:, None])[~hole].all():
                continue
            for across in range(7):
                source_columns = mirrored(np.arange(64) + across - 3)
                source_columns = 63 - source_columns if flip else source_columns
                if (image[..., 0] == source_columns[None, :])[~hole].all():
                    return Draw(flip, down, across, corner)
    raise AssertionError("no flip, crop and hole of the published recipe make this image")


@pytest.fixture(scope="module")
def draws() -> list[Draw]:
    transform, image = build_transform(published()), chart()
    return [
        recognise(augment(transform, image, generator(7, Stream.AUGMENT, 1, i)))
        for i in range(DRAWS)
    ]


def assert_share(hits: int, count: int, probability: float) -> None:
    """`hits` of `count` are as many as the probability says, within four and a half standard
    deviations."""
    spread = (probability * (1 - probability) / count) ** 0.5
    assert abs(hits / count - probability) < 4.5 * spread, (
        f"{hits} of {count}, expected {probability:.4f}"
    )


def assert_unrelated(first: list, second: list) -> None:
    """No correlation beyond chance."""
    assert abs(np.corrcoef(first, second)[0, 1]) < 4.5 / len(first) ** 0.5


def test_flips_and_holes_come_seven_times_in_ten(draws: list[Draw]) -> None:
    assert_share(sum(draw.flip for draw in draws), DRAWS, 0.7)
    assert_share(sum(draw.hole is not None for draw in draws), DRAWS, 0.7)


@pytest.mark.parametrize("axis", ["down", "across"])
def test_crops_are_uniform_over_seven_offsets(draws: list[Draw], axis: str) -> None:
    offsets = [getattr(draw, axis) for draw in draws]
    for offset in range(7):
        assert_share(offsets.count(offset), DRAWS, 1 / 7)


@pytest.mark.parametrize("axis", [0, 1])
def test_holes_are_uniform_over_every_place_inside(draws: list[Draw], axis: int) -> None:
    places = [draw.hole[axis] for draw in draws if draw.hole]
    assert (min(places), max(places)) == (0, 32)
    for compute in range(33):
        assert_share(places.count(compute), len(places), 1 / 33)


def test_the_draws_of_one_image_are_independent(draws: list[Draw]) -> None:
    """With the library's own seeding the flip and the hole come from equal streams and always come
    together."""
    flips, holes = [draw.flip for draw in draws], [draw.hole is not None for draw in draws]
    down, across = [draw.down for draw in draws], [draw.across for draw in draws]
    for first, second in (
        (flips, holes),
        (flips, down),
        (flips, across),
        (holes, down),
        (holes, across),
        (down, across),
    ):
        assert_unrelated(first, second)
    with_hole = [draw for draw in draws if draw.hole]
    hole_rows, hole_columns = zip(*(draw.hole for draw in with_hole), strict=True)
    assert_unrelated(hole_rows, hole_columns)
    for other in ("flip", "down", "across"):
        values = [getattr(draw, other) for draw in with_hole]
        assert_unrelated(hole_rows, values)
        assert_unrelated(hole_columns, values)


def test_neighbouring_positions_and_epochs_are_independent(draws: list[Draw]) -> None:
    transform, image = build_transform(published()), chart()
    next_epoch = [
        recognise(augment(transform, image, generator(7, Stream.AUGMENT, 2, i))) for i in range(500)
    ]
    flips = [draw.flip for draw in draws]
    assert_unrelated(flips[:-1], flips[1:])
    assert_unrelated(flips[:500], [draw.flip for draw in next_epoch])
    assert_unrelated([draw.down for draw in draws[:500]], [draw.down for draw in next_epoch])


def test_equal_keys_draw_equal_images_whatever_came_before() -> None:
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    key = (3, Stream.AUGMENT, 5, 17)
    first = augment(build_transform(published()), image, generator(*key))
    used = build_transform(published())
    for i in range(10):
        augment(used, image, generator(1, Stream.AUGMENT, 1, i))
    np.random.seed(0)
    assert np.array_equal(augment(used, image, generator(*key)), first)
    assert (first.shape, first.dtype) == ((64, 64, 3), np.uint8)


def test_the_input_image_stays_as_it_is() -> None:
    image = chart()
    image.flags.writeable = False
    transform = build_transform(published())
    for i in range(20):
        augment(transform, image, generator(0, Stream.AUGMENT, 1, i))
    assert np.array_equal(image, chart())


def test_every_part_of_the_key_leads_to_another_stream() -> None:
    keys = [
        (0, Stream.ORDER, 1, 0),
        (0, Stream.AUGMENT, 1, 0),
        (1, Stream.AUGMENT, 1, 0),
        (0, Stream.AUGMENT, 2, 0),
    ]
    keys += [
        (0, Stream.AUGMENT, 1, 1),
        (0, Stream.AUGMENT, 0, 1),
        (0, Stream.AUGMENT, 1, 2**28 - 1),
    ]
    keys += [(2**63 - 1, Stream.AUGMENT, 2**28 - 1, 2**28 - 1)]
    draws = {tuple(generator(*key).integers(2**62, size=4)) for key in keys}
    assert len(draws) == len(keys)


def test_switched_off_parts_do_nothing() -> None:
    recipe = replace(published(), flip_probability=0.0, pad_to=64, hole_size=0)
    transform = build_transform(recipe)
    for i in range(20):
        assert np.array_equal(
            augment(transform, chart(), generator(0, Stream.AUGMENT, 1, i)), chart()
        )


@pytest.mark.parametrize("name", ["HorizontalFlip", "PadIfNeeded", "RandomCrop", "CoarseDropout"])
def test_an_argument_the_library_does_not_know_is_an_error(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library itself only warns, and goes on without it."""
    real = getattr(albumentations, name)
    monkeypatch.setattr(
        albumentations, name, lambda *args, **options: real(*args, **options, renamed=1)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(UserWarning, match="'renamed' are not valid for transform"):
            build_transform(published())


def test_images_keep_the_size_they_have_whatever_the_network_sees() -> None:
    """`resolution` comes after augmentation."""
    small, image = build_transform(replace(published(), resolution=32)), chart()
    key = (0, Stream.AUGMENT, 1)
    expected = augment(build_transform(published()), image, generator(*key))
    assert np.array_equal(augment(small, image, generator(*key)), expected)


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
    environment = {
        name: value
        for name, value in subprocess_environment.items()
        if name != "NO_ALBUMENTATIONS_UPDATE"
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_normalisation_against_a_plain_loop() -> None:
    recipe = replace(published(), mean=(0.1, 0.4, 0.8), std=(0.2, 0.3, 0.5))
    images = torch.from_numpy(
        np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    )
    result = normalise(images, recipe)
    assert (result.shape, result.dtype) == ((2, 3, 64, 64), torch.float32)
    for image in range(2):
        for channel in range(3):
            for row, column in ((0, 0), (0, 63), (17, 4), (63, 63)):
                pixel = float(images[image, row, column, channel])
                expected = (pixel / 255 - recipe.mean[channel]) / recipe.std[channel]
                assert float(result[image, channel, row, column]) == pytest.approx(
                    expected, abs=2e-6
                )


def test_normalised_images_are_channels_last() -> None:
    images = torch.zeros(2, 64, 64, 3, dtype=torch.uint8)
    assert normalise(images, published()).is_contiguous(memory_format=torch.channels_last)


def test_evaluating_first_does_not_spoil_training() -> None:
    """Whatever normalisation keeps from inference mode must serve where gradients are computed."""
    recipe, images = (
        replace(published(), mean=(0.11, 0.22, 0.33)),
        torch.zeros(1, 64, 64, 3, dtype=torch.uint8),
    )
    with torch.inference_mode():
        normalise(images, recipe)
    layer = torch.nn.Conv2d(3, 1, 3)
    layer(normalise(images, recipe)).sum().backward()
    assert layer.weight.grad is not None


def test_a_hole_of_the_mean_is_about_zero_to_the_network() -> None:
    hole = torch.full((1, 64, 64, 3), FILL, dtype=torch.uint8)
    assert normalise(hole, published()).abs().max() < 0.5 / 255 / 0.278
