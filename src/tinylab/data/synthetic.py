"""A small made-up data set in the layout of the public archive, so that everything runs without the
real one.

Every image shows one figure (a ring, a star, a striped square, ...) somewhere on a cluttered
background. Place, size, turn, stretch and all colours are drawn independently of the class: only
shape and pattern tell it. The box beside each image is the extent of the figure's own pixels, so
whatever measures localisation can be tested against the truth.
"""

import colorsys
import contextlib
import io
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from tinylab.exceptions import UserError

SIZE = 64
"""Pixels per side, as in Tiny ImageNet."""
ROOT = "tiny-imagenet-200"
"""First folder of every member, as in the public archive (also where there are fewer classes than
200)."""
BOX_SHARE = (0.1, 0.6)
"""Least and greatest share of the image that a figure's box covers."""
GREYSCALE_SHARE = 0.02
"""Share of the labelled images stored with one channel; 1.8 % of the real ones are."""
VALIDATION_SHARE = 1 / 6
"""Share of each class that goes to val/: 10 of 60."""
JPEG_QUALITY = 90

_ROWS, _COLUMNS = np.mgrid[:SIZE, :SIZE].astype(np.float32)


class Drawing(NamedTuple):
    """One made-up image and the truth about it."""

    image: np.ndarray
    """uint8 (64, 64, 3), RGB."""
    mask: np.ndarray
    """bool (64, 64), true where the figure is; the hole of a ring is not part of it."""
    box: tuple[int, int, int, int]
    """x0 y0 x1 y1, the extent of `mask`, corners inclusive, in pixels 0..63."""


def _star(x: np.ndarray, y: np.ndarray, points: int, inner: float) -> np.ndarray:
    """Distance to a star whose tips lie at radius 1, one of them on top, and whose notches lie at
    radius `inner`.

    With `inner` = cos(pi / points) the notches lie on the edges between the tips: a regular
    polygon.
    """
    half = np.pi / points
    # All edges are alike: turn and mirror every point into the wedge between one tip and the next
    # notch.
    angle = np.abs((np.arctan2(x, -y) + half) % (2 * half) - half)
    radius = np.hypot(x, y)
    along, across = radius * np.cos(angle), radius * np.sin(angle)
    edge_x, edge_y = inner * np.cos(half) - 1, inner * np.sin(half)
    return (edge_y * (along - 1) - edge_x * across) / np.hypot(edge_x, edge_y)


def _disc(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.hypot(x, y) - 1


def _ring(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.abs(np.hypot(x, y) - 0.75) - 0.25


def _square(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(np.abs(x), np.abs(y)) - 0.85


def _triangle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return _star(x, y, points=3, inner=0.5)


def _five_pointed_star(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return _star(x, y, points=5, inner=0.42)


def _flower(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.hypot(x, y) - 0.75 - 0.25 * np.cos(6 * np.arctan2(y, x))


def _cross(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    across, along = np.minimum(np.abs(x), np.abs(y)), np.maximum(np.abs(x), np.abs(y))
    return np.maximum(across - 0.3, along - 1)


def _crescent(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(np.hypot(x, y) - 1, 0.75 - np.hypot(x - 0.5, y))


def _plain(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.zeros(x.shape, bool)


def _stripes(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.sin(x * 3 * np.pi) > 0


def _checks(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.sin(x * 2.5 * np.pi) * np.sin(y * 2.5 * np.pi) > 0


def _circles(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.cos(np.hypot(x, y) * 5 * np.pi) > 0


def _spots(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.cos(x * 4 * np.pi) + np.cos(y * 4 * np.pi) > 0.5


def _centre(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.hypot(x, y) < 0.35


class Kind(NamedTuple):
    """What the images of one class show; `x` and `y` below are float32 (64, 64) in the figure's own
    axes."""

    name: str
    """As in words.txt: synonyms separated by ', '."""
    distance: Callable[[np.ndarray, np.ndarray], np.ndarray]
    """(x, y) -> distance to the outline in units of the figure's radius, negative inside."""
    pattern: Callable[[np.ndarray, np.ndarray], np.ndarray]
    """(x, y) -> bool, where the figure has its second, dark colour."""


# None is the mirror image of another: the recipe flips images.
KINDS = (
    Kind("ball, disc", _disc, _plain),
    Kind("target, bull's-eye", _disc, _circles),
    Kind("checkered disc, chequered disc", _disc, _checks),
    Kind("ring, annulus", _ring, _plain),
    Kind("striped square", _square, _stripes),
    Kind("spotted triangle", _triangle, _spots),
    Kind("star, pentagram", _five_pointed_star, _plain),
    Kind("flower, blossom", _flower, _centre),
    Kind("cross, plus sign", _cross, _plain),
    Kind("crescent, sickle moon", _crescent, _plain),
)
"""The classes there can be, in the order of their wnids."""

OTHER_WORDS = {
    "n80000001": "figure, shape",
    "n80000002": "background, clutter",
    "n95000000": "texture, pattern",
}
"""Entries of words.txt that are no class: the real file names 82,114 wnids, of which 200 are
classes."""
TEST_IMAGES = 10
"""Images in test/: the real archive has unlabelled ones too, which nothing here reads."""


def write_sample(target: Path, *, classes: int = 10, per_class: int = 60, seed: int = 0) -> Path:
    """Writes the made-up data set as a zip in the layout of the public archive and returns its
    path.

    `classes` are the first of `KINDS`. Of the `per_class` images one sixth goes to val/, the others
    to train/; test/ gets ten more without labels. One seed gives the same bytes every time, with
    the same numpy and Pillow. The file appears complete or not at all; folders above it are made.
    About a second for 10 classes of 60.

    Raises `UserError` if the target cannot be written or a size is impossible.
    """
    if not 2 <= classes <= len(KINDS):
        raise UserError(f"the sample can have from 2 to {len(KINDS)} classes, not {classes}")
    if os.path.exists(target) and not (target.is_file() or target.is_dir()):
        raise UserError(
            f"{target} is no regular file: choose another place"
        )  # a device would be replaced
    if per_class < 2:
        raise UserError(
            f"each class needs at least 2 images, one for train/ and one for val/, not {per_class}"
        )
    if seed < 0:
        raise UserError(f"the sample's seed must be 0 or more, not {seed}")
    if os.path.isdir(
        target
    ):  # unlike Path.is_dir, false for a name that the file system refuses: that is told below
        raise UserError(
            f"{target} is a folder; name the zip file to write, such as {target / 'sample.zip'}"
        )
    temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file, zipfile.ZipFile(file, "w") as archive:
            _fill(archive, classes, per_class, seed)
        os.replace(temporary, target)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(
            f"cannot write {target}: {reason}; choose another place or make room there"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    return target


def _fill(archive: zipfile.ZipFile, classes: int, per_class: int, seed: int) -> None:
    """Adds every member of the sample to the open archive."""
    rng = np.random.default_rng(seed)
    wnids = [wnid(index) for index in range(classes)]
    words = {wnid(index): KINDS[index].name for index in range(classes)} | OTHER_WORDS
    # As in the public archive: wnids.txt is not sorted, words.txt is and names more than the
    # classes.
    _add_lines(archive, "wnids.txt", wnids[1::2] + wnids[::2])
    _add_lines(archive, "words.txt", [f"{key}\t{words[key]}" for key in sorted(words)])

    labelled = classes * per_class
    grey = set(
        rng.choice(labelled, max(1, round(GREYSCALE_SHARE * labelled)), replace=False).tolist()
    )
    training = per_class - max(1, round(VALIDATION_SHARE * per_class))

    def add(folder: str, name: str, index: int, number: int) -> str:
        drawing = draw_numbered(index, number, seed)
        _add_image(
            archive, f"{folder}/images/{name}", drawing.image, index * per_class + number in grey
        )
        return "\t".join(map(str, drawing.box))

    for index in range(classes):
        names = [f"{wnids[index]}_{number}.JPEG" for number in range(training)]
        folder = f"train/{wnids[index]}"
        boxes = [f"{name}\t{add(folder, name, index, number)}" for number, name in enumerate(names)]
        _add_lines(archive, f"{folder}/{wnids[index]}_boxes.txt", boxes)

    held_out = [
        (index, number) for index in range(classes) for number in range(training, per_class)
    ]
    annotations = []
    for position, (index, number) in enumerate(rng.permutation(held_out).tolist()):
        name = f"val_{position}.JPEG"
        annotations.append(f"{name}\t{wnids[index]}\t{add('val', name, index, number)}")
    _add_lines(archive, "val/val_annotations.txt", annotations)

    for position in range(TEST_IMAGES):
        image = draw_numbered(position % classes, per_class + position // classes, seed).image
        _add_image(archive, f"test/images/test_{position}.JPEG", image, grey=False)


def _add_lines(archive: zipfile.ZipFile, name: str, lines: list[str]) -> None:
    archive.writestr(_member(name), "".join(f"{line}\n" for line in lines))


def _add_image(archive: zipfile.ZipFile, name: str, image: np.ndarray, grey: bool) -> None:
    picture = Image.fromarray(image)
    buffer = io.BytesIO()
    (picture.convert("L") if grey else picture).save(buffer, "JPEG", quality=JPEG_QUALITY)
    archive.writestr(_member(name), buffer.getvalue())


def _member(name: str) -> zipfile.ZipInfo:
    """An entry of the archive with zip's zero date: the clock must not change the bytes."""
    return zipfile.ZipInfo(f"{ROOT}/{name}", date_time=(1980, 1, 1, 0, 0, 0))


def wnid(index: int) -> str:
    """A made-up WordNet id for class 0, 1, ... of `KINDS`: WordNet's own end before n2."""
    return f"n9{index + 1:07d}"


def draw(kind: Kind, rng: np.random.Generator) -> Drawing:
    """One image of a class: a background with clutter, the figure with its shadow on it, then
    noise."""
    ground_colours = [_colour(rng, saturation=(0, 0.5), value=(0.1, 0.6)) for _ in range(3)]
    canvas = _background(rng, ground_colours)
    x, y, coverage = _place(kind, rng)
    light, dark = _colour(rng, (0.3, 0.8), (0.75, 1)), _colour(rng, (0.5, 1), (0.1, 0.4))
    shadow = np.roll(
        coverage, (1, 1), axis=(0, 1)
    )  # the outermost pixels are free of the figure: nothing wraps
    canvas *= 1 - 0.4 * shadow[..., None]
    colour = np.where(kind.pattern(x, y)[..., None], dark, light)
    shading = 1 + 0.15 * (_clouds(rng, 4) - 0.5)[..., None]
    canvas += coverage[..., None] * (colour * shading - canvas)
    canvas += rng.normal(0, 0.03, canvas.shape).astype(np.float32)
    mask = coverage > 0.5
    return Drawing(np.rint(canvas.clip(0, 1) * 255).astype(np.uint8), mask, _extent(mask))


def draw_numbered(class_index: int, number: int, seed: int = 0) -> Drawing:
    """The drawing that `write_sample` stores (in colour, or turned to grey) as image `number` of a
    class.

    It depends on these three numbers alone: a larger sample holds the same images and more.
    """
    return draw(KINDS[class_index], np.random.default_rng((seed, class_index, number)))


def _place(kind: Kind, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A figure's axes x, y and its coverage 0..1 of every pixel, each float32 (64, 64).

    Drawn again until the whole figure lies in the image and its box has a size in `BOX_SHARE`.
    """
    while True:
        radius = rng.uniform(14, 34)
        stretch = rng.uniform(0.75, 1)
        turn = rng.uniform(-0.5, 0.5)
        across, down = _COLUMNS - SIZE / 2, _ROWS - SIZE / 2
        x = (across * np.cos(turn) + down * np.sin(turn)) / radius
        y = (down * np.cos(turn) - across * np.sin(turn)) / (radius * stretch)
        # One pixel wide ramp across the outline: the picture is not jagged.
        coverage = (0.5 - kind.distance(x, y) * radius).clip(0, 1)
        x0, y0, x1, y1 = _extent(coverage > 0)
        if min(x0, y0) < 1 or max(x1, y1) > SIZE - 2:
            continue
        if BOX_SHARE[0] <= (x1 - x0 + 1) * (y1 - y0 + 1) / SIZE**2 <= BOX_SHARE[1]:
            # What wraps round the edge lies outside the figure.
            move = rng.integers(1 - y0, SIZE - 1 - y1), rng.integers(1 - x0, SIZE - 1 - x1)
            return tuple(np.roll(plane, move, axis=(0, 1)) for plane in (x, y, coverage))


def _extent(mask: np.ndarray) -> tuple[int, int, int, int]:
    """x0 y0 x1 y1 of the true pixels, corners inclusive."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return int(columns[0]), int(rows[0]), int(columns[-1]), int(rows[-1])


def _colour(
    rng: np.random.Generator, saturation: tuple[float, float], value: tuple[float, float]
) -> np.ndarray:
    """A colour of any hue, float32 (3,), 0..1."""
    return np.array(
        colorsys.hsv_to_rgb(rng.random(), rng.uniform(*saturation), rng.uniform(*value)), np.float32
    )


def _clouds(rng: np.random.Generator, cells: int) -> np.ndarray:
    """Smooth noise 0..1, float32 (64, 64), about `cells` hills across."""
    grid = Image.fromarray(rng.random((cells, cells), np.float32))
    return np.asarray(grid.resize((SIZE, SIZE), Image.Resampling.BICUBIC)).clip(0, 1)


def _background(rng: np.random.Generator, colours: list[np.ndarray]) -> np.ndarray:
    """Two textured regions and some clutter, float32 (64, 64, 3), 0..1."""
    mottled = _clouds(rng, rng.integers(3, 12))[..., None]
    turn, period = rng.uniform(0, np.pi), rng.uniform(4, 14)
    waves = (
        np.sin((_COLUMNS * np.cos(turn) + _ROWS * np.sin(turn)) * 2 * np.pi / period)[..., None]
        * 0.5
        + 0.5
    )
    first = colours[0] + (colours[1] - colours[0]) * mottled
    second = colours[1] + (colours[2] - colours[1]) * waves * 0.6
    border = ((_clouds(rng, 3) - 0.5) * 20).clip(0, 1)[..., None]
    canvas = first + (second - first) * border
    for _ in range(rng.integers(2, 6)):
        coverage = _scrap(rng)[..., None]
        canvas = canvas + coverage * (_colour(rng, (0, 0.6), (0.1, 0.7)) - canvas)
    return canvas


def _scrap(rng: np.random.Generator) -> np.ndarray:
    """Coverage 0..1 of one piece of clutter, float32 (64, 64): a bar with round ends, from a dot to
    a long stroke."""
    turn, length, width = rng.uniform(0, np.pi), rng.choice((0, 6, 25)), rng.uniform(1, 3.5)
    across, down = _COLUMNS - rng.uniform(0, SIZE), _ROWS - rng.uniform(0, SIZE)
    along = across * np.cos(turn) + down * np.sin(turn)
    aside = down * np.cos(turn) - across * np.sin(turn)
    return (0.5 + width - np.hypot((np.abs(along) - length / 2).clip(0), aside)).clip(0, 1)
