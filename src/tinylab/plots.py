"""Every figure of the project. Functions take arrays, dicts and strings and return a matplotlib `Figure`.

Nothing here touches pyplot or global settings, so no figure lingers in memory and nobody else's style changes. As the
last value of a notebook's cell a figure shows itself. Class names are foreign text: they are never read as formulas,
lose characters that cannot be printed, and are cut to fit.
"""

import io
import math
import os
import textwrap
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.textpath import TextPath
from matplotlib.ticker import MaxNLocator

WIDTH = 9.0  # inches; at the 100 dpi of a notebook as many pixels as a README column on GitHub has
FONT = "DejaVu Sans"  # comes with matplotlib: the same picture on every machine
INK, MUTED, EDGE, GRID = "#1f2328", "#656d76", "#afb8c1", "#e4e7eb"
BLUE, VERMILION = "#0072b2", "#c2410c"  # stay apart for colour-blind eyes and in grey
KINDS = {"predicted": VERMILION, "actual": BLUE}
HEAT = "inferno"  # its lightness rises evenly, unlike that of the customary jet

STYLE = {
    "figure.dpi": 100,
    "figure.facecolor": "white",
    "font.family": FONT,
    "font.size": 9,
    "text.color": INK,
    "text.parse_math": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titlecolor": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": EDGE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
}


class SelfShowing(Figure):
    """A figure that a notebook shows without pyplot, whose inline backend is what shows figures otherwise."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        _write(self, buffer, self.dpi)
        return buffer.getvalue()


def save(figure: Figure, path: Path | str, dpi: int = 100) -> Path:
    """Writes a PNG, whole or not at all, its bytes given by the picture alone. Makes folders, returns the path.

    Raises `OSError` where the file cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        _write(figure, temporary, dpi)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def accuracy_and_loss(
    history: Sequence[Mapping], reference: Sequence[Mapping] | None = None, title: str = "", label: str = "this run"
) -> Figure:
    """Loss (left) and top-1 accuracy (right) per epoch, of training (above) and test images (below).

    `history`: one mapping per epoch with `epoch` (from 1), `train_loss`, `test_loss` (mean cross-entropy, nats),
    `train_top1`, `test_top1` (percent). `reference`: the rows of results/reference/published_run.csv, numbers or
    strings, drawn dashed as "published, 200 classes". What it prints as test loss is the sum of its 129 batch means
    over 33,000 images, so 33000 / 129 times that is the mean cross-entropy (within 0.013: it prints four decimals). Of
    its training loss it kept only each epoch's last batch, which is noisier than the epoch's mean.
    """
    published = "published,\n200 classes"
    panels = [
        ("Training loss", "train_loss", "last_batch_loss", "published,\nlast batch", 1.0, ""),
        ("Training accuracy (top-1, %)", "train_top1", "train_accuracy_pct", published, 1.0, " %"),
        ("Test loss", "test_loss", "test_loss_as_printed", published, 33_000 / 129, ""),
        ("Test accuracy (top-1, %)", "test_top1", "test_accuracy_pct", published, 1.0, " %"),
    ]
    if not history:
        return message("No epoch is finished yet: nothing to draw.")
    with _style():
        figure = _figure(5.6, title)
        axes = _subplots(figure, 2, 2, sharex=True, sharey="col")
        for ax, (name, key, reference_key, reference_label, factor, _) in zip(axes, panels, strict=True):
            ax.set_title(name)
            if reference:
                values = [factor * value for value in _column(reference, reference_key)]
                _line(ax, _column(reference, "epoch"), values, reference_label, MUTED, dashed=True)
            _line(ax, _column(history, "epoch"), _column(history, key), clean(label, 16), BLUE)
        _whole_numbers(axes[0])
        axes[2].set_xlabel("epoch")
        axes[3].set_xlabel("epoch")
        _from_zero(axes[0::2])
        _from_zero(axes[1::2])
        for ax, panel in zip(axes, panels, strict=True):
            _label_ends(ax, unit=panel[-1])
    return figure


def learning_rate_curve(
    learning_rates: Sequence[float], momenta: Sequence[float] | None = None, steps_per_epoch: int | None = None
) -> Figure:
    """Learning rate, and momentum below it if given, at every optimiser step; the x axis counts epochs if it can."""
    curves = [("Learning rate", learning_rates)] + ([("Momentum", momenta)] if momenta is not None else [])
    if not len(learning_rates):
        return message("The schedule has no steps: nothing to draw.")
    with _style():
        figure = _figure(0.5 + 2.0 * len(curves))
        axes = _subplots(figure, len(curves), sharex=True)
        for ax, (name, values) in zip(axes, curves, strict=True):
            x = np.arange(len(values)) / (steps_per_epoch or 1)
            ax.plot(x, values, color=BLUE)
            ax.set_title(name)
            ax.margins(x=0.08, y=0.2)
            # Start, turning point and end say it all; a set, because short or constant schedules have fewer of them.
            turn = int(np.argmax(np.abs(np.asarray(values) - values[0])))
            for step in {0, turn, len(values) - 1}:
                ax.plot(x[step], values[step], "o", color=BLUE, markersize=4)
                offset = (0, -13) if values[step] < np.mean(values) else (0, 6)
                _note(ax, f"{values[step]:.4g}", (x[step], values[step]), offset, BLUE, "center")
        _whole_numbers(axes[-1])
        axes[-1].set_xlabel("epoch" if steps_per_epoch else "step")
    return figure


def image_grid(
    images: np.ndarray, titles: Sequence[str], boxes: np.ndarray | None = None, columns: int = 8, title: str = ""
) -> Figure:
    """Images, uint8 (n, h, w, 3), enlarged without smoothing, each with a title and perhaps a box.

    `boxes` is (n, 4): x0 y0 x1 y1, inclusive.
    """
    if not len(images):
        return message("No images to show.")
    margin, gap = 0.08, 0.1
    side = (WIDTH - 2 * margin + gap) / columns - gap
    with _style():
        captions = [_wrapped(name, side, 8) for name in titles]
        text = 0.36 if any("\n" in caption for caption in captions) else 0.24
        rows, top = math.ceil(len(images) / columns), _title_height(title)
        figure = _canvas(top + rows * (text + side + gap), title)
        for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
            left, upper = margin + i % columns * (side + gap), top + i // columns * (text + side + gap) + text
            _text(figure, left, upper - 0.05, caption, size=8, va="bottom")
            ax = _picture(figure, left, upper, side, image)
            if boxes is not None:
                _draw_box(ax, boxes[i])
    return figure


def before_after(
    before: np.ndarray, after: np.ndarray, titles: Sequence[str], columns: int = 8, title: str = ""
) -> Figure:
    """The same images, uint8 (n, h, w, 3), before and after augmentation: blocks of two rows, one above the other."""
    if not len(before):
        return message("No images to show.")
    margin, gap, labels, between = 0.08, 0.06, 0.52, 0.14
    side = (WIDTH - 2 * margin - labels + gap) / columns - gap
    with _style():
        captions = [_wrapped(name, side, 8) for name in titles]
        text = 0.36 if any("\n" in caption for caption in captions) else 0.24
        blocks, top, height = math.ceil(len(before) / columns), _title_height(title), text + 2 * side + gap + between
        figure = _canvas(top + blocks * height, title)
        for block in range(blocks):
            upper = top + block * height + text
            _text(figure, margin, upper + side / 2, "before", color=MUTED, va="center")
            _text(figure, margin, upper + side * 1.5 + gap, "after", color=MUTED, va="center")
        for i, (image, changed, caption) in enumerate(zip(before, after, captions, strict=True)):
            left, upper = margin + labels + i % columns * (side + gap), top + i // columns * height + text
            _text(figure, left, upper - 0.05, caption, size=8, va="bottom")
            _picture(figure, left, upper, side, image)
            _picture(figure, left, upper + side + gap, side, changed)
    return figure


def class_accuracy(
    names: Sequence[str], accuracies: Sequence[float], counts: Sequence[int], best: int = 10, worst: int = 10
) -> Figure:
    """The best and the worst classes (all of them if they are few) as bars, with the mean over all classes.

    `accuracies` in percent, `counts` test images of each class. The thin lines are 95 % intervals (Wilson 1927) for
    what more images of the class would show; they do not allow for having picked the extremes.
    """
    known = [i for i in np.argsort(-np.asarray(accuracies, float), kind="stable") if counts[i] > 0]
    if not known:
        return message("No class has test images: nothing to draw.")
    few = len(known) <= best + worst
    groups = [(known, BLUE)] if few else [(known[:best], BLUE), (known[len(known) - worst :], VERMILION)]
    heading = f"All {len(known)} classes" if few else f"The {best} best and the {worst} worst of {len(known)} classes"
    fewest, most = (f(counts[i] for i in known) for f in (min, max))
    images = f"{most:,}" if fewest == most else f"{fewest:,} to {most:,}"
    with _style():
        figure = _figure(1.0 + 0.2 * sum(len(group) + 1 for group, _ in groups), heading)
        (ax,) = _subplots(figure)
        places, labels, y = [], [], 0
        for group, color in groups:
            for i in group:
                low, high = _wilson(accuracies[i] / 100, counts[i])
                ax.barh(y, accuracies[i], height=0.68, color=color, alpha=0.85)
                ax.plot([low, high], [y, y], color=INK, linewidth=0.9)
                _note(ax, f"{accuracies[i]:.1f} %", (high, y), (5, 0), INK, "left", va="center", size=8.5)
                places.append(y)
                labels.append(_fitted(names[i], 2.2, 8.5))
                y += 1
            y += 1
        mean = float(np.mean([accuracies[i] for i in known]))
        ax.axvline(mean, color=MUTED, linewidth=1.0, linestyle=(0, (3, 2)), zorder=0)
        text, coordinates = f"mean of all classes {mean:.1f} %", ax.get_xaxis_transform()
        _note(ax, text, (mean, 1), (0, 3), MUTED, "center", xycoords=coordinates, size=8.5)
        ax.set_yticks(places, labels, parse_math=False)
        ax.tick_params(axis="y", length=0, labelcolor=INK)
        ax.grid(axis="y", visible=False)
        ax.set(xlim=(0, 108), ylim=(y - 1.4, -0.7), xticks=range(0, 101, 20))
        ax.set_xlabel(f"top-1 accuracy in % of {images} test images per class; thin lines: 95 % intervals")
    return figure


def misclassified(images: np.ndarray, entries: Sequence[Mapping], columns: int = 5, title: str = "") -> Figure:
    """A gallery of mistakes. `images` is uint8 (n, h, w, 3).

    An entry has `predicted` and `actual`, each with `name` and `probability` (0..1).
    """
    if not len(images):
        return message("No misclassified image: every answer was right.")
    margin, gap, text, size = 0.08, 0.22, 0.42, 8.5
    side = (WIDTH - 2 * margin + gap) / columns - gap
    rows, top = math.ceil(len(images) / columns), 0.42
    with _style():
        figure = _canvas(top + rows * (text + side + 0.12), title)
        _text(figure, WIDTH - margin - 0.55, 0.27, "predicted", size=size, color=VERMILION, weight="bold", ha="right")
        _text(figure, WIDTH - margin, 0.27, "actual", size=size, color=BLUE, weight="bold", ha="right")
        for i, (image, entry) in enumerate(zip(images, entries, strict=True)):
            left, upper = margin + i % columns * (side + gap), top + i // columns * (text + side + 0.12)
            for line, (kind, color) in enumerate(KINDS.items()):
                height = upper + 0.17 * (line + 1)
                percent = f"{100 * entry[kind]['probability']:.0f} %"
                name = _fitted(entry[kind]["name"], side - 0.4, size)
                _text(figure, left, height, name, size=size, color=color)
                _text(figure, left + side, height, percent, size=size, color=color, ha="right")
            _picture(figure, left, upper + text, side, image)
    return figure


def gradcam_stages(
    images: np.ndarray,
    maps: Mapping[str, np.ndarray],
    entries: Sequence[Mapping],
    title: str = "",
    method: str = "Grad-CAM",
) -> Figure:
    """One row per image: the image, then heat map and overlay of every stage, for the class the network predicted.

    `images` uint8 (n, h, w, 3); `maps` float32 (n, map height, map width) in 0..1 for each stage, at its own size;
    `entries` as for `misclassified`, and with `box` (x0 y0 x1 y1, inclusive) if the object is to be framed. `method`
    names the maps in the caption.
    """
    if not len(images):
        return message("No misclassified image: there is nothing to explain.")
    margin, near, far, text, below = 0.06, 0.03, 0.13, 0.27, 0.13
    side = (WIDTH - 2 * margin - len(maps) * (near + far)) / (1 + 2 * len(maps))
    top, row_height = _title_height(title) + 0.42, text + side + below
    lefts = [margin + side + far + i * (2 * side + near + far) for i in range(len(maps))]
    with _style():
        figure = _canvas(top + len(images) * row_height + 0.6, title)
        _text(figure, margin, top - 0.05, "image", color=MUTED, size=8.5)
        for left, (stage, values) in zip(lefts, maps.items(), strict=True):
            height, width = values.shape[1:]
            _text(figure, left, top - 0.23, f"{clean(stage)}  ({width} × {height})", weight="bold", size=9.5)
            _text(figure, left, top - 0.05, "heat map", color=MUTED, size=8.5)
            _text(figure, left + side + near, top - 0.05, "overlay", color=MUTED, size=8.5)
        for i, (image, entry) in enumerate(zip(images, entries, strict=True)):
            upper = top + i * row_height + text
            ax = _picture(figure, margin, upper, side, image)
            _row_title(ax, entry)
            if "box" in entry:
                _draw_box(ax, entry["box"])
            for left, values in zip(lefts, maps.values(), strict=True):
                _heat_map(_picture(figure, left, upper, side, image), values[i], hide_picture=True)
                _heat_map(_picture(figure, left + side + near, upper, side, image), values[i], hide_picture=False)
        _heat_key(figure, margin, top + len(images) * row_height, method)
    return figure


def message(text: str) -> Figure:
    """A figure that says why there is nothing to draw."""
    with _style():
        figure = _canvas(1.2)
        ax = figure.add_axes((0, 0, 1, 1))
        ax.set_axis_off()
        ax.text(0.5, 0.5, _fitted(text, WIDTH - 0.4, 11), size=11, color=MUTED, ha="center", va="center")
    return figure


def clean(text: str, limit: int = 60) -> str:
    """One line of at most `limit` characters: what cannot be printed becomes a space, what is cut off an ellipsis."""
    printable = "".join(character if character.isprintable() else " " for character in text)
    line = " ".join(printable.split()) or "(no name)"
    return line if len(line) <= limit else line[: limit - 1].rstrip() + "…"


def _fitted(text: str, inches: float, size: float, weight: str = "normal") -> str:
    """`clean` text, cut until it is at most `inches` wide."""
    line, font = clean(text, 200), FontProperties(family=FONT, weight=weight)

    def width(shown: str) -> float:
        path = TextPath((0, 0), shown, size=size, prop=font)
        return 1.05 * path.get_extents().width / 72  # on screen, glyphs are moved apart to whole pixels

    if width(line) <= inches:
        return line
    longest = bisect_right(range(len(line)), inches, key=lambda length: width(line[:length] + "…")) - 1
    return line[: max(longest, 0)].rstrip() + "…"


def _wrapped(text: str, inches: float, size: float) -> str:
    """`clean` text on one or two lines of at most `inches`."""
    lines = textwrap.wrap(clean(text), int(72 * inches / (0.6 * size)), max_lines=2, placeholder="…")
    return "\n".join(_fitted(line, inches, size) for line in lines)


@contextmanager
def _style() -> Iterator[None]:
    """The house style for what is made inside, whatever the settings around it; they come back unchanged."""
    with matplotlib.style.context(["default", STYLE]):
        yield


def _write(figure: Figure, target: Path | io.BytesIO, dpi: float) -> None:
    with _style():  # without the library's name in the file, which would change with its version
        figure.savefig(target, format="png", dpi=dpi, metadata={"Software": None})


def _figure(height: float, title: str = "") -> Figure:
    """A figure for axes, `height` in inches."""
    figure = SelfShowing(figsize=(WIDTH, height), layout="constrained")
    if title:
        figure.suptitle(_fitted(title, WIDTH - 0.2, 11.5, "bold"), x=0.008, ha="left", size=11.5, weight="bold")
    return figure


def _subplots(figure: Figure, rows: int = 1, columns: int = 1, **sharing: bool | str) -> np.ndarray:
    """A flat array of axes. Their ticks are made when the figure is drawn, outside the style, so they get it here."""
    axes = figure.subplots(rows, columns, squeeze=False, **sharing).ravel()
    for ax in axes:
        ax.tick_params(color=EDGE, labelcolor=MUTED, labelsize=8.5, labelfontfamily=FONT, length=3, width=0.8)
        ax.tick_params(grid_color=GRID, grid_linewidth=0.8)
    return axes


def _canvas(height: float, title: str = "") -> Figure:
    """A figure for pictures placed by hand, `height` in inches."""
    figure = SelfShowing(figsize=(WIDTH, height))
    if title:
        _text(figure, 0.08, 0.27, _fitted(title, WIDTH - 1.6, 11.5, "bold"), size=11.5, weight="bold")
    return figure


def _title_height(title: str) -> float:
    """Inches that `_canvas` needs above the pictures."""
    return 0.42 if title else 0.06


def _text(figure: Figure, left: float, top: float, text: str, va: str = "baseline", **style: object) -> None:
    """Text at `left`, `top` inches from the figure's upper left corner."""
    width, height = figure.get_size_inches()
    figure.text(left / width, 1 - top / height, text, va=va, **style)


def _picture(figure: Figure, left: float, top: float, side: float, image: np.ndarray) -> Axes:
    """A square image of `side` inches, `left` and `top` inches from the figure's upper left corner."""
    width, height = figure.get_size_inches()
    ax = figure.add_axes((left / width, 1 - (top + side) / height, side / width, side / height))
    ax.imshow(image, interpolation="nearest", aspect="auto")
    ax.set_axis_off()
    return ax


def _draw_box(ax: Axes, box: Sequence[int]) -> None:
    """A frame around the pixels x0 y0 x1 y1, both ends included: light on a dark edge, so it shows on any picture."""
    x0, y0, x1, y1 = (int(value) for value in box)
    frame = Rectangle((x0 - 0.5, y0 - 0.5), x1 - x0 + 1, y1 - y0 + 1, fill=False, edgecolor="white", linewidth=1.0)
    frame.set_path_effects([withStroke(linewidth=2.2, foreground="black", alpha=0.55)])
    ax.add_patch(frame)


def _heat_map(ax: Axes, values: np.ndarray, hide_picture: bool) -> None:
    """Lays a map (h, w) in 0..1 over the picture in `ax`, enlarged without steps: in its place, or as a veil."""
    (picture,) = ax.images
    # A veil that thickens with the heat leaves the rest of the picture to be seen.
    opacity = 1.0 if hide_picture else 0.3 + 0.5 * values
    look = {"cmap": HEAT, "vmin": 0, "vmax": 1, "alpha": opacity, "interpolation": "bilinear", "aspect": "auto"}
    ax.imshow(values, extent=picture.get_extent(), **look)
    if hide_picture and not values.any():
        place = {"ha": "center", "va": "center", "transform": ax.transAxes}
        ax.text(0.5, 0.5, "nothing speaks\nfor the class", color="white", size=7.5, **place)


def _heat_key(figure: Figure, left: float, top: float, method: str) -> None:
    """The colour scale of the maps, and how they may be read."""
    width, height = figure.get_size_inches()
    ax = figure.add_axes((left / width, 1 - (top + 0.28) / height, 1.2 / width, 0.12 / height))
    ax.imshow(np.linspace(0, 1, 256)[None], cmap=HEAT, aspect="auto")
    ax.set_axis_off()
    _text(figure, left, top + 0.43, "lowest", color=MUTED, size=7.5)
    _text(figure, left + 1.2, top + 0.43, "highest", color=MUTED, size=7.5, ha="right")
    notes = (
        f"{clean(method)} for the predicted class. Every map is scaled to itself: it shows where, never how much.\n"
        "Maps are computed at the size given above them and enlarged bilinearly; image pixels are left as they are."
    )
    _text(figure, left + 1.45, top + 0.15, notes, va="top", color=MUTED, size=8, linespacing=1.45)


def _row_title(ax: Axes, entry: Mapping) -> None:
    """Predicted and actual class with their probabilities, on one line from the upper left corner of `ax`."""
    pieces = []
    for kind, color in KINDS.items():
        name = _fitted(entry[kind]["name"], 2.8, 8.5, "bold")
        percent = f"{100 * entry[kind]['probability']:.1f} %"
        pieces += [(f"{kind} ", MUTED, "normal"), (f"{name} ", color, "bold"), (f"{percent}      ", color, "normal")]
    place, within, offset = (0, 1), "axes fraction", (0, 2)
    for text, color, weight in pieces:
        style = {"color": color, "weight": weight, "size": 8.5, "va": "bottom", "textcoords": "offset points"}
        # The next piece begins where this one ends, which only the drawing knows.
        within = ax.annotate(text, place, offset, xycoords=within, **style)
        place, offset = (1, 0), (0, 0)


def _column(rows: Sequence[Mapping], key: str) -> list[float]:
    """One column as numbers; what a row lacks is left out of the line."""
    return [float(row[key]) if row.get(key) not in (None, "") else math.nan for row in rows]


def _line(ax: Axes, x: list[float], y: list[float], label: str, color: str, dashed: bool = False) -> None:
    """A curve with a dot on its last value; `_label_ends` names it."""
    finite = [i for i, value in enumerate(y) if math.isfinite(value)]
    look = {"linestyle": (0, (3, 1.6)), "linewidth": 1.2} if dashed else {}
    ax.plot(x, y, label=label, color=color, marker="o", markersize=4, markevery=finite[-1:], **look)


def _whole_numbers(ax: Axes) -> None:
    """No ticks between two epochs or steps."""
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7, min_n_ticks=1))


def _from_zero(axes: Sequence[Axes]) -> None:
    """One height for all `axes`, from 0 to a little above their highest value; labels need it final."""
    values = np.concatenate([line.get_ydata() for ax in axes for line in ax.lines])
    highest = max(values[np.isfinite(values)], default=0)
    for ax in axes:
        ax.set_ylim(0, 1.06 * highest or 1)


def _label_ends(ax: Axes, unit: str) -> None:
    """Writes every line's name and last value beside its last point, pushed apart where two would overlap."""
    bottom, top = ax.get_ylim()
    ends = []
    for line in ax.lines:
        points = np.column_stack(line.get_data())
        points = points[np.isfinite(points).all(axis=1)]
        if len(points):
            x, y = points[-1]
            ends.append([(y - bottom) / (top - bottom), x, f"{line.get_label()}\n{y:.2f}{unit}", line.get_color()])
    ends.sort(key=lambda end: end[0])
    line_height = 12 / (72 * ax.figure.get_figheight() * ax.get_position().height)  # 12 points, as a share of the axes
    for lower, upper in [*pairwise(ends)] * 4:  # pushing one pair apart may close another
        needed = line_height * (2 + lower[2].count("\n") + upper[2].count("\n")) / 2
        overlap = needed - (upper[0] - lower[0])
        if overlap > 0 and upper[1] == lower[1]:
            lower[0] -= overlap / 2
            upper[0] += overlap / 2
    for height, x, text, color in ends:
        coordinates = ax.get_xaxis_transform()
        _note(ax, text, (x, height), (7, 0), color, "left", va="center", xycoords=coordinates, size=8.5)


def _note(ax: Axes, text: str, place: tuple, offset: tuple, color: str, ha: str, va: str = "baseline", **style) -> None:
    """Text `offset` points away from `place`, with a white edge that keeps it legible on top of lines."""
    note = ax.annotate(text, place, offset, textcoords="offset points", color=color, ha=ha, va=va, **style)
    note.set_path_effects([withStroke(linewidth=2.5, foreground="white")])


def _wilson(share: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a share of `count`, in percent (Wilson 1927)."""
    z = 1.96
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return 100 * (middle - half), 100 * (middle + half)
