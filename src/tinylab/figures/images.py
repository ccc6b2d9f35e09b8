"""Pages of images: samples, mistakes, heat maps. Images are uint8 (n, h, w, 3)."""

import math
import re
import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from tinylab.figures.style import (  # isort: skip
    BLUE, GRID, HEAT, INK, KINDS, LABEL, MUTED, NOTE, RAMP, WIDTH, clean, fitted, message,
    new_canvas, put_caption, put_names_key, put_picture, put_text, styled, title_height,
)  # fmt: skip

SCALED = "scaled to itself: it shows where, never how much."


def image_grid(
    images: np.ndarray, titles: Sequence[str], boxes: np.ndarray | None = None, columns: int = 8,
    title: str = "",
) -> Figure:  # fmt: skip
    """Draw titled images without smoothing. boxes: (n, 4), x0 y0 x1 y1, ends included."""
    return titled({"": images}, titles, columns, title, indent=0, gap=0.1, below=0.1, boxes=boxes)


def before_after(
    before: np.ndarray, after: np.ndarray, titles: Sequence[str], columns: int = 8, title: str = ""
) -> Figure:
    """Draw the same images before and after augmentation: blocks of two rows."""
    rows = {"before": before, "after": after}
    return titled(rows, titles, columns, title, indent=0.52, gap=0.06, below=0.14)


def misclassified(
    images: np.ndarray, entries: Sequence[Mapping], columns: int = 5, title: str = ""
) -> Figure:
    """Draw mistakes. An entry has `predicted` and `actual`: `name`, `probability` (0..1)."""
    nothing = "No misclassified image: every prediction was right."
    return answered(images, entries, columns, title, nothing)


def confident(
    images: np.ndarray, entries: Sequence[Mapping], title: str = "", columns: int = 5
) -> Figure:
    """Draw a gallery like `misclassified` of any predictions: a right one has its one name.

    It is right if `predicted` equals `actual`, so a `wnid` in both keeps classes of one name apart.
    """
    nothing = f"{clean(title)}: there is none." if title else "There is no such prediction."
    return answered(images, entries, columns, title, nothing)


def label_conflicts(
    images: np.ndarray, entries: Sequence[Mapping], columns: int = 5, most: int = 60
) -> Figure:
    """Draw identical images that have different labels: each picture once, with both labels.

    images: also (n, 2, h, w, 3), of which the first of two is shown; at most `most` pairs. An entry
    has the two `names`, and may have `tested`: of each whether it is a test image.
    """
    images = images[:most, 0] if images.ndim == 5 else images[:most]
    pairs = f"{len(entries):,} pair{'' if len(entries) == 1 else 's'}"
    title = f"{pairs} of identical images with different labels"
    title += "" if len(entries) <= most else f": the first {most}"
    remarks = {True: "test", False: "not tested", None: ""}
    captions = []
    for entry in entries[:most]:
        both = zip(entry["names"], entry.get("tested", (None, None)), strict=True)
        # Being right about one is a mistake about the other: neither has the colour of the truth.
        captions.append([(name, remarks[tested], INK) for name, tested in both])
    nothing = "No two identical images have different labels."
    return gallery(images, captions, columns, title, nothing, key={})


def gradcam_stages(
    images: np.ndarray, maps: Mapping[str, np.ndarray], entries: Sequence[Mapping],
    title: str = "", method: str = "Grad-CAM",
) -> Figure:  # fmt: skip
    """Draw a row per image: the image, then heat map and overlay of every stage.

    maps: float32 (n, map height, map width) in 0..1 for each stage, for the predicted class.
    entries: as for `misclassified`, and with `box` (x0 y0 x1 y1, ends included) if there is one.
    """
    notes = (
        f"{clean(method)} for the predicted class. Every map is {SCALED} White frame: the object's "
        "box.\nMaps are computed at the size above them and enlarged bilinearly, the image pixels "
        "without smoothing."
    )
    return map_table(images, maps, entries, title, notes, by_class=False)


def class_maps(
    images: np.ndarray, predicted: np.ndarray, actual: np.ndarray, entries: Sequence[Mapping],
    method: str = "Grad-CAM", stage: str = "layer4", title: str = "",
) -> Figure:  # fmt: skip
    """Draw two images per row, each beside the maps of the predicted and of the actual class.

    predicted, actual: float32 (n, map height, map width) in 0..1. entries: as for `gradcam_stages`.
    """
    rows, width = predicted.shape[1:]
    which = "whatever the class" if np.array_equal(predicted, actual) else "for either class"
    notes = (
        f"{fitted(method, 1.4, 8)} of {fitted(stage, 0.7, 8)}, {which}. Every map is {SCALED}\n"
        f"White frame: the object's box. Maps are computed at {width} × {rows} and enlarged "
        "bilinearly, image pixels without smoothing."
    )
    maps = {"predicted class": predicted, "actual class": actual}
    return map_table(images, maps, entries, title, notes, by_class=True)


@styled
def prediction(
    image: np.ndarray, top: Sequence[Mapping], heat: np.ndarray | None, title: str = ""
) -> Figure:
    """Draw an image (h, w, 3), Grad-CAM of the first prediction, and the first ones as bars.

    top: `name` and `probability` (0..1), best first. heat: (map height, map width) in 0..1.
    """
    if not top:
        return message("There is no prediction to show.")
    margin, side, gap = 0.08, 2.56, 0.14
    upper = title_height(title) + 0.22
    bars = margin + (side + gap) * (1 if heat is None else 2) + 0.1
    room, step = WIDTH - margin - bars, side / max(len(top), 5)
    height = upper + side + (0.34 if heat is None else 0.62)
    figure = new_canvas(height, title)
    rows, columns = image.shape[:2]
    put_text(figure, margin, upper - 0.06, f"the image, {columns} × {rows} pixels", **LABEL)
    put_picture(figure, margin, upper, side, image)
    for i, entry in enumerate(top):
        edge, share = upper + i * step, entry["probability"]
        line = (entry["name"], f"{100 * share:.1f} %", INK)
        put_caption(figure, bars, edge - 0.02, room, [line], size=9)
        for long, color in ((room, GRID), (room * share, BLUE)):
            at, look = (bars / WIDTH, 1 - (edge + 0.32) / height), {"color": color, "linewidth": 0}
            bar = Rectangle(at, long / WIDTH, 0.1 / height, transform=figure.transFigure, **look)
            figure.add_artist(bar)
    notes = (
        "The network always names one of the classes that it has learned, whatever the picture "
        "shows."
    )
    if heat is None:
        put_text(figure, margin, upper + side + 0.22, notes, **NOTE)
    else:
        left, what = margin + side + gap, "Grad-CAM" if np.any(heat) else "no evidence"
        put_text(figure, left, upper - 0.06, f"{what} for the first prediction", **LABEL)
        put_heat_map(figure, left, upper, side, image, heat, hide_picture=False)
        scaled = f"The map ({heat.shape[1]} × {heat.shape[0]}, enlarged bilinearly) is {SCALED}"
        put_heat_key(figure, margin, upper + side, f"{scaled}\n{notes}")
    return figure


@styled
def titled(
    rows: Mapping[str, np.ndarray], titles: Sequence[str], columns: int, title: str, *,
    indent: float, gap: float, below: float, boxes: np.ndarray | None = None,
) -> Figure:  # fmt: skip
    """Draw images under their titles, those of a row beside its name in the `indent`."""
    if not len(titles):
        return message("No images to show.")
    margin = 0.08
    side = (WIDTH - 2 * margin - indent + gap) / columns - gap
    captions = []
    for name in titles:  # about 15 characters an inch
        lines = textwrap.wrap(clean(name), int(15 * side), max_lines=2, placeholder="…")
        captions.append("\n".join(fitted(line, side, 8) for line in lines))
    text = 0.36 if any("\n" in caption for caption in captions) else 0.24
    top, height = title_height(title), text + len(rows) * side + (len(rows) - 1) * gap + below
    figure = new_canvas(top + math.ceil(len(titles) / columns) * height, title)
    for i, (caption, *pictures) in enumerate(zip(captions, *rows.values(), strict=True)):
        left = margin + indent + i % columns * (side + gap)
        upper = top + i // columns * height + text
        put_text(figure, left, upper - 0.05, caption, size=8, va="bottom")
        for row, (word, image) in enumerate(zip(rows, pictures, strict=True)):
            lower = upper + row * (side + gap)
            put_picture(figure, left, lower, side, image, box=None if boxes is None else boxes[i])
            if i % columns == 0:
                put_text(figure, margin, lower + side / 2, word, color=MUTED, va="center")
    return figure


def answered(
    images: np.ndarray, entries: Sequence[Mapping], columns: int, title: str, nothing: str
) -> Figure:
    """Draw images under the class that was predicted and, if that was wrong, the actual one."""
    captions, key = [], {}
    for entry in entries:
        right = entry["predicted"] == entry["actual"]
        key |= {"right": INK} if right else KINDS
        kinds = {"predicted": INK} if right else KINDS
        lines = [(entry[kind], color) for kind, color in kinds.items()]
        captions.append([(e["name"], f"{100 * e['probability']:.0f} %", c) for e, c in lines])
    key = {word: key[word] for word in (*KINDS, "right") if word in key}
    return gallery(images, captions, columns, title, nothing, key)


@styled
def gallery(
    images: np.ndarray, captions: Sequence, columns: int, title: str, nothing: str, key: Mapping
) -> Figure:
    """Draw rows of images, each below its lines (see `put_caption`); without any say `nothing`."""
    if not len(images):
        return message(nothing)
    margin, gap, text = 0.08, 0.22, 0.08 + 0.17 * max(map(len, captions))
    side = (WIDTH - 2 * margin + gap) / columns - gap
    height = text + side + 0.12
    figure = new_canvas(0.42 + math.ceil(len(images) / columns) * height, title)
    for i, (image, lines) in enumerate(zip(images, captions, strict=True)):
        left, upper = margin + i % columns * (side + gap), 0.42 + i // columns * height
        put_caption(figure, left, upper, side, lines)
        put_picture(figure, left, upper + text, side, image)
    put_names_key(figure, key)
    return figure


@styled
def map_table(
    images: np.ndarray, maps: Mapping[str, np.ndarray], entries: Sequence[Mapping], title: str,
    notes: str, by_class: bool,
) -> Figure:  # fmt: skip
    """Draw images, each beside heat map and overlay under every heading of `maps`.

    by_class: the maps, not the image, have their classes above them, and two images share a row.
    """
    if not len(images):
        return message("No misclassified image: there is nothing to explain.")
    if not any(entry.get("box") for entry in entries):
        notes = re.sub(r" ?White frame: the object's box\.( |(?=\n))", "", notes)
    margin, near, columns, between, far, text, below = 0.06, 0.03, 1, 0, 0.13, 0.27, 0.13
    if by_class:
        columns, between, far, text, below = 2, 0.26, 0.09, 0.23, 0.15
    column = (WIDTH - 2 * margin + between) / columns
    side = (column - between - len(maps) * (near + far)) / (1 + 2 * len(maps))
    lefts = [side + far + i * (2 * side + near + far) for i in range(len(maps))]
    top, height = title_height(title) + 0.42, text + side + below
    bottom = top + math.ceil(len(images) / columns) * height
    figure = new_canvas(bottom + 0.6, title)
    for i in range(min(columns, len(images))):
        start = margin + i * column
        put_text(figure, start, top - 0.05, "image", **LABEL)
        colors = KINDS.values() if by_class else [INK] * len(maps)
        for left, (heading, values), color in zip(lefts, maps.items(), colors, strict=True):
            size = "" if by_class else f"  ({values.shape[2]} × {values.shape[1]})"
            look = {"weight": "bold", "size": 9.5, "color": color}
            put_text(figure, start + left, top - 0.23, f"{clean(heading)}{size}", **look)
            put_text(figure, start + left, top - 0.05, "heat map", **LABEL)
            put_text(figure, start + left + side + near, top - 0.05, "overlay", **LABEL)
    for i, (image, entry, *shown) in enumerate(zip(images, entries, *maps.values(), strict=True)):
        start, upper = margin + i % columns * column, top + i // columns * height
        ax = put_picture(figure, start, upper + text, side, image, box=entry.get("box"))
        if by_class:
            for left, (kind, color) in zip(lefts, KINDS.items(), strict=True):
                line = (entry[kind]["name"], f"{100 * entry[kind]['probability']:.1f} %", color)
                put_caption(figure, start + left, upper + 0.01, 2 * side + near, [line])
        else:
            put_row_title(ax, entry)
        for left, values in zip(lefts, shown, strict=True):
            for at, alone in ((start + left, True), (start + left + side + near, False)):
                put_heat_map(figure, at, upper + text, side, image, values, hide_picture=alone)
    put_heat_key(figure, margin, bottom, notes)
    return figure


def put_row_title(ax: Axes, entry: Mapping) -> None:
    """Write predicted and actual class with their probabilities on one line above `ax`."""
    pieces = []
    for kind, color in KINDS.items():
        name = fitted(entry[kind]["name"], 2.8, 8.5, "bold") + " "
        percent = f"{100 * entry[kind]['probability']:.1f} %      "
        pieces += [(f"{kind} ", MUTED, "normal"), (name, color, "bold"), (percent, color, "normal")]
    at, within, offset = (0, 1), "axes fraction", (0, 2)
    for text, color, weight in pieces:
        look = {"color": color, "weight": weight, "size": 8.5, "va": "bottom", "xycoords": within}
        # The next piece begins where this one ends, which only the drawing knows.
        within = ax.annotate(text, at, offset, textcoords="offset points", **look)
        at, offset = (1, 0), (0, 0)


def put_heat_map(
    figure: Figure, left: float, top: float, side: float, image: np.ndarray, values: np.ndarray,
    *, hide_picture: bool,
) -> None:  # fmt: skip
    """Draw a map (h, w) in 0..1, enlarged without steps, in place of the image or over it."""
    # Colours show over grey, and a veil that thickens with the heat leaves the rest to be seen.
    grey = np.repeat((image @ (0.299, 0.587, 0.114))[..., None], 3, axis=2).astype(np.uint8)
    ax = put_picture(figure, left, top, side, grey)
    opacity = 1.0 if hide_picture else 0.15 + 0.65 * values
    look = {"cmap": HEAT, "vmin": 0, "vmax": 1, "interpolation": "bilinear", "aspect": "auto"}
    ax.imshow(values, extent=ax.images[0].get_extent(), alpha=opacity, **look)
    if hide_picture and not values.any():
        look = {"ha": "center", "va": "center", "transform": ax.transAxes}
        ax.text(0.5, 0.5, "no evidence\nfor the class", color="white", size=7.5, **look)


def put_heat_key(figure: Figure, left: float, top: float, notes: str) -> None:
    """Draw the colour scale of the maps, and say how they may be read."""
    put_picture(figure, left, top + 0.16, 1.2, cmap=HEAT, **RAMP)
    put_text(figure, left, top + 0.43, "lowest", color=MUTED, size=7.5)
    put_text(figure, left + 1.2, top + 0.43, "highest", color=MUTED, size=7.5, ha="right")
    put_text(figure, left + 1.45, top + 0.15, notes, va="top", linespacing=1.45, **NOTE)
