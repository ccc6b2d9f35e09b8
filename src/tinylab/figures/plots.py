"""Every figure of the project. Functions take arrays, dicts and strings and return a matplotlib
`Figure`.

Nothing here touches pyplot or global settings, so no figure lingers in memory and nobody else's
style changes. As the last value of a notebook's cell a figure shows itself. Class names are foreign
text: they are never read as formulas, lose characters that cannot be printed, and are cut to fit.
"""

import io
import math
import os
import textwrap
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, LinearSegmentedColormap, Normalize, PowerNorm
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.textpath import TextPath
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

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
    """A figure that a notebook shows without pyplot, whose inline backend is what shows figures
    otherwise."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        _write(self, buffer, self.dpi)
        return buffer.getvalue()


def save(figure: Figure, path: Path | str, dpi: int = 100) -> Path:
    """Writes a PNG, whole or not at all, its bytes given by the picture alone. Makes folders,
    returns the path.

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
    history: Sequence[Mapping],
    reference: Sequence[Mapping] | None = None,
    title: str = "",
    label: str = "this run",
) -> Figure:
    """Loss (left) and top-1 accuracy (right) per epoch, of training (above) and test images
    (below).

    `history`: one mapping per epoch with `epoch` (from 1), `train_loss`, `test_loss` (mean
    cross-entropy, nats), `train_top1`, `test_top1` (percent). `reference`: the rows of
    results/reference/published_run.csv, numbers or strings, drawn dashed as "published, 200
    classes". What it prints as test loss is the sum of its 129 batch means over 33,000 images, so
    33000 / 129 times that is the mean cross-entropy (within 0.013: it prints four decimals). Of its
    training loss it kept only each epoch's last batch, which is noisier than the epoch's mean.
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
        for ax, (name, key, reference_key, reference_label, factor, _) in zip(
            axes, panels, strict=True
        ):
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
    learning_rates: Sequence[float],
    momenta: Sequence[float] | None = None,
    steps_per_epoch: int | None = None,
) -> Figure:
    """Learning rate, and momentum below it if given, at every optimiser step; the x axis counts
    epochs if it can."""
    curves = [("Learning rate", learning_rates)] + (
        [("Momentum", momenta)] if momenta is not None else []
    )
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
            # Start, turning point and end say it all; a set, because short or constant schedules
            # have fewer of them.
            turn = int(np.argmax(np.abs(np.asarray(values) - values[0])))
            for step in {0, turn, len(values) - 1}:
                ax.plot(x[step], values[step], "o", color=BLUE, markersize=4)
                offset = (0, -13) if values[step] < np.mean(values) else (0, 6)
                _note(ax, f"{values[step]:.4g}", (x[step], values[step]), offset, BLUE, "center")
        _whole_numbers(axes[-1])
        axes[-1].set_xlabel("epoch" if steps_per_epoch else "step")
    return figure


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
    with _style():
        captions = [_wrapped(name, side, 8) for name in titles]
        text = 0.36 if any("\n" in caption for caption in captions) else 0.24
        rows, top = math.ceil(len(images) / columns), _title_height(title)
        figure = _canvas(top + rows * (text + side + gap), title)
        for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
            left, upper = (
                margin + i % columns * (side + gap),
                top + i // columns * (text + side + gap) + text,
            )
            _text(figure, left, upper - 0.05, caption, size=8, va="bottom")
            ax = _picture(figure, left, upper, side, image)
            if boxes is not None:
                _draw_box(ax, boxes[i])
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
    with _style():
        captions = [_wrapped(name, side, 8) for name in titles]
        text = 0.36 if any("\n" in caption for caption in captions) else 0.24
        blocks, top, height = (
            math.ceil(len(before) / columns),
            _title_height(title),
            text + 2 * side + gap + between,
        )
        figure = _canvas(top + blocks * height, title)
        for block in range(blocks):
            upper = top + block * height + text
            _text(figure, margin, upper + side / 2, "before", color=MUTED, va="center")
            _text(figure, margin, upper + side * 1.5 + gap, "after", color=MUTED, va="center")
        for i, (image, changed, caption) in enumerate(zip(before, after, captions, strict=True)):
            left, upper = (
                margin + labels + i % columns * (side + gap),
                top + i // columns * height + text,
            )
            _text(figure, left, upper - 0.05, caption, size=8, va="bottom")
            _picture(figure, left, upper, side, image)
            _picture(figure, left, upper + side + gap, side, changed)
    return figure


def class_accuracy(
    names: Sequence[str],
    accuracies: Sequence[float],
    counts: Sequence[int],
    best: int = 10,
    worst: int = 10,
) -> Figure:
    """The best and the worst classes (all of them if they are few) as bars, with the mean over all
    classes.

    `accuracies` in percent, `counts` test images of each class. The thin lines are 95 % intervals
    (Wilson 1927) for what more images of the class would show; they do not allow for having picked
    the extremes.
    """
    known = [i for i in np.argsort(-np.asarray(accuracies, float), kind="stable") if counts[i] > 0]
    if not known:
        return message("No class has test images: nothing to draw.")
    few = len(known) <= best + worst
    groups = (
        [(known, BLUE)] if few else [(known[:best], BLUE), (known[len(known) - worst :], VERMILION)]
    )
    heading = (
        f"All {len(known)} classes"
        if few
        else f"The {best} best and the {worst} worst of {len(known)} classes"
    )
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
                _note(
                    ax,
                    f"{accuracies[i]:.1f} %",
                    (high, y),
                    (5, 0),
                    INK,
                    "left",
                    va="center",
                    size=8.5,
                )
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
        ax.set_xlabel(
            f"top-1 accuracy in % of {images} test images per class; thin lines: 95 % intervals"
        )
    return figure


def misclassified(
    images: np.ndarray, entries: Sequence[Mapping], columns: int = 5, title: str = ""
) -> Figure:
    """A gallery of mistakes. `images` is uint8 (n, h, w, 3).

    An entry has `predicted` and `actual`, each with `name` and `probability` (0..1).
    """
    if not len(images):
        return message("No misclassified image: every answer was right.")
    return _gallery(images, entries, columns, title)


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
    top, row_height = _title_height(title) + 0.42, text + side + below
    lefts = [margin + side + far + i * (2 * side + near + far) for i in range(len(maps))]
    with _style():
        figure = _canvas(top + len(images) * row_height + 0.6, title)
        _text(figure, margin, top - 0.05, "image", color=MUTED, size=8.5)
        for left, (stage, values) in zip(lefts, maps.items(), strict=True):
            height, width = values.shape[1:]
            _text(
                figure,
                left,
                top - 0.23,
                f"{clean(stage)}  ({width} × {height})",
                weight="bold",
                size=9.5,
            )
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
                _heat_map(
                    _picture(figure, left + side + near, upper, side, image),
                    values[i],
                    hide_picture=False,
                )
        notes = (
            f"{clean(method)} for the predicted class. Every map is scaled to itself: it shows where, never how much.\n"
            "Maps are computed at the size given above them and enlarged bilinearly; image pixels are left as they are."
        )
        _heat_key(figure, margin, top + len(images) * row_height, notes)
    return figure


def confusion(matrix: np.ndarray, names: Sequence[str], order: Sequence[int]) -> Figure:
    """How often images of each class (rows) were answered by each class (columns), in percent of
    the row.

    `matrix` holds counts, integer (C, C); `order` (C,) is that of the classes on both axes: blocks
    show if it places classes that are confused with each other side by side. Right answers, on the
    diagonal, have a scale of their own, or the mistakes would drown. Up to 30 classes are all
    named; of more, those that are most often taken for one other.
    """
    if not np.sum(matrix):
        return message("No class has test images: nothing to draw.")
    matrix, names = matrix[np.ix_(order, order)], [names[i] for i in order]
    images, classes = matrix.sum(axis=1), len(matrix)
    shares = np.where(images[:, None] > 0, 100 * matrix / np.maximum(images, 1)[:, None], np.nan)
    worst = np.where(np.eye(classes) + (images == 0)[:, None], 0, shares).max(axis=1)
    every, highest = classes <= 30, float(worst.max(initial=0))
    right = f"{100 * np.trace(matrix) / matrix.sum():.1f} % of {matrix.sum():,} answers are right"
    with _style():
        size, room = (8.5, 1.8) if every else (7.5, 1.5)
        widest = max(_inches(_fitted(name, room, size), size) for name in names) if every else room
        left, top, below = 0.4 + max(widest, 0.4), 1.0, 0.4 + (0.75 * widest if every else 0)
        cell = (
            max(min(math.floor(100 * (WIDTH - left - 0.12) / classes), 60), 1) / 100
        )  # whole pixels: no uneven cells
        side, named = (
            cell * classes,
            range(classes) if every else _apart(worst, math.ceil(0.12 / cell)),
        )
        bottom = top + side + below
        figure = _canvas(
            math.ceil(100 * bottom + 44) / 100,
            f"{classes} class{'' if classes == 1 else 'es'}: {right}",
        )
        _cells(figure, left, top, cell, shares, _share_scales(figure, left, highest, even=every))
        for i in named:
            middle, label = (i + 0.5) * cell, _fitted(names[i], room, size)
            _text(
                figure,
                left - 0.05,
                top + middle,
                label,
                size=size,
                ha="right",
                va="center_baseline",
            )
            if every:
                slanted = {"rotation": 45, "rotation_mode": "anchor", "ha": "right", "va": "center"}
                _text(figure, left + middle, top + side + 0.09, label, size=size, **slanted)
        axis = {"color": MUTED, "ha": "center", "va": "center"}
        _text(figure, 0.14, top + side / 2, "actual class", rotation=90, **axis)
        _text(figure, left + side / 2, bottom - 0.18, "predicted class", **axis)
        notes = "Same order on both axes: a block on the diagonal is a group of classes that are taken for each other."
        if not every:
            notes += "\nNamed are the classes that are most often taken for one other, as far as there is room."
        if not images.all():
            notes += f"{' ' if not every else chr(10)}White rows: no test images."
        _text(figure, 0.08, bottom + 0.02, notes, va="top", color=MUTED, size=8, linespacing=1.45)
    return figure


def confused_pairs(
    pairs: Sequence[Mapping], thumbnails: Sequence[tuple[np.ndarray, np.ndarray]], title: str = ""
) -> Figure:
    """Pairs of classes that are taken for each other, with up to three images of either mistake.

    A pair has `one` and `other`, each with `name` and `images` (tested), and the counts
    `one_as_other`, `other_as_one` and `count`, their sum. Its thumbnails are uint8 (k, h, w, 3) of
    images of `one` that were predicted as `other`, and of the reverse.
    """
    if not pairs:
        return message("No class was taken for another: there is no confused pair.")
    margin, gutter, side, near, far, text, columns = 0.08, 0.32, 0.64, 0.02, 0.1, 0.4, 2
    half = 3 * side + 2 * near
    column, height = (WIDTH - 2 * margin + 0.16) / columns, text + side + 0.2
    heading = title or "Classes that are taken for each other most often"
    top = _title_height(heading)
    with _style():
        figure = _canvas(top + math.ceil(len(pairs) / columns) * height + 0.24, heading)
        _names_key(figure, KINDS)
        for i, (pair, pictures) in enumerate(zip(pairs, thumbnails, strict=True)):
            left, upper = margin + i % columns * column, top + i // columns * height
            total = str(pair["count"])
            _text(figure, left, upper + 0.34, total, size=min(10, 28 / len(total)), weight="bold")
            ways = (("one", "other", "one_as_other"), ("other", "one", "other_as_one"))
            for way, ((actual, predicted, key), shown) in enumerate(
                zip(ways, pictures, strict=True)
            ):
                start = left + gutter + way * (half + far)
                answer = (pair[predicted]["name"], f"{pair[key]:,}", VERMILION)
                _caption(
                    figure,
                    start,
                    upper,
                    half,
                    [answer, (pair[actual]["name"], f"of {pair[actual]['images']:,}", BLUE)],
                )
                for j, image in enumerate(shown[:3]):
                    _picture(figure, start + j * (side + near), upper + text, side, image)
                if not len(shown):
                    none = "no picture" if pair[key] else "never"
                    _text(
                        figure,
                        start,
                        upper + text + side / 2,
                        none,
                        color=MUTED,
                        size=8,
                        va="center",
                    )
        notes = "Bold: test images of either class that were taken for the other. Beneath: up to three of them each way."
        _text(figure, margin, figure.get_figheight() - 0.1, notes, color=MUTED, size=8)
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
    return _gallery(images, entries, columns, title)


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
    title = f"{len(entries):,} pair{'' if len(entries) == 1 else 's'} of identical images with different labels"
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
    with _style():
        return _captioned(images, captions, columns, title)


def reliability(calibration: Mapping) -> Figure:
    """Accuracy against confidence, as trained and after temperature scaling, with the number of
    answers below.

    `calibration` has `bins` (equal parts of 0..1), `temperature`, perhaps a `note`, and `before`
    and `after`, each with `ece`, `mean_confidence`, `accuracy_overall` (0..1), and for each bin
    `confidence`, `accuracy` (0..1, None if it is empty) and `count`. The thin lines are 95 %
    intervals (Wilson 1927).
    """
    if not sum(calibration["before"]["count"]):
        return message("No test images: nothing to draw.")
    titles = {
        "before": "As trained",
        "after": f"After temperature scaling (T = {calibration['temperature']:.2f})",
    }
    with _style():
        figure = _figure(5.6, "When the network is sure, is it right?")
        axes = _subplots(figure, 2, 2, sharex=True, sharey="row", height_ratios=(3, 1))
        for (key, name), ax, below in zip(titles.items(), axes[:2], axes[2:], strict=True):
            _calibrated(ax, below, calibration[key], calibration["bins"])
            ax.set_title(f"{name}: ECE {100 * calibration[key]['ece']:.1f} %")
        axes[0].set_ylabel("accuracy in %")
        axes[2].set_ylabel("answers")
        note = _fitted(calibration["note"], WIDTH - 0.4, 8) if calibration.get("note") else ""
        _footnote(
            figure,
            "ECE, the expected calibration error, is how far the dots are from the dashed line, on average over the "
            "answers.\nEach half of the answers was scaled by the temperature that fits the other half best; T is the "
            f"mean of both.\n{note[:1].upper()}{note[1:]}",
        )
    return figure


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
    top, height = _title_height(title) + 0.42, text + side + below
    bottom, lefts = (
        top + math.ceil(len(images) / columns) * height,
        (side + far, 3 * side + near + 2 * far),
    )
    with _style():
        figure = _canvas(bottom + 0.6, title)
        for start in [margin + i * column for i in range(min(columns, len(images)))]:
            _text(figure, start, top - 0.05, "image", color=MUTED, size=8.5)
            for left, (kind, color) in zip(lefts, KINDS.items(), strict=True):
                _text(
                    figure,
                    start + left,
                    top - 0.23,
                    f"{kind} class",
                    weight="bold",
                    size=9.5,
                    color=color,
                )
                _text(figure, start + left, top - 0.05, "heat map", color=MUTED, size=8.5)
                _text(
                    figure, start + left + side + near, top - 0.05, "overlay", color=MUTED, size=8.5
                )
        for i, (image, entry, *both) in enumerate(
            zip(images, entries, predicted, actual, strict=True)
        ):
            start, upper = margin + i % columns * column, top + i // columns * height
            ax = _picture(figure, start, upper + text, side, image)
            if "box" in entry:
                _draw_box(ax, entry["box"])
            for left, values, (kind, color) in zip(lefts, both, KINDS.items(), strict=True):
                name, percent = entry[kind]["name"], f"{100 * entry[kind]['probability']:.1f} %"
                _caption(
                    figure, start + left, upper + 0.01, 2 * side + near, [(name, percent, color)]
                )
                for step, alone in ((0, True), (side + near, False)):
                    _heat_map(
                        _picture(figure, start + left + step, upper + text, side, image),
                        values,
                        alone,
                    )
        rows, width = predicted.shape[1:]
        which = "whatever the class" if np.array_equal(predicted, actual) else "for either class"
        notes = (
            f"{_fitted(method, 1.4, 8)} of {_fitted(stage, 0.7, 8)}, {which}. "
            "Every map is scaled to itself: it shows where, never how much.\n"
            f"Maps are computed at {width} × {rows} and enlarged bilinearly; image pixels are left as they are."
        )
        _heat_key(figure, margin, bottom, notes)
    return figure


def localisation(summary: Mapping) -> Figure:
    """Do the maps look at the object? Both measures for each group of images, with 95 % intervals
    and baselines.

    `summary` has `method`, `stage`, `native_size` (h, w) and `groups`. A group has `boxes` ("all"
    or "below half" of the image), `answers` ("all", "right", "wrong"), `class` ("predicted",
    "actual", "both"), `images`, and the shares `hit`, `energy`, `centre_hit`, `uniform`,
    `hit_minus_centre`, `energy_minus_uniform`: `mean`, `low` and `high`, None if unknown.
    """
    if not any(group["images"] for group in summary["groups"]):
        return message("No image was scored: nothing to draw.")
    rows, width = summary["native_size"]
    maps = f"{clean(summary['method'], 24)}, {clean(summary['stage'], 24)} ({width} × {rows})"
    sets = {"all": "all boxes", "below half": "boxes below half of the image"}
    measures = {
        "hit": (
            "Highest point in the box",
            {"centre_hit": "D", "uniform": "|"},
            "hit_minus_centre",
            "minus centre",
        ),
        "energy": (
            "Share of the map in the box",
            {"uniform": "|"},
            "energy_minus_uniform",
            "minus even map",
        ),
    }
    with _style():
        figure = _figure(5.6, f"Do the maps look at the object? {maps}")
        axes = _subplots(figure, 2, 2, sharex=True).reshape(2, 2)
        for row, (boxes, which) in zip(axes, sets.items(), strict=True):
            groups = [group for group in summary["groups"] if group["boxes"] == boxes]
            for ax, (key, (name, baselines, difference, against)) in zip(
                row, measures.items(), strict=True
            ):
                ax.set_title(name, pad=18)
                _note(ax, which, (0, 1), (0, 5), MUTED, "left", xycoords="axes fraction", size=8.5)
                _estimates(ax, groups, key, baselines, difference, against)
            _group_labels(row[0], groups)
        axes[1, 0].set_xlabel("images in %")
        axes[1, 1].set_xlabel("mean share of the map in %")
        _footnote(
            figure,
            "Dots: the maps. Diamonds: the centre of the image as the point. Bars: a map that is the same everywhere. "
            "On the right: the difference, in points; at 0 the maps are no better. Lines and brackets: 95 % intervals.",
        )
    return figure


def faithfulness(result: Mapping) -> Figure:
    """ROAD (Rong et al. 2022): how the answer's probability changes when pixels are removed in the
    order of the map.

    `result` has `images`, `method`, `stage`, `percentiles` (of the map's values, as the library has
    them: at 80 the first 20 % of the pixels are removed), `map` and `random`, each with the mean
    changes `most_relevant_first` and `least_relevant_first` for every percentile (-1..1, None if
    unknown), and `combined`, `random_combined` and `difference`: `mean`, `low` and `high`.
    """
    if not result["images"] or not len(result["percentiles"]):
        return message("No image was scored: nothing to draw.")
    removed = 100 - np.asarray(result["percentiles"], float)
    order = np.argsort(removed)
    panels = {
        "most_relevant_first": "Most relevant pixels first",
        "least_relevant_first": "Least relevant pixels first",
    }
    maps = f"{clean(result['method'], 24)}, {clean(result['stage'], 24)}"
    with _style():
        figure = _figure(4.4, f"Does the answer rest on what the maps show? {maps}")
        axes = _subplots(figure, 1, 2, sharey=True)
        for ax, (key, name) in zip(axes, panels.items(), strict=True):
            ax.set_title(name)
            ax.hlines(0, 0, 100, color=EDGE, linewidth=1.0, zorder=1)
            for kind, label, color in (("random", "random maps", MUTED), ("map", "the maps", BLUE)):
                values = [math.nan if value is None else 100 * value for value in result[kind][key]]
                _line(
                    ax,
                    removed[order],
                    np.array(values)[order],
                    label,
                    color,
                    dashed=kind == "random",
                )
            ax.set_xlabel("removed pixels in %")
            ax.margins(y=0.16)  # room for two labels beside the lowest point
        axes[0].set_ylabel("change of probability in points")
        for ax in axes:  # when the limits, which they share, are final
            _label_ends(ax, unit="")
        scores = {"maps": "combined", "random": "random_combined", "difference": "difference"}
        words = "; ".join(f"{name} {_in_points(result[key])}" for name, key in scores.items())
        _footnote(
            figure,
            f"Means over {result['images']:,} test images; removed pixels are filled in from their neighbours. Maps "
            "that tell what matters fall faster than random ones on the left and slower on the right.\n"
            f"Half of right less left, in points, with 95 % intervals: {words}.",
        )
    return figure


def learning_rate_test(
    learning_rates: Sequence[float],
    losses: Sequence[float],
    smoothed: Sequence[float],
    suggestion: float | None = None,
) -> Figure:
    """The loss while the learning rate grows step by step (Smith 2015), and the suggestion, if
    there is one.

    One value for each step; losses in nats, of single batches and smoothed. What is not finite is
    left out, and what rises far above the start is cut off.
    """
    rates, raw, smooth = (
        np.asarray(values, float) for values in (learning_rates, losses, smoothed)
    )
    usable = np.isfinite(rates) & (rates > 0)
    known = usable & np.isfinite(smooth)
    if not known.any():
        return message("No step has a finite loss: nothing to draw.")
    with _style():
        figure = _figure(3.8, "Learning-rate range test")
        (ax,) = _subplots(figure)
        ax.set_xscale("log")
        shown = usable & np.isfinite(raw)
        ax.plot(rates[shown], raw[shown], color=EDGE, linewidth=1.0, label="each batch")
        ax.plot(rates[known], smooth[known], color=BLUE, label="smoothed")
        lowest, start = min(smooth[known].min(), *raw[shown]), smooth[known][0]
        room = max(start - lowest, 0.05 * abs(start), 1e-6)
        ax.set_ylim(lowest - 0.1 * room, start + 0.75 * room)
        if suggestion is not None:
            ax.axvline(suggestion, color=VERMILION, linewidth=1.4, linestyle=(0, (3, 1.6)))
            text = f"suggestion {suggestion:.2g}"
            _note(
                ax,
                text,
                (suggestion, 1),
                (0, 3),
                VERMILION,
                "center",
                xycoords=ax.get_xaxis_transform(),
                size=8.5,
            )
        ax.set(
            xlabel="learning rate" + (": no suggestion" if suggestion is None else ""),
            ylabel="training loss",
        )
        decades = np.ptp(np.log10(rates[usable]))
        ax.xaxis.set_major_locator(LogLocator(subs=(1,) if decades > 2 else (1, 2, 5), numticks=12))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        ax.legend(loc="best", frameon=False, labelcolor=MUTED, prop={"family": FONT, "size": 8.5})
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
    upper = _title_height(title) + 0.22
    bars = margin + (side + gap) * (1 if heat is None else 2) + 0.1
    room, step = WIDTH - margin - bars, side / max(len(top), 5)
    with _style():
        figure = _canvas(upper + side + (0.34 if heat is None else 0.62), title)
        rows, columns = image.shape[:2]
        _text(
            figure,
            margin,
            upper - 0.06,
            f"the image, {columns} × {rows} pixels",
            color=MUTED,
            size=8.5,
        )
        _picture(figure, margin, upper, side, image)
        if heat is not None:
            left, spoke = margin + side + gap, "what spoke" if np.any(heat) else "nothing spoke"
            _text(
                figure, left, upper - 0.06, f"{spoke} for the first answer", color=MUTED, size=8.5
            )
            _heat_map(_picture(figure, left, upper, side, image), heat, hide_picture=False)
        for i, entry in enumerate(top):
            upper_edge, percent = upper + i * step, f"{100 * entry['probability']:.1f} %"
            _caption(figure, bars, upper_edge - 0.02, room, [(entry["name"], percent, INK)], size=9)
            for width, color in ((room, GRID), (room * entry["probability"], BLUE)):
                _bar(figure, bars, upper_edge + 0.22, width, 0.1, color)
        notes = "The answer is always one of the classes that the network has learned, whatever the picture shows."
        if heat is None:
            _text(figure, margin, upper + side + 0.22, notes, color=MUTED, size=8)
        else:
            size = f"{heat.shape[1]} × {heat.shape[0]}"
            scaled = f"The map ({size}, enlarged bilinearly) is scaled to itself: it shows where, never how much."
            _heat_key(figure, margin, upper + side, f"{scaled}\n{notes}")
    return figure


def message(text: str) -> Figure:
    """A figure that says why there is nothing to draw."""
    with _style():
        figure = _canvas(1.2)
        ax = figure.add_axes((0, 0, 1, 1))
        ax.set_axis_off()
        ax.text(
            0.5, 0.5, _fitted(text, WIDTH - 0.4, 11), size=11, color=MUTED, ha="center", va="center"
        )
    return figure


def clean(text: str, limit: int = 60) -> str:
    """One line of at most `limit` characters: what cannot be printed becomes a space, what is cut
    off an ellipsis."""
    printable = "".join(character if character.isprintable() else " " for character in text)
    line = " ".join(printable.split()) or "(no name)"
    return line if len(line) <= limit else line[: limit - 1].rstrip() + "…"


def _fitted(text: str, inches: float, size: float, weight: str = "normal") -> str:
    """`clean` text, cut until it is at most `inches` wide."""
    line = clean(text, 200)
    most = max(
        int(inches * 72 / (0.25 * size)), 0
    )  # characters: an i is wider than a quarter of the size
    if len(line) <= most and _inches(line, size, weight) <= inches:
        return line
    lengths = range(min(len(line), most + 1))
    longest = (
        bisect_right(lengths, inches, key=lambda length: _inches(line[:length] + "…", size, weight))
        - 1
    )
    return line[: max(longest, 0)].rstrip() + "…"


@lru_cache(10_000)
def _inches(text: str, size: float, weight: str = "normal") -> float:
    """The width of a line of text."""
    path = TextPath((0, 0), text, size=size, prop=FontProperties(family=FONT, weight=weight))
    return 1.05 * path.get_extents().width / 72  # on screen, glyphs are moved apart to whole pixels


def _wrapped(text: str, inches: float, size: float) -> str:
    """`clean` text on one or two lines of at most `inches`."""
    lines = textwrap.wrap(
        clean(text), int(72 * inches / (0.6 * size)), max_lines=2, placeholder="…"
    )
    return "\n".join(_fitted(line, inches, size) for line in lines)


@contextmanager
def _style() -> Iterator[None]:
    """The house style for what is made inside, whatever the settings around it; they come back
    unchanged."""
    with matplotlib.style.context(["default", STYLE]):
        yield


def _write(figure: Figure, target: Path | io.BytesIO, dpi: float) -> None:
    with _style():  # without the library's name in the file, which would change with its version
        figure.savefig(target, format="png", dpi=dpi, metadata={"Software": None})


def _figure(height: float, title: str = "") -> Figure:
    """A figure for axes, `height` in inches."""
    figure = SelfShowing(figsize=(WIDTH, height), layout="constrained")
    if title:
        figure.suptitle(
            _fitted(title, WIDTH - 0.2, 11.5, "bold"), x=0.008, ha="left", size=11.5, weight="bold"
        )
    return figure


def _subplots(figure: Figure, rows: int = 1, columns: int = 1, **sharing: bool | str) -> np.ndarray:
    """A flat array of axes. Their ticks are made when the figure is drawn, outside the style, so
    they get it here."""
    axes = figure.subplots(rows, columns, squeeze=False, **sharing).ravel()
    for ax in axes:
        ax.tick_params(
            color=EDGE, labelcolor=MUTED, labelsize=8.5, labelfontfamily=FONT, length=3, width=0.8
        )
        ax.tick_params(grid_color=GRID, grid_linewidth=0.8)
    return axes


def _canvas(height: float, title: str = "") -> Figure:
    """A figure for pictures placed by hand, `height` in inches."""
    figure = SelfShowing(figsize=(WIDTH, height))
    if title:
        _text(
            figure, 0.08, 0.27, _fitted(title, WIDTH - 1.6, 11.5, "bold"), size=11.5, weight="bold"
        )
    return figure


def _title_height(title: str) -> float:
    """Inches that `_canvas` needs above the pictures."""
    return 0.42 if title else 0.06


def _text(
    figure: Figure, left: float, top: float, text: str, va: str = "baseline", **style: object
) -> None:
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
    """A frame around the pixels x0 y0 x1 y1, both ends included: light on a dark edge, so it shows
    on any picture."""
    x0, y0, x1, y1 = (int(value) for value in box)
    frame = Rectangle(
        (x0 - 0.5, y0 - 0.5), x1 - x0 + 1, y1 - y0 + 1, fill=False, edgecolor="white", linewidth=1.0
    )
    frame.set_path_effects([withStroke(linewidth=2.2, foreground="black", alpha=0.55)])
    ax.add_patch(frame)


def _heat_map(ax: Axes, values: np.ndarray, hide_picture: bool) -> None:
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


def _heat_key(figure: Figure, left: float, top: float, notes: str) -> None:
    """The colour scale of the maps, and how they may be read."""
    _ramp(figure, left, top + 0.16, 1.2, HEAT)
    _text(figure, left, top + 0.43, "lowest", color=MUTED, size=7.5)
    _text(figure, left + 1.2, top + 0.43, "highest", color=MUTED, size=7.5, ha="right")
    _text(figure, left + 1.45, top + 0.15, notes, va="top", color=MUTED, size=8, linespacing=1.45)


def _bar(figure: Figure, left: float, top: float, width: float, height: float, color: str) -> None:
    """A filled rectangle, in inches from the figure's upper left corner."""
    across, down = figure.get_size_inches()
    compute, size = (left / across, 1 - (top + height) / down), (width / across, height / down)
    figure.add_artist(
        Rectangle(compute, *size, facecolor=color, linewidth=0, transform=figure.transFigure)
    )


def _ramp(figure: Figure, left: float, top: float, wide: float, colors: str | Colormap) -> None:
    """A strip of all the colours of a scale."""
    width, height = figure.get_size_inches()
    ax = figure.add_axes((left / width, 1 - (top + 0.12) / height, wide / width, 0.12 / height))
    ax.imshow(np.linspace(0, 1, 256)[None], cmap=colors, aspect="auto")
    ax.set_axis_off()


def _gallery(images: np.ndarray, entries: Sequence[Mapping], columns: int, title: str) -> Figure:
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
    with _style():
        figure = _captioned(images, captions, columns, title)
        _names_key(figure, (KINDS if wrong else {}) | ({"right answer": INK} if right else {}))
    return figure


def _captioned(
    images: np.ndarray, captions: Sequence[Sequence[tuple]], columns: int, title: str
) -> Figure:
    """Rows of images, each below its lines (see `_caption`)."""
    margin, gap, text = 0.08, 0.22, 0.08 + 0.17 * max(map(len, captions))
    side = (WIDTH - 2 * margin + gap) / columns - gap
    rows, top = math.ceil(len(images) / columns), 0.42
    figure = _canvas(top + rows * (text + side + 0.12), title)
    for i, (image, lines) in enumerate(zip(images, captions, strict=True)):
        left, upper = margin + i % columns * (side + gap), top + i // columns * (text + side + 0.12)
        _caption(figure, left, upper, side, lines)
        _picture(figure, left, upper + text, side, image)
    return figure


def _caption(
    figure: Figure, left: float, top: float, width: float, lines: Sequence[tuple], size: float = 8.5
) -> None:
    """Lines of a name on the left, cut to fit, a remark on the right, and their colour."""
    for number, (name, remark, color) in enumerate(lines):
        height = top + 0.17 * (number + 1)
        room = width - (_inches(remark, size) + 0.08 if remark else 0)
        _text(figure, left, height, _fitted(name, room, size), size=size, color=color)
        _text(figure, left + width, height, remark, size=size, color=color, ha="right")


def _names_key(figure: Figure, kinds: Mapping[str, str]) -> None:
    """The words in their colours, in the upper right corner."""
    right = WIDTH - 0.08
    for word, color in reversed(kinds.items()):
        _text(figure, right, 0.27, word, size=8.5, color=color, weight="bold", ha="right")
        right -= _inches(word, 8.5, "bold") + 0.14


def _footnote(figure: Figure, text: str) -> None:
    """Small text below the axes of a figure made by `_figure`, wrapped to its width."""
    text = "\n".join(line for part in text.splitlines() for line in textwrap.wrap(part, 145))
    figure.supxlabel(text, x=0.008, ha="left", size=8, color=MUTED, linespacing=1.45)


def _row_title(ax: Axes, entry: Mapping) -> None:
    """Predicted and actual class with their probabilities, on one line from the upper left corner
    of `ax`."""
    pieces = []
    for kind, color in KINDS.items():
        name = _fitted(entry[kind]["name"], 2.8, 8.5, "bold")
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


def _column(rows: Sequence[Mapping], key: str) -> list[float]:
    """One column as numbers; what a row lacks is left out of the line."""
    return [float(row[key]) if row.get(key) not in (None, "") else math.nan for row in rows]


def _line(
    ax: Axes, x: list[float], y: list[float], label: str, color: str, dashed: bool = False
) -> None:
    """A curve through the values there are, with a dot on the last one; `_label_ends` names it."""
    x, y = (
        np.array([point for point in zip(x, y, strict=True) if math.isfinite(point[1])])
        .reshape(-1, 2)
        .T
    )
    look = {"linestyle": (0, (3, 1.6)), "linewidth": 1.2} if dashed else {}
    ax.plot(
        x,
        y,
        label=label,
        color=color,
        marker="o",
        markersize=4,
        markevery=[len(x) - 1] if len(x) else [],
        **look,
    )


def _whole_numbers(ax: Axes) -> None:
    """No ticks between two epochs or steps."""
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7, min_n_ticks=1))


def _from_zero(axes: Sequence[Axes]) -> None:
    """One height for all `axes`, from 0 to a little above their highest value; labels need it
    final."""
    values = np.concatenate([line.get_ydata() for ax in axes for line in ax.lines])
    highest = max(values[np.isfinite(values)], default=0)
    for ax in axes:
        ax.set_ylim(0, 1.06 * highest or 1)


def _label_ends(ax: Axes, unit: str) -> None:
    """Writes every line's name and last value beside its last point, pushed apart where two would
    overlap."""
    bottom, top = ax.get_ylim()
    ends = []
    for line in ax.lines:
        points = np.column_stack(line.get_data())
        points = points[np.isfinite(points).all(axis=1)]
        if len(points):
            x, y = points[-1]
            ends.append(
                [
                    (y - bottom) / (top - bottom),
                    x,
                    f"{line.get_label()}\n{y:.2f}{unit}".replace("-", "−"),
                    line.get_color(),
                ]
            )
    ends.sort(key=lambda end: end[0])
    line_height = 12 / (
        72 * ax.figure.get_figheight() * ax.get_position().height
    )  # 12 points, as a share of the axes
    for lower, upper in [*pairwise(ends)] * 4:  # pushing one pair apart may close another
        needed = line_height * (2 + lower[2].count("\n") + upper[2].count("\n")) / 2
        overlap = needed - (upper[0] - lower[0])
        if overlap > 0 and upper[1] == lower[1]:
            lower[0] -= overlap / 2
            upper[0] += overlap / 2
    for height, x, text, color in ends:
        coordinates = ax.get_xaxis_transform()
        _note(
            ax,
            text,
            (x, height),
            (7, 0),
            color,
            "left",
            va="center",
            xycoords=coordinates,
            size=8.5,
        )


def _note(
    ax: Axes,
    text: str,
    compute: tuple,
    offset: tuple,
    color: str,
    ha: str,
    va: str = "baseline",
    **style,
) -> None:
    """Text `offset` points away from `place`, with a white edge that keeps it legible on top of
    lines."""
    note = ax.annotate(
        text, compute, offset, textcoords="offset points", color=color, ha=ha, va=va, **style
    )
    note.set_path_effects([withStroke(linewidth=2.5, foreground="white")])


def _share_scales(
    figure: Figure, left: float, highest: float, even: bool
) -> list[tuple[Colormap, Normalize]]:
    """Colours of right answers and of mistakes, up to `highest`, in percent, each with its key
    above the matrix."""
    right = LinearSegmentedColormap.from_list("right", ("#eaf2f8", BLUE, "#00304d"))
    wrong = LinearSegmentedColormap.from_list("wrong", ("#f3f4f6", "#f3b185", VERMILION, "#5c1e00"))
    top = next(top for top in (1, 2, 5, 10, 20, 50, 100) if top >= highest)
    # Many classes have no numbers: the root makes what is rare visible beside the most frequent
    # mistake.
    norm = Normalize(0, top) if even else PowerNorm(0.5, 0, top)
    keys = [
        ("right (diagonal), % of the row", right, Normalize(0, 100), 50, 100),
        ("mistakes, % of the row", wrong, norm, top / (2 if even else 4), top),
    ]
    for i, (name, colors, _, middle, end) in enumerate(keys):
        start = left + 2.5 * i
        _text(figure, start, 0.54, name, color=MUTED, size=8)
        _ramp(figure, start, 0.6, 2.1, colors)
        for share, value, ha in ((0, 0, "left"), (0.5, middle, "center"), (1, end, "right")):
            _text(figure, start + 2.1 * share, 0.86, f"{value:g}", color=MUTED, size=7.5, ha=ha)
    return [(colors, norm) for _, colors, norm, *_ in keys]


def _cells(
    figure: Figure,
    left: float,
    top: float,
    cell: float,
    shares: np.ndarray,
    scales: Sequence[tuple],
) -> None:
    """The squares of a matrix (C, C) in percent, `cell` inches each; numbers in them if they are
    large enough."""
    classes = len(shares)
    ax = _picture(figure, left, top, cell * classes, np.ones((classes, classes, 3)))
    diagonal = np.eye(classes, dtype=bool)
    for part, (colors, norm) in zip((diagonal, ~diagonal), scales, strict=True):
        values = np.ma.array(shares, mask=~part | np.isnan(shares))
        ax.imshow(values, cmap=colors, norm=norm, interpolation="nearest", aspect="auto")
    if cell >= 0.1:
        for edges in (ax.hlines, ax.vlines):
            edges(np.arange(1, classes) - 0.5, -0.5, classes - 0.5, color="white", linewidth=0.8)
    for (row, column), share in np.ndenumerate(shares):
        if cell >= 0.25 and share > 0:
            colors, norm = scales[row != column]
            color = "white" if np.dot(colors(norm(share))[:3], (0.3, 0.59, 0.11)) < 0.55 else INK
            text = "<1" if share < 0.5 else f"{share:.0f}"
            ax.text(
                column,
                row,
                text,
                color=color,
                size=min(8.5, 26 * cell),
                ha="center",
                va="center_baseline",
            )


def _apart(values: np.ndarray, distance: int) -> list[int]:
    """Places of the largest values above 0, no two of them closer than `distance`."""
    chosen: list[int] = []
    for i in np.argsort(-values, kind="stable").tolist():
        if values[i] > 0 and all(abs(i - other) >= distance for other in chosen):
            chosen.append(i)
    return chosen


def _calibrated(ax: Axes, below: Axes, result: Mapping, bins: int) -> None:
    """One half of `reliability`: accuracy against confidence in `ax`, answers in each bin in
    `below`."""
    ax.plot([0, 100], [0, 100], color=MUTED, linewidth=1.2, linestyle=(0, (3, 1.6)))
    places = []
    for confidence, accuracy, count in zip(
        result["confidence"], result["accuracy"], result["count"], strict=True
    ):
        if count:
            places.append((100 * confidence, 100 * accuracy))
            ax.plot([100 * confidence] * 2, _wilson(accuracy, count), color=INK, linewidth=0.9)
    ax.plot(
        *zip(*places, strict=True),
        color=BLUE,
        marker="o",
        markersize=4.5,
        linewidth=1.2,
        clip_on=False,
    )
    ax.set(xlim=(0, 100), ylim=(0, 100), xticks=range(0, 101, 20))
    for compute, text, ha, va in (
        ((3, 95), "underconfident", "left", "top"),
        ((97, 5), "overconfident", "right", "bottom"),
    ):
        _note(ax, text, compute, (0, 0), MUTED, ha, va=va, size=8.5)
    middles = 100 * (np.arange(bins) + 0.5) / bins
    below.bar(middles, result["count"], width=88 / bins, color=BLUE, alpha=0.85)
    below.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=3))
    below.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    mean, right = (100 * result[key] for key in ("mean_confidence", "accuracy_overall"))
    below.set_xlabel(f"confidence in %: {mean:.1f} on average, {right:.1f} % are right")


def _estimates(
    ax: Axes,
    groups: Sequence[Mapping],
    key: str,
    baselines: Mapping[str, str],
    difference: str,
    against: str,
) -> None:
    """A line for each group: the measure `key` with its interval, baselines by their markers, the
    difference beside."""
    for y, group in enumerate(groups):
        estimate = _percent(group[key])
        if estimate is None:
            _note(ax, "no images", (0, y), (5, 0), MUTED, "left", va="center_baseline", size=8.5)
            continue
        for name, marker in baselines.items():
            if baseline := _percent(group[name]):
                look = {
                    "markersize": 5 if marker == "D" else 11,
                    "markeredgewidth": 1.4,
                    "markerfacecolor": "white",
                }
                ax.plot(baseline[0], y, marker, color=MUTED, clip_on=False, **look)
        mean, *interval = estimate
        color = KINDS.get(group["class"], INK)
        ax.plot(interval, [y, y], color=color, linewidth=1.6, clip_on=False)
        ax.plot(mean, y, "o", color=color, markersize=5.5, clip_on=False)
        compute, style = ax.get_yaxis_transform(), {"va": "center_baseline", "size": 8}
        _note(
            ax,
            _in_points(group[difference]),
            (1, y),
            (8, 0),
            INK,
            "left",
            xycoords=compute,
            **style,
        )
    _note(ax, against, (1, 1), (8, 4), MUTED, "left", xycoords="axes fraction", size=8)
    ax.set(
        xlim=(0, 100),
        ylim=(len(groups) - 0.5, -0.5),
        xticks=range(0, 101, 20),
        yticks=range(len(groups)),
    )
    ax.tick_params(axis="y", length=0, labelleft=False)
    ax.grid(axis="y", visible=False)


def _group_labels(ax: Axes, groups: Sequence[Mapping]) -> None:
    """What each line of `_estimates` is about, and how many images it rests on."""
    labels = []
    for group in groups:
        which = "" if group["class"] == "both" else f", {group['class']} class"
        labels.append(f"{group['answers']}{which} ({group['images']:,})")
    ax.set_yticks(range(len(groups)), labels, parse_math=False)
    ax.tick_params(axis="y", labelleft=True, labelcolor=INK)


def _percent(estimate: Mapping | None) -> tuple[float, float, float] | None:
    """Mean and ends of the interval of a share, in percent, or None if nothing was measured."""
    if not estimate or estimate["mean"] is None:
        return None
    mean, low, high = (100 * estimate[key] for key in ("mean", "low", "high"))
    return mean, low, high


def _in_points(estimate: Mapping | None) -> str:
    """A difference of shares with its interval, as text."""
    values = _percent(estimate)
    return "{:+.1f} ({:+.1f} to {:+.1f})".format(*values).replace("-", "−") if values else "unknown"


def _wilson(share: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a share of `count`, in percent (Wilson 1927)."""
    z = 1.96
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = (
        z
        / (1 + z * z / count)
        * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    )
    return 100 * (middle - half), 100 * (middle + half)
