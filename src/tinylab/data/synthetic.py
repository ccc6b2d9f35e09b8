"""A small made-up data set in the layout of the public archive: everything runs without that one.

Every image shows one figure (a ring, a star, a striped square, ...) on a cluttered background. Only
its shape and pattern tell the class; place, size, turn, stretch and colours do not. The box beside
each image is the extent of the figure's pixels: localisation can be tested against the truth.
"""

import colorsys
import io
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from tinylab.data.download import NAME
from tinylab.exceptions import UserError
from tinylab.files import write_atomically
from tinylab.recipe import SIZE

GREYSCALE_SHARE = 0.02  # of the labelled images; 1.8 % of the real ones
OTHER_WORDS = {"n80000001": "figure, shape", "n95000000": "texture, pattern"}
"""Entries of words.txt that are no class: the real file names 82,114 wnids, of which 200 are."""
ROWS, COLUMNS = np.mgrid[:SIZE, :SIZE].astype(np.float32)


def star(x: np.ndarray, y: np.ndarray, points: int, inner: float) -> np.ndarray:
    """Return the distance to a star with tips at radius 1, one on top, and notches at `inner`."""
    half = np.pi / points
    # All edges are alike: every point is turned and mirrored into the wedge from a tip to a notch.
    angle = np.abs((np.arctan2(x, -y) + half) % (2 * half) - half)
    radius = np.hypot(x, y)
    along, across = radius * np.cos(angle), radius * np.sin(angle)
    edge_x, edge_y = inner * np.cos(half) - 1, inner * np.sin(half)
    return (edge_y * (along - 1) - edge_x * across) / np.hypot(edge_x, edge_y)


# Functions of x and y, float32 (64, 64), in the figure's own axes and in units of its radius:
# the distance to its outline, negative inside, and where it has its second, dark colour.
SHAPES = {
    "disc": lambda x, y: np.hypot(x, y) - 1,
    "ring": lambda x, y: np.abs(np.hypot(x, y) - 0.75) - 0.25,
    "square": lambda x, y: np.maximum(np.abs(x), np.abs(y)) - 0.85,
    "triangle": lambda x, y: star(x, y, points=3, inner=0.5),
    "star": lambda x, y: star(x, y, points=5, inner=0.42),
    "flower": lambda x, y: np.hypot(x, y) - 0.75 - 0.25 * np.cos(6 * np.arctan2(y, x)),
    "cross": lambda x, y: np.maximum(
        np.minimum(np.abs(x), np.abs(y)) - 0.3, np.maximum(np.abs(x), np.abs(y)) - 1
    ),
    "crescent": lambda x, y: np.maximum(np.hypot(x, y) - 1, 0.75 - np.hypot(x - 0.5, y)),
}
PATTERNS = {
    "plain": lambda x, y: np.zeros(x.shape, bool),
    "stripes": lambda x, y: np.sin(x * 3 * np.pi) > 0,
    "checks": lambda x, y: np.sin(x * 2.5 * np.pi) * np.sin(y * 2.5 * np.pi) > 0,
    "circles": lambda x, y: np.cos(np.hypot(x, y) * 5 * np.pi) > 0,
    "spots": lambda x, y: np.cos(x * 4 * np.pi) + np.cos(y * 4 * np.pi) > 0.5,
    "centre": lambda x, y: np.hypot(x, y) < 0.35,
}

# Name, shape and pattern of each class. None is the mirror image of another: recipes flip images.
KINDS = (
    ("ball, disc", "disc", "plain"),
    ("target, bull's-eye", "disc", "circles"),
    ("checkered disc, chequered disc", "disc", "checks"),
    ("ring, annulus", "ring", "plain"),
    ("striped square", "square", "stripes"),
    ("spotted triangle", "triangle", "spots"),
    ("star, pentagram", "star", "plain"),
    ("flower, blossom", "flower", "centre"),
    ("cross, plus sign", "cross", "plain"),
    ("crescent, sickle moon", "crescent", "plain"),
)


def write_sample(target: Path, *, classes: int = 10, per_class: int = 60, seed: int = 0) -> Path:
    """Write the made-up data set as a zip in the layout of the public archive; return its path.

    `classes` are the first of `KINDS`; one sixth of `per_class` images goes to val/. One seed gives
    the same bytes every time, with the same numpy and Pillow.
    """
    if seed < 0:
        raise UserError(f"seed must be 0 or more, not {seed}")
    rng = np.random.default_rng(seed)
    labelled = classes * per_class
    grey = rng.choice(labelled, max(1, round(GREYSCALE_SHARE * labelled)), replace=False)
    training = per_class - max(1, round(per_class / 6))
    content = io.BytesIO()
    archive = zipfile.ZipFile(content, "w")

    def add(name: str, content: bytes | str) -> None:
        # With zip's zero date: the clock must not change the bytes.
        member = zipfile.ZipInfo(f"{NAME}/{name}", date_time=(1980, 1, 1, 0, 0, 0))
        archive.writestr(member, content)

    def add_lines(name: str, lines: list[str]) -> None:
        add(name, "".join(f"{line}\n" for line in lines))

    def add_image(name: str, label: int, number: int) -> str:
        image, _, box = draw_numbered(label, number, seed)
        picture, buffer = Image.fromarray(image), io.BytesIO()
        if number < per_class and label * per_class + number in grey:
            picture = picture.convert("L")
        picture.save(buffer, "JPEG", quality=90)
        add(name, buffer.getvalue())
        return "\t".join(map(str, box))

    # As in the public archive: wnids.txt is not sorted, words.txt is and names more than classes.
    wnids = [f"n9{label + 1:07d}" for label in range(classes)]  # WordNet's own end before n2
    words = {wnid: KINDS[label][0] for label, wnid in enumerate(wnids)} | OTHER_WORDS
    add_lines("wnids.txt", wnids[1::2] + wnids[::2])
    add_lines("words.txt", [f"{wnid}\t{words[wnid]}" for wnid in sorted(words)])

    for label, wnid in enumerate(wnids):
        files = [f"{wnid}_{number}.JPEG" for number in range(training)]
        boxes = (add_image(f"train/{wnid}/images/{f}", label, i) for i, f in enumerate(files))
        pairs = zip(files, boxes, strict=True)
        add_lines(f"train/{wnid}/{wnid}_boxes.txt", [f"{file}\t{box}" for file, box in pairs])

    held_out = [(label, i) for label in range(classes) for i in range(training, per_class)]
    annotations = []
    for position, (label, number) in enumerate(rng.permutation(held_out).tolist()):
        name = f"val_{position}.JPEG"
        box = add_image(f"val/images/{name}", label, number)
        annotations.append(f"{name}\t{wnids[label]}\t{box}")
    add_lines("val/val_annotations.txt", annotations)

    for i in range(10):  # without labels, as in the real archive: nothing reads them
        add_image(f"test/images/test_{i}.JPEG", i % classes, per_class + i // classes)
    archive.close()
    write_atomically(target, content.getbuffer())
    return target


def draw_numbered(label: int, number: int, seed: int = 0) -> tuple:
    """Draw image `number` of a class, which depends on these numbers alone, and the truth about it.

    The image, uint8 (64, 64, 3), RGB; where the figure is, bool (64, 64); its extent, x0 y0 x1 y1.
    """
    rng, (_, shape, pattern) = np.random.default_rng((seed, label, number)), KINDS[label]

    # ---- background: two textured regions ----
    colours = [colour(rng, saturation=(0, 0.5), value=(0.1, 0.6)) for _ in range(3)]
    mottled = clouds(rng, rng.integers(3, 12))[..., None]
    turn, period = rng.uniform(0, np.pi), rng.uniform(4, 14)
    phase = (COLUMNS * np.cos(turn) + ROWS * np.sin(turn)) * 2 * np.pi / period
    waves = np.sin(phase)[..., None] * 0.5 + 0.5
    first = colours[0] + (colours[1] - colours[0]) * mottled
    second = colours[1] + (colours[2] - colours[1]) * waves * 0.6
    border = ((clouds(rng, 3) - 0.5) * 20).clip(0, 1)[..., None]
    canvas = first + (second - first) * border

    # ---- clutter: bars with round ends, from a dot to a long stroke ----
    for _ in range(rng.integers(2, 6)):
        turn, length, width = rng.uniform(0, np.pi), rng.choice((0, 6, 25)), rng.uniform(1, 3.5)
        across, down = COLUMNS - rng.uniform(0, SIZE), ROWS - rng.uniform(0, SIZE)
        along = across * np.cos(turn) + down * np.sin(turn)
        aside = down * np.cos(turn) - across * np.sin(turn)
        distance = np.hypot((np.abs(along) - length / 2).clip(0), aside)
        coverage = (0.5 + width - distance).clip(0, 1)[..., None]
        canvas = canvas + coverage * (colour(rng, (0, 0.6), (0.1, 0.7)) - canvas)

    # ---- place: drawn again until all lies in the image, in a box of 10 to 60 % of it ----
    inside, area = False, 0.0
    while not (inside and 0.1 <= area <= 0.6):
        radius, stretch, turn = rng.uniform(14, 34), rng.uniform(0.75, 1), rng.uniform(-0.5, 0.5)
        across, down = COLUMNS - SIZE / 2, ROWS - SIZE / 2
        x = (across * np.cos(turn) + down * np.sin(turn)) / radius
        y = (down * np.cos(turn) - across * np.sin(turn)) / (radius * stretch)
        # A ramp, one pixel wide, across the outline: the picture is not jagged.
        coverage = (0.5 - SHAPES[shape](x, y) * radius).clip(0, 1)
        x0, y0, x1, y1 = extent(coverage > 0)
        inside = min(x0, y0) >= 1 and max(x1, y1) <= SIZE - 2
        area = (x1 - x0 + 1) * (y1 - y0 + 1) / SIZE**2
    # What wraps round the edge lies outside the figure.
    move = rng.integers(1 - y0, SIZE - 1 - y1), rng.integers(1 - x0, SIZE - 1 - x1)
    x, y, coverage = (np.roll(plane, move, axis=(0, 1)) for plane in (x, y, coverage))

    # ---- figure ----
    light, dark = colour(rng, (0.3, 0.8), (0.75, 1)), colour(rng, (0.5, 1), (0.1, 0.4))
    shadow = np.roll(coverage, (1, 1), axis=(0, 1))  # no figure in the outermost pixels: no wrap
    canvas *= 1 - 0.4 * shadow[..., None]
    paint = np.where(PATTERNS[pattern](x, y)[..., None], dark, light)
    shading = 1 + 0.15 * (clouds(rng, 4) - 0.5)[..., None]
    canvas += coverage[..., None] * (paint * shading - canvas)
    canvas += rng.normal(0, 0.03, canvas.shape).astype(np.float32)
    mask = coverage > 0.5
    return np.rint(canvas.clip(0, 1) * 255).astype(np.uint8), mask, extent(mask)


def extent(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Return x0 y0 x1 y1 of the true pixels, corners included."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return int(columns[0]), int(rows[0]), int(columns[-1]), int(rows[-1])


def colour(rng: np.random.Generator, saturation: tuple, value: tuple) -> np.ndarray:
    """Draw a colour of any hue with saturation and value in these ranges, float32 (3,), 0..1."""
    hue, saturated, bright = rng.random(), rng.uniform(*saturation), rng.uniform(*value)
    return np.array(colorsys.hsv_to_rgb(hue, saturated, bright), np.float32)


def clouds(rng: np.random.Generator, cells: int) -> np.ndarray:
    """Draw smooth noise 0..1, float32 (64, 64), about `cells` hills across."""
    grid = Image.fromarray(rng.random((cells, cells), np.float32))
    return np.asarray(grid.resize((SIZE, SIZE), Image.Resampling.BICUBIC)).clip(0, 1)
