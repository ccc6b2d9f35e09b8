"""Pages of images: samples, mistakes, heat maps."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from tinylab.figures.style import (
    BLUE,
    GRID,
    HEAT,
    INK,
    KINDS,
    MUTED,
    WIDTH,
    clean,
    fitted,
    message,
    new_canvas,
    put_box,
    put_caption,
    put_names_key,
    put_picture,
    put_ramp,
    put_text,
    styled,
    title_height,
    wrapped,
)


def image_grid(
    images: np.ndarray,
    titles: Sequence[str],
    boxes: np.ndarray | None = None,
    columns: int = 8,
    title: str = "",
) -> Figure:
    """Images, uint8 (n, h, w, 3), enlarged without smoothing, each with a title and perhaps a box.

    `boxes` is (n, 4): x0 y0 x1 y1, inclusive.
    """
    if not len(images):
        return message("No images to show.")
    margin, gap = 0.08, 0.1
    side = (WIDTH - 2 * margin + gap) / columns - gap
    with styled():
        captions = [wrapped(name, side, 8) for name in titles]
        text = 0.36 if any("\n" in caption for caption in captions) else 0.24
        rows, top = math.ceil(len(images) / columns), title_height(title)
        figure = new_canvas(top + rows * (text + side + gap), title)
        for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
            left, upper = (
                margin + i % columns * (side + gap),
                top + i // columns * (text + side + gap) + text,
            )
            put_text(figure, left, upper - 0.05, caption, size=8, va="bottom")
            ax = put_picture(figure, left, upper, side, image)
            if boxes is not None:
                put_box(ax, boxes[i])
    return figure


def before_after(
    before: np.ndarray, after: np.ndarray, titles: Sequence[str], columns: int = 8, title: str = ""
) -> Figure:
    """The same images, uint8 (n, h, w, 3), before and after augmentation: blocks of two rows, one
    above the other."""
    if not len(before):
        return message("No images to show.")
    margin, gap, labels, between = 0.08, 0.06, 0.52, 0.14
    side = (WIDTH - 2 * margin - labels + gap) / columns - gap
    with styled():
        captions = [wrapped(name, side, 8) for name in titles]
        text = 0.36 if any("\n" in caption for caption in captions) else 0.24
        blocks, top, height = (
            math.ceil(len(before) / columns),
            title_height(title),
            text + 2 * side + gap + between,
        )
        figure = new_canvas(top + blocks * height, title)
        for block in range(blocks):
            upper = top + block * height + text
            put_text(figure, margin, upper + side / 2, "before", color=MUTED, va="center")
            put_text(figure, margin, upper + side * 1.5 + gap, "after", color=MUTED, va="center")
        for i, (image, changed, caption) in enumerate(zip(before, after, captions, strict=True)):
            left, upper = (
                margin + labels + i % columns * (side + gap),
                top + i // columns * height + text,
            )
            put_text(figure, left, upper - 0.05, caption, size=8, va="bottom")
            put_picture(figure, left, upper, side, image)
            put_picture(figure, left, upper + side + gap, side, changed)
    return figure


def misclassified(
    images: np.ndarray, entries: Sequence[Mapping], columns: int = 5, title: str = ""
) -> Figure:
    """A gallery of mistakes. `images` is uint8 (n, h, w, 3).

    An entry has `predicted` and `actual`, each with `name` and `probability` (0..1).
    """
    if not len(images):
        return message("No misclassified image: every answer was right.")
    return gallery(images, entries, columns, title)


def gradcam_stages(
    images: np.ndarray,
    maps: Mapping[str, np.ndarray],
    entries: Sequence[Mapping],
    title: str = "",
    method: str = "Grad-CAM",
) -> Figure:
    """One row per image: the image, then heat map and overlay of every stage, for the class the
    network predicted.

    `images` uint8 (n, h, w, 3); `maps` float32 (n, map height, map width) in 0..1 for each stage,
    at its own size; `entries` as for `misclassified`, and with `box` (x0 y0 x1 y1, inclusive) if
    the object is to be framed. `method` names the maps in the caption.
    """
    if not len(images):
        return message("No misclassified image: there is nothing to explain.")
    margin, near, far, text, below = 0.06, 0.03, 0.13, 0.27, 0.13
    side = (WIDTH - 2 * margin - len(maps) * (near + far)) / (1 + 2 * len(maps))
    top, row_height = title_height(title) + 0.42, text + side + below
    lefts = [margin + side + far + i * (2 * side + near + far) for i in range(len(maps))]
    with styled():
        figure = new_canvas(top + len(images) * row_height + 0.6, title)
        put_text(figure, margin, top - 0.05, "image", color=MUTED, size=8.5)
        for left, (stage, values) in zip(lefts, maps.items(), strict=True):
            height, width = values.shape[1:]
            put_text(
                figure,
                left,
                top - 0.23,
                f"{clean(stage)}  ({width} × {height})",
                weight="bold",
                size=9.5,
            )
            put_text(figure, left, top - 0.05, "heat map", color=MUTED, size=8.5)
            put_text(figure, left + side + near, top - 0.05, "overlay", color=MUTED, size=8.5)
        for i, (image, entry) in enumerate(zip(images, entries, strict=True)):
            upper = top + i * row_height + text
            ax = put_picture(figure, margin, upper, side, image)
            put_row_title(ax, entry)
            if "box" in entry:
                put_box(ax, entry["box"])
            for left, values in zip(lefts, maps.values(), strict=True):
                put_heat_map(
                    put_picture(figure, left, upper, side, image), values[i], hide_picture=True
                )
                put_heat_map(
                    put_picture(figure, left + side + near, upper, side, image),
                    values[i],
                    hide_picture=False,
                )
        notes = (
            f"{clean(method)} for the predicted class. Every map is scaled to itself: it shows "
            "where, never how much.\n"
            "Maps are computed at the size given above them and enlarged bilinearly; image pixels "
            "are left as they are."
        )
        put_heat_key(figure, margin, top + len(images) * row_height, notes)
    return figure


def confident(
    images: np.ndarray, entries: Sequence[Mapping], title: str = "", columns: int = 5
) -> Figure:
    """A gallery like `misclassified`, uint8 (n, h, w, 3), of any answers: a right one bears its one
    name.

    An answer is right if `predicted` equals `actual`, so a `wnid` in both keeps classes of one name
    apart.
    """
    if not len(images):
        return message(f"{clean(title)}: there is none." if title else "There is no such answer.")
    return gallery(images, entries, columns, title)


def label_conflicts(
    images: np.ndarray, entries: Sequence[Mapping], columns: int = 5, most: int = 60
) -> Figure:
    """Identical images that bear different labels: each picture once, with both, for the first
    `most` pairs.

    `images` uint8 (n, h, w, 3), or (n, 2, h, w, 3), of which the first of two is shown. An entry
    has the two `names`, and may have `tested`: of each whether it is a test image.
    """
    if not len(images):
        return message("No two identical images bear different labels.")
    images = images[:most, 0] if images.ndim == 5 else images[:most]
    title = (
        f"{len(entries):,} pair{'' if len(entries) == 1 else 's'} of identical images with "
        "different labels"
    )
    title += "" if len(entries) <= most else f": the first {most}"
    captions = []
    for entry in entries[:most]:
        kinds = ["test" if tested else "not tested" for tested in entry.get("tested", ())] or [
            "",
            "",
        ]
        # A right answer to one of the two is a mistake for the other: neither has the colour of the
        # truth.
        captions.append(
            [(name, kind, INK) for name, kind in zip(entry["names"], kinds, strict=True)]
        )
    with styled():
        return captioned(images, captions, columns, title)


def class_maps(
    images: np.ndarray,
    predicted: np.ndarray,
    actual: np.ndarray,
    entries: Sequence[Mapping],
    method: str = "Grad-CAM",
    stage: str = "layer4",
    title: str = "",
) -> Figure:
    """Two images per row, each beside what spoke for the class that was predicted, and what spoke
    for the actual one.

    `images` uint8 (n, h, w, 3); `predicted` and `actual` float32 (n, map height, map width) in
    0..1; `entries` as for `gradcam_stages`.
    """
    if not len(images):
        return message("No misclassified image: there is nothing to explain.")
    margin, near, far, text, below, between, columns = 0.06, 0.03, 0.09, 0.23, 0.15, 0.26, 2
    column = (WIDTH - 2 * margin + between) / columns
    side = (column - between - 2 * near - 2 * far) / 5
    top, height = title_height(title) + 0.42, text + side + below
    bottom, lefts = (
        top + math.ceil(len(images) / columns) * height,
        (side + far, 3 * side + near + 2 * far),
    )
    with styled():
        figure = new_canvas(bottom + 0.6, title)
        for start in [margin + i * column for i in range(min(columns, len(images)))]:
            put_text(figure, start, top - 0.05, "image", color=MUTED, size=8.5)
            for left, (kind, color) in zip(lefts, KINDS.items(), strict=True):
                put_text(
                    figure,
                    start + left,
                    top - 0.23,
                    f"{kind} class",
                    weight="bold",
                    size=9.5,
                    color=color,
                )
                put_text(figure, start + left, top - 0.05, "heat map", color=MUTED, size=8.5)
                put_text(
                    figure, start + left + side + near, top - 0.05, "overlay", color=MUTED, size=8.5
                )
        for i, (image, entry, *both) in enumerate(
            zip(images, entries, predicted, actual, strict=True)
        ):
            start, upper = margin + i % columns * column, top + i // columns * height
            ax = put_picture(figure, start, upper + text, side, image)
            if "box" in entry:
                put_box(ax, entry["box"])
            for left, values, (kind, color) in zip(lefts, both, KINDS.items(), strict=True):
                name, percent = entry[kind]["name"], f"{100 * entry[kind]['probability']:.1f} %"
                put_caption(
                    figure, start + left, upper + 0.01, 2 * side + near, [(name, percent, color)]
                )
                for step, alone in ((0, True), (side + near, False)):
                    put_heat_map(
                        put_picture(figure, start + left + step, upper + text, side, image),
                        values,
                        alone,
                    )
        rows, width = predicted.shape[1:]
        which = "whatever the class" if np.array_equal(predicted, actual) else "for either class"
        notes = (
            f"{fitted(method, 1.4, 8)} of {fitted(stage, 0.7, 8)}, {which}. "
            "Every map is scaled to itself: it shows where, never how much.\n"
            f"Maps are computed at {width} × {rows} and enlarged bilinearly; image pixels are "
            "left as they are."
        )
        put_heat_key(figure, margin, bottom, notes)
    return figure


def prediction(
    image: np.ndarray, top: Sequence[Mapping], heat: np.ndarray | None, title: str = ""
) -> Figure:
    """One image, uint8 (h, w, 3), what spoke for the first answer, and the first answers as bars.

    `top` holds `name` and `probability` (0..1), best first; `heat` is a map (map height, map width)
    in 0..1.
    """
    if not top:
        return message("There is no answer to show.")
    margin, side, gap = 0.08, 2.56, 0.14
    upper = title_height(title) + 0.22
    bars = margin + (side + gap) * (1 if heat is None else 2) + 0.1
    room, step = WIDTH - margin - bars, side / max(len(top), 5)
    with styled():
        figure = new_canvas(upper + side + (0.34 if heat is None else 0.62), title)
        rows, columns = image.shape[:2]
        put_text(
            figure,
            margin,
            upper - 0.06,
            f"the image, {columns} × {rows} pixels",
            color=MUTED,
            size=8.5,
        )
        put_picture(figure, margin, upper, side, image)
        if heat is not None:
            left, spoke = margin + side + gap, "what spoke" if np.any(heat) else "nothing spoke"
            put_text(
                figure, left, upper - 0.06, f"{spoke} for the first answer", color=MUTED, size=8.5
            )
            put_heat_map(put_picture(figure, left, upper, side, image), heat, hide_picture=False)
        for i, entry in enumerate(top):
            upper_edge, percent = upper + i * step, f"{100 * entry['probability']:.1f} %"
            put_caption(
                figure, bars, upper_edge - 0.02, room, [(entry["name"], percent, INK)], size=9
            )
            for width, color in ((room, GRID), (room * entry["probability"], BLUE)):
                put_bar(figure, bars, upper_edge + 0.22, width, 0.1, color)
        notes = (
            "The answer is always one of the classes that the network has learned, whatever the "
            "picture shows."
        )
        if heat is None:
            put_text(figure, margin, upper + side + 0.22, notes, color=MUTED, size=8)
        else:
            size = f"{heat.shape[1]} × {heat.shape[0]}"
            scaled = (
                f"The map ({size}, enlarged bilinearly) is scaled to itself: it shows where, "
                "never how much."
            )
            put_heat_key(figure, margin, upper + side, f"{scaled}\n{notes}")
    return figure


def put_heat_map(ax: Axes, values: np.ndarray, hide_picture: bool) -> None:
    """Lays a map (h, w) in 0..1 over the picture in `ax`, enlarged without steps: in its place, or
    as a veil."""
    (picture,) = ax.images
    # A veil that thickens with the heat leaves the rest of the picture to be seen.
    opacity = 1.0 if hide_picture else 0.3 + 0.5 * values
    look = {
        "cmap": HEAT,
        "vmin": 0,
        "vmax": 1,
        "alpha": opacity,
        "interpolation": "bilinear",
        "aspect": "auto",
    }
    ax.imshow(values, extent=picture.get_extent(), **look)
    if hide_picture and not values.any():
        compute = {"ha": "center", "va": "center", "transform": ax.transAxes}
        ax.text(0.5, 0.5, "nothing speaks\nfor the class", color="white", size=7.5, **compute)


def put_heat_key(figure: Figure, left: float, top: float, notes: str) -> None:
    """The colour scale of the maps, and how they may be read."""
    put_ramp(figure, left, top + 0.16, 1.2, HEAT)
    put_text(figure, left, top + 0.43, "lowest", color=MUTED, size=7.5)
    put_text(figure, left + 1.2, top + 0.43, "highest", color=MUTED, size=7.5, ha="right")
    put_text(
        figure, left + 1.45, top + 0.15, notes, va="top", color=MUTED, size=8, linespacing=1.45
    )


def put_bar(
    figure: Figure, left: float, top: float, width: float, height: float, color: str
) -> None:
    """A filled rectangle, in inches from the figure's upper left corner."""
    across, down = figure.get_size_inches()
    compute, size = (left / across, 1 - (top + height) / down), (width / across, height / down)
    figure.add_artist(
        Rectangle(compute, *size, facecolor=color, linewidth=0, transform=figure.transFigure)
    )


def gallery(images: np.ndarray, entries: Sequence[Mapping], columns: int, title: str) -> Figure:
    """Images under the class that was predicted and, if that was wrong, the actual one."""
    captions, right = [], False
    for entry in entries:
        kinds = {"predicted": INK} if entry["predicted"] == entry["actual"] else KINDS
        right |= kinds is not KINDS
        percents = {kind: f"{100 * entry[kind]['probability']:.0f} %" for kind in kinds}
        captions.append(
            [(entry[kind]["name"], percents[kind], color) for kind, color in kinds.items()]
        )
    wrong = any(len(caption) > 1 for caption in captions)
    with styled():
        figure = captioned(images, captions, columns, title)
        put_names_key(figure, (KINDS if wrong else {}) | ({"right answer": INK} if right else {}))
    return figure


def captioned(
    images: np.ndarray, captions: Sequence[Sequence[tuple]], columns: int, title: str
) -> Figure:
    """Rows of images, each below its lines (see `put_caption`)."""
    margin, gap, text = 0.08, 0.22, 0.08 + 0.17 * max(map(len, captions))
    side = (WIDTH - 2 * margin + gap) / columns - gap
    rows, top = math.ceil(len(images) / columns), 0.42
    figure = new_canvas(top + rows * (text + side + 0.12), title)
    for i, (image, lines) in enumerate(zip(images, captions, strict=True)):
        left, upper = margin + i % columns * (side + gap), top + i // columns * (text + side + 0.12)
        put_caption(figure, left, upper, side, lines)
        put_picture(figure, left, upper + text, side, image)
    return figure


def put_row_title(ax: Axes, entry: Mapping) -> None:
    """Predicted and actual class with their probabilities, on one line from the upper left corner
    of `ax`."""
    pieces = []
    for kind, color in KINDS.items():
        name = fitted(entry[kind]["name"], 2.8, 8.5, "bold")
        percent = f"{100 * entry[kind]['probability']:.1f} %"
        pieces += [
            (f"{kind} ", MUTED, "normal"),
            (f"{name} ", color, "bold"),
            (f"{percent}      ", color, "normal"),
        ]
    compute, within, offset = (0, 1), "axes fraction", (0, 2)
    for text, color, weight in pieces:
        style = {
            "color": color,
            "weight": weight,
            "size": 8.5,
            "va": "bottom",
            "textcoords": "offset points",
        }
        # The next piece begins where this one ends, which only the drawing knows.
        within = ax.annotate(text, compute, offset, xycoords=within, **style)
        compute, offset = (1, 0), (0, 0)
