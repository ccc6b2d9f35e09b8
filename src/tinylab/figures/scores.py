"""Scores: per class, confusions, calibration, maps against boxes, ROAD."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, LinearSegmentedColormap, Normalize, PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tinylab.figures.style import (
    BLUE,
    EDGE,
    INK,
    KINDS,
    MUTED,
    VERMILION,
    WIDTH,
    add_axes,
    annotate,
    clean,
    draw_line,
    fitted,
    in_percent,
    in_points,
    label_ends,
    message,
    new_canvas,
    new_figure,
    put_caption,
    put_footnote,
    put_names_key,
    put_picture,
    put_ramp,
    put_text,
    styled,
    text_width,
    title_height,
    wilson,
)


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
    with styled():
        figure = new_figure(1.0 + 0.2 * sum(len(group) + 1 for group, _ in groups), heading)
        (ax,) = add_axes(figure)
        places, labels, y = [], [], 0
        for group, color in groups:
            for i in group:
                low, high = wilson(accuracies[i] / 100, counts[i])
                ax.barh(y, accuracies[i], height=0.68, color=color, alpha=0.85)
                ax.plot([low, high], [y, y], color=INK, linewidth=0.9)
                annotate(
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
                labels.append(fitted(names[i], 2.2, 8.5))
                y += 1
            y += 1
        mean = float(np.mean([accuracies[i] for i in known]))
        ax.axvline(mean, color=MUTED, linewidth=1.0, linestyle=(0, (3, 2)), zorder=0)
        text, coordinates = f"mean of all classes {mean:.1f} %", ax.get_xaxis_transform()
        annotate(ax, text, (mean, 1), (0, 3), MUTED, "center", xycoords=coordinates, size=8.5)
        ax.set_yticks(places, labels, parse_math=False)
        ax.tick_params(axis="y", length=0, labelcolor=INK)
        ax.grid(axis="y", visible=False)
        ax.set(xlim=(0, 108), ylim=(y - 1.4, -0.7), xticks=range(0, 101, 20))
        ax.set_xlabel(
            f"top-1 accuracy in % of {images} test images per class; thin lines: 95 % intervals"
        )
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
    with styled():
        size, room = (8.5, 1.8) if every else (7.5, 1.5)
        widest = (
            max(text_width(fitted(name, room, size), size) for name in names) if every else room
        )
        left, top, below = 0.4 + max(widest, 0.4), 1.0, 0.4 + (0.75 * widest if every else 0)
        cell = (
            max(min(math.floor(100 * (WIDTH - left - 0.12) / classes), 60), 1) / 100
        )  # whole pixels: no uneven cells
        side, named = (
            cell * classes,
            range(classes) if every else apart(worst, math.ceil(0.12 / cell)),
        )
        bottom = top + side + below
        figure = new_canvas(
            math.ceil(100 * bottom + 44) / 100,
            f"{classes} class{'' if classes == 1 else 'es'}: {right}",
        )
        put_cells(
            figure, left, top, cell, shares, put_share_scales(figure, left, highest, even=every)
        )
        for i in named:
            middle, label = (i + 0.5) * cell, fitted(names[i], room, size)
            put_text(
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
                put_text(figure, left + middle, top + side + 0.09, label, size=size, **slanted)
        axis = {"color": MUTED, "ha": "center", "va": "center"}
        put_text(figure, 0.14, top + side / 2, "actual class", rotation=90, **axis)
        put_text(figure, left + side / 2, bottom - 0.18, "predicted class", **axis)
        notes = (
            "Same order on both axes: a block on the diagonal is a group of classes that are "
            "taken for each other."
        )
        if not every:
            notes += (
                "\nNamed are the classes that are most often taken for one other, as far as there "
                "is room."
            )
        if not images.all():
            notes += f"{' ' if not every else chr(10)}White rows: no test images."
        put_text(
            figure, 0.08, bottom + 0.02, notes, va="top", color=MUTED, size=8, linespacing=1.45
        )
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
    top = title_height(heading)
    with styled():
        figure = new_canvas(top + math.ceil(len(pairs) / columns) * height + 0.24, heading)
        put_names_key(figure, KINDS)
        for i, (pair, pictures) in enumerate(zip(pairs, thumbnails, strict=True)):
            left, upper = margin + i % columns * column, top + i // columns * height
            total = str(pair["count"])
            put_text(
                figure, left, upper + 0.34, total, size=min(10, 28 / len(total)), weight="bold"
            )
            ways = (("one", "other", "one_as_other"), ("other", "one", "other_as_one"))
            for way, ((actual, predicted, key), shown) in enumerate(
                zip(ways, pictures, strict=True)
            ):
                start = left + gutter + way * (half + far)
                answer = (pair[predicted]["name"], f"{pair[key]:,}", VERMILION)
                put_caption(
                    figure,
                    start,
                    upper,
                    half,
                    [answer, (pair[actual]["name"], f"of {pair[actual]['images']:,}", BLUE)],
                )
                for j, image in enumerate(shown[:3]):
                    put_picture(figure, start + j * (side + near), upper + text, side, image)
                if not len(shown):
                    none = "no picture" if pair[key] else "never"
                    put_text(
                        figure,
                        start,
                        upper + text + side / 2,
                        none,
                        color=MUTED,
                        size=8,
                        va="center",
                    )
        notes = (
            "Bold: test images of either class that were taken for the other. Beneath: up to "
            "three of them each way."
        )
        put_text(figure, margin, figure.get_figheight() - 0.1, notes, color=MUTED, size=8)
    return figure


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
    with styled():
        figure = new_figure(5.6, "When the network is sure, is it right?")
        axes = add_axes(figure, 2, 2, sharex=True, sharey="row", height_ratios=(3, 1))
        for (key, name), ax, below in zip(titles.items(), axes[:2], axes[2:], strict=True):
            draw_calibration(ax, below, calibration[key], calibration["bins"])
            ax.set_title(f"{name}: ECE {100 * calibration[key]['ece']:.1f} %")
        axes[0].set_ylabel("accuracy in %")
        axes[2].set_ylabel("answers")
        note = fitted(calibration["note"], WIDTH - 0.4, 8) if calibration.get("note") else ""
        put_footnote(
            figure,
            "ECE, the expected calibration error, is how far the dots are from the dashed line, "
            "on average over the "
            "answers.\nEach half of the answers was scaled by the temperature that fits the other "
            "half best; T is the "
            f"mean of both.\n{note[:1].upper()}{note[1:]}",
        )
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
    with styled():
        figure = new_figure(5.6, f"Do the maps look at the object? {maps}")
        axes = add_axes(figure, 2, 2, sharex=True).reshape(2, 2)
        for row, (boxes, which) in zip(axes, sets.items(), strict=True):
            groups = [group for group in summary["groups"] if group["boxes"] == boxes]
            for ax, (key, (name, baselines, difference, against)) in zip(
                row, measures.items(), strict=True
            ):
                ax.set_title(name, pad=18)
                annotate(
                    ax, which, (0, 1), (0, 5), MUTED, "left", xycoords="axes fraction", size=8.5
                )
                draw_estimates(ax, groups, key, baselines, difference, against)
            group_labels(row[0], groups)
        axes[1, 0].set_xlabel("images in %")
        axes[1, 1].set_xlabel("mean share of the map in %")
        put_footnote(
            figure,
            "Dots: the maps. Diamonds: the centre of the image as the point. Bars: a map that is "
            "the same everywhere. "
            "On the right: the difference, in points; at 0 the maps are no better. Lines and "
            "brackets: 95 % intervals.",
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
    with styled():
        figure = new_figure(4.4, f"Does the answer rest on what the maps show? {maps}")
        axes = add_axes(figure, 1, 2, sharey=True)
        for ax, (key, name) in zip(axes, panels.items(), strict=True):
            ax.set_title(name)
            ax.hlines(0, 0, 100, color=EDGE, linewidth=1.0, zorder=1)
            for kind, label, color in (("random", "random maps", MUTED), ("map", "the maps", BLUE)):
                values = [math.nan if value is None else 100 * value for value in result[kind][key]]
                draw_line(
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
            label_ends(ax, unit="")
        scores = {"maps": "combined", "random": "random_combined", "difference": "difference"}
        words = "; ".join(f"{name} {in_points(result[key])}" for name, key in scores.items())
        put_footnote(
            figure,
            f"Means over {result['images']:,} test images; removed pixels are filled in from "
            "their neighbours. Maps "
            "that tell what matters fall faster than random ones on the left and slower on the "
            "right.\n"
            f"Half of right less left, in points, with 95 % intervals: {words}.",
        )
    return figure


def put_share_scales(
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
        put_text(figure, start, 0.54, name, color=MUTED, size=8)
        put_ramp(figure, start, 0.6, 2.1, colors)
        for share, value, ha in ((0, 0, "left"), (0.5, middle, "center"), (1, end, "right")):
            put_text(figure, start + 2.1 * share, 0.86, f"{value:g}", color=MUTED, size=7.5, ha=ha)
    return [(colors, norm) for _, colors, norm, *_ in keys]


def put_cells(
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
    ax = put_picture(figure, left, top, cell * classes, np.ones((classes, classes, 3)))
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


def apart(values: np.ndarray, distance: int) -> list[int]:
    """Places of the largest values above 0, no two of them closer than `distance`."""
    chosen: list[int] = []
    for i in np.argsort(-values, kind="stable").tolist():
        if values[i] > 0 and all(abs(i - other) >= distance for other in chosen):
            chosen.append(i)
    return chosen


def draw_calibration(ax: Axes, below: Axes, result: Mapping, bins: int) -> None:
    """One half of `reliability`: accuracy against confidence in `ax`, answers in each bin in
    `below`."""
    ax.plot([0, 100], [0, 100], color=MUTED, linewidth=1.2, linestyle=(0, (3, 1.6)))
    places = []
    for confidence, accuracy, count in zip(
        result["confidence"], result["accuracy"], result["count"], strict=True
    ):
        if count:
            places.append((100 * confidence, 100 * accuracy))
            ax.plot([100 * confidence] * 2, wilson(accuracy, count), color=INK, linewidth=0.9)
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
        annotate(ax, text, compute, (0, 0), MUTED, ha, va=va, size=8.5)
    middles = 100 * (np.arange(bins) + 0.5) / bins
    below.bar(middles, result["count"], width=88 / bins, color=BLUE, alpha=0.85)
    below.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=3))
    below.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    mean, right = (100 * result[key] for key in ("mean_confidence", "accuracy_overall"))
    below.set_xlabel(f"confidence in %: {mean:.1f} on average, {right:.1f} % are right")


def draw_estimates(
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
        estimate = in_percent(group[key])
        if estimate is None:
            annotate(ax, "no images", (0, y), (5, 0), MUTED, "left", va="center_baseline", size=8.5)
            continue
        for name, marker in baselines.items():
            if baseline := in_percent(group[name]):
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
        annotate(
            ax, in_points(group[difference]), (1, y), (8, 0), INK, "left", xycoords=compute, **style
        )
    annotate(ax, against, (1, 1), (8, 4), MUTED, "left", xycoords="axes fraction", size=8)
    ax.set(
        xlim=(0, 100),
        ylim=(len(groups) - 0.5, -0.5),
        xticks=range(0, 101, 20),
        yticks=range(len(groups)),
    )
    ax.tick_params(axis="y", length=0, labelleft=False)
    ax.grid(axis="y", visible=False)


def group_labels(ax: Axes, groups: Sequence[Mapping]) -> None:
    """What each line of `draw_estimates` is about, and how many images it rests on."""
    labels = []
    for group in groups:
        which = "" if group["class"] == "both" else f", {group['class']} class"
        labels.append(f"{group['answers']}{which} ({group['images']:,})")
    ax.set_yticks(range(len(groups)), labels, parse_math=False)
    ax.tick_params(axis="y", labelleft=True, labelcolor=INK)
