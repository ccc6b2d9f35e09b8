"""Scores: per class, confusions, calibration, maps against boxes, ROAD."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, Normalize, PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tinylab.figures.style import (  # isort: skip
    BLUE, DASHED, EDGE, INK, KINDS, MUTED, NOTE, VERMILION, WIDTH, add_axes, annotate, clean,
    draw_line, fitted, in_percent, in_points, label_ends, message, new_canvas, new_figure,
    put_caption, put_footnote, put_names_key, put_picture, put_ramp, put_text, styled, text_width,
    title_height, wilson,
)  # fmt: skip


def class_accuracy(
    names: Sequence[str],
    accuracies: Sequence[float],
    counts: Sequence[int],
    best: int = 10,
    worst: int = 10,
) -> Figure:
    """Draw the best and the worst classes (all if they are few) as bars, and the mean of all.

    accuracies in percent, counts test images of each class. The thin lines are 95 % intervals
    (Wilson 1927) for what more images of the class would show; they do not allow for having picked
    the extremes.
    """
    known = [i for i in np.argsort(-np.asarray(accuracies, float), kind="stable") if counts[i] > 0]
    if not known:
        return message("No class has test images: nothing to draw.")
    if len(known) <= best + worst:
        groups, heading = [(known, BLUE)], f"Accuracy per class, all {len(known)}"
    else:
        groups = [(known[:best], BLUE), (known[len(known) - worst :], VERMILION)]
        heading = f"Accuracy per class: the {best} best and {worst} worst of {len(known)}"
    fewest, most = (f(counts[i] for i in known) for f in (min, max))
    images = f"{most:,}" if fewest == most else f"{fewest:,} to {most:,}"
    look = {"va": "center", "size": 8.5}
    with styled():
        figure = new_figure(1.0 + 0.2 * sum(len(group) + 1 for group, _ in groups), heading)
        (ax,) = add_axes(figure)
        heights, labels, y = [], [], 0
        for group, color in groups:
            for i in group:
                low, high = wilson(accuracies[i] / 100, counts[i])
                ax.barh(y, accuracies[i], height=0.68, color=color, alpha=0.85)
                ax.plot([low, high], [y, y], color=INK, linewidth=0.9)
                annotate(ax, f"{accuracies[i]:.1f} %", (high, y), (5, 0), INK, "left", **look)
                heights.append(y)
                labels.append(fitted(names[i], 2.2, 8.5))
                y += 1
            y += 1
        mean = float(np.mean([accuracies[i] for i in known]))
        ax.axvline(mean, color=MUTED, linewidth=1.0, linestyle=(0, (3, 2)), zorder=0)
        text, above = f"mean of all classes {mean:.1f} %", {"xycoords": ax.get_xaxis_transform()}
        annotate(ax, text, (mean, 1), (0, 3), MUTED, "center", size=8.5, **above)
        ax.set_yticks(heights, labels, parse_math=False)
        ax.tick_params(axis="y", length=0, labelcolor=INK)
        ax.grid(axis="y", visible=False)
        ax.set(xlim=(0, 108), ylim=(y - 1.4, -0.7), xticks=range(0, 101, 20))
        of = f"of {images} test images per class"
        ax.set_xlabel(f"top-1 accuracy in % {of}; thin lines: 95 % intervals")
    return figure


def confusion(matrix: np.ndarray, names: Sequence[str], order: Sequence[int]) -> Figure:
    """Draw how often each class (rows) was predicted as each class (columns), in % of the row.

    matrix: counts, integer (C, C). order: (C,), of the classes on both axes: blocks show if it puts
    classes that are confused with each other side by side. Right answers, on the diagonal, have a
    scale of their own, or the mistakes would drown. Up to 30 classes are all named; of more, those
    that are most often mistaken for one other.
    """
    if not np.sum(matrix):
        return message("No class has test images: nothing to draw.")
    matrix, names = matrix[np.ix_(order, order)], [names[i] for i in order]
    images, classes = matrix.sum(axis=1), len(matrix)
    shares = np.where(images[:, None] > 0, 100 * matrix / np.maximum(images, 1)[:, None], np.nan)
    diagonal = np.eye(classes, dtype=bool)
    worst = np.where(diagonal | (images == 0)[:, None], 0, shares).max(axis=1)
    every, size, room = (True, 8.5, 1.8) if classes <= 30 else (False, 7.5, 1.5)
    with styled():
        # ---- sizes, in inches ----
        labels = [fitted(name, room, size) for name in names]
        widest = max(text_width(label, size) for label in labels) if every else room
        left, top, below = 0.4 + max(widest, 0.4), 1.0, 0.4 + (0.75 * widest if every else 0)
        whole_pixels = max(min(math.floor(100 * (WIDTH - left - 0.12) / classes), 72), 1)
        cell = whole_pixels / 100  # else cells would be uneven
        side = cell * classes
        bottom = top + side + below
        named = list(range(classes)) if every else []
        if not every:  # as many as there is room for, the most confused first
            for i in np.argsort(-worst, kind="stable").tolist():
                if worst[i] > 0 and all(abs(i - j) >= math.ceil(0.12 / cell) for j in named):
                    named.append(i)
        right = f"{100 * np.trace(matrix) / matrix.sum():.1f} % of {matrix.sum():,}"
        title = f"{classes} class{'' if classes == 1 else 'es'}: {right} predictions are right"
        figure = new_canvas(math.ceil(100 * bottom + 44) / 100, title)

        # ---- colours, each scale with its key ----
        good = LinearSegmentedColormap.from_list("right", ("#eaf2f8", BLUE, "#00304d"))
        bad = ("#f3f4f6", "#f3b185", VERMILION, "#5c1e00")
        bad = LinearSegmentedColormap.from_list("wrong", bad)
        highest = next(each for each in (1, 2, 5, 10, 20, 50, 100) if each >= worst.max(initial=0))
        # Many classes have no numbers: the root shows rare mistakes beside the most frequent one.
        norm = Normalize(0, highest) if every else PowerNorm(0.5, 0, highest)
        scales = [(good, Normalize(0, 100)), (bad, norm)]
        middles = (50, highest / (2 if every else 4))
        root = "" if every else " (square-root scale)"
        for i, name in enumerate(
            ("right (diagonal), % of the row", f"mistakes, % of the row{root}")
        ):
            start, end = left + 2.5 * i, (100, highest)[i]
            put_text(figure, start, 0.54, name, **NOTE)
            put_ramp(figure, start, 0.6, 2.1, scales[i][0])
            for share, value, ha in (
                (0, 0, "left"),
                (0.5, middles[i], "center"),
                (1, end, "right"),
            ):
                at, look = start + 2.1 * share, {"color": MUTED, "size": 7.5}
                put_text(figure, at, 0.86, f"{value:g}", ha=ha, **look)

        # ---- cells, with numbers where they are large enough ----
        ax = put_picture(figure, left, top, side, np.ones((classes, classes, 3)))
        for part, (colors, own) in zip((diagonal, ~diagonal), scales, strict=True):
            values = np.ma.array(shares, mask=~part | np.isnan(shares))
            ax.imshow(values, cmap=colors, norm=own, interpolation="nearest", aspect="auto")
        if cell >= 0.1:
            for edges in (ax.hlines, ax.vlines):
                edges(
                    np.arange(1, classes) - 0.5, -0.5, classes - 0.5, color="white", linewidth=0.8
                )
        for (row, column), share in np.ndenumerate(shares):
            if cell >= 0.25 and share > 0:
                colors, own = scales[row != column]
                dark = np.dot(colors(own(share))[:3], (0.3, 0.59, 0.11)) < 0.55
                look = {"size": min(8.5, 26 * cell), "ha": "center", "va": "center_baseline"}
                text = "<1" if share < 0.5 else f"{share:.0f}"
                ax.text(column, row, text, color="white" if dark else INK, **look)

        # ---- names ----
        slanted = {"rotation": 45, "rotation_mode": "anchor", "ha": "right", "va": "center"}
        for i in named:
            at, look = (i + 0.5) * cell, {"size": size, "ha": "right", "va": "center_baseline"}
            put_text(figure, left - 0.05, top + at, labels[i], **look)
            if every:
                put_text(figure, left + at, top + side + 0.09, labels[i], size=size, **slanted)
        axis = {"color": MUTED, "ha": "center", "va": "center"}
        put_text(figure, 0.14, top + side / 2, "actual class", rotation=90, **axis)
        put_text(figure, left + side / 2, bottom - 0.18, "predicted class", **axis)
        notes = (
            "Same order on both axes: a block on the diagonal is a group of classes that are "
            "confused with each other."
        )
        if not every:
            most = "most often mistaken for one other, as far as there is room"
            notes += f"\nNamed are the classes that are {most}."
        if not images.all():
            notes += f"{chr(10) if every else ' '}White rows: no test images."
        put_text(figure, 0.08, bottom + 0.02, notes, va="top", linespacing=1.45, **NOTE)
    return figure


def confused_pairs(
    pairs: Sequence[Mapping], thumbnails: Sequence[tuple[np.ndarray, np.ndarray]], title: str = ""
) -> Figure:
    """Draw pairs of classes that are confused, with up to three images of each mistake.

    A pair has `one` and `other`, each with `name` and `images` (tested), and the counts
    `one_as_other`, `other_as_one` and `count`, their sum. Its thumbnails are uint8 (k, h, w, 3) of
    images of `one` that were predicted as `other`, and of the reverse.
    """
    if not pairs:
        return message("No class was mistaken for another: there is no confused pair.")
    margin, gutter, side, near, far, text, columns = 0.08, 0.32, 0.64, 0.02, 0.1, 0.4, 2
    half = 3 * side + 2 * near
    column, height = (WIDTH - 2 * margin + 0.16) / columns, text + side + 0.2
    heading = title or "Classes that are confused most often"
    top = title_height(heading)
    ways = (("one", "other", "one_as_other"), ("other", "one", "other_as_one"))
    with styled():
        figure = new_canvas(top + math.ceil(len(pairs) / columns) * height + 0.24, heading)
        put_names_key(figure, KINDS)
        for i, (pair, pictures) in enumerate(zip(pairs, thumbnails, strict=True)):
            left, upper = margin + i % columns * column, top + i // columns * height
            total = str(pair["count"])
            look = {"size": min(10, 28 / len(total)), "weight": "bold"}
            put_text(figure, left, upper + 0.34, total, **look)
            for way, (actual, predicted, key) in enumerate(ways):
                start, shown = left + gutter + way * (half + far), pictures[way]
                answer = (pair[predicted]["name"], f"{pair[key]:,}", VERMILION)
                truth = (pair[actual]["name"], f"of {pair[actual]['images']:,}", BLUE)
                put_caption(figure, start, upper, half, [answer, truth])
                for j, image in enumerate(shown[:3]):
                    put_picture(figure, start + j * (side + near), upper + text, side, image)
                if not len(shown):
                    none = "no picture" if pair[key] else "never"
                    put_text(figure, start, upper + text + side / 2, none, va="center", **NOTE)
        notes = (
            "Bold: test images of either class that were predicted as the other; below, up to "
            "three of them each way."
        )
        put_text(figure, margin, figure.get_figheight() - 0.1, notes, **NOTE)
    return figure


def reliability(calibration: Mapping) -> Figure:
    """Draw accuracy against confidence, as trained and after temperature scaling; counts below.

    calibration: `bins` (equal parts of 0..1), `temperature`, perhaps a `note`, and `before` and
    `after`, each with `ece`, `mean_confidence`, `accuracy_overall` (0..1), and for each bin
    `confidence`, `accuracy` (0..1, None if it is empty) and `count`. The thin lines are 95 %
    intervals (Wilson 1927).
    """
    if not sum(calibration["before"]["count"]):
        return message("No test images: nothing to draw.")
    scaled = f"After temperature scaling (T = {calibration['temperature']:.2f})"
    bins = calibration["bins"]
    with styled():
        figure = new_figure(5.6, "When the network is sure, is it right?")
        axes = add_axes(figure, 2, 2, sharex=True, sharey="row", height_ratios=(3, 1))
        for i, (key, name) in enumerate((("before", "As trained"), ("after", scaled))):
            ax, below, result = axes[i], axes[2 + i], calibration[key]

            # ---- accuracy against confidence ----
            ax.plot([0, 100], [0, 100], color=MUTED, **DASHED)
            filled = []
            columns = (result["confidence"], result["accuracy"], result["count"])
            for confidence, accuracy, count in zip(*columns, strict=True):
                if count:
                    filled.append((100 * confidence, 100 * accuracy))
                    interval = wilson(accuracy, count)
                    ax.plot([100 * confidence] * 2, interval, color=INK, linewidth=0.9)
            look = {"marker": "o", "markersize": 4.5, "linewidth": 1.2, "clip_on": False}
            ax.plot(*zip(*filled, strict=True), color=BLUE, **look)
            ax.set(xlim=(0, 100), ylim=(0, 100), xticks=range(0, 101, 20))
            look = {"size": 8.5}
            annotate(ax, "underconfident", (3, 95), (0, 0), MUTED, "left", va="top", **look)
            annotate(ax, "overconfident", (97, 5), (0, 0), MUTED, "right", va="bottom", **look)
            ax.set_title(f"{name}: ECE {100 * result['ece']:.1f} %")

            # ---- counts ----
            middles = 100 * (np.arange(bins) + 0.5) / bins
            below.bar(middles, result["count"], width=88 / bins, color=BLUE, alpha=0.85)
            below.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=3))
            below.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
            mean, right = 100 * result["mean_confidence"], 100 * result["accuracy_overall"]
            below.set_xlabel("confidence in %")
            text = f"{mean:.1f} % confidence on average, {right:.1f} % right"
            below.set_title(text, size=8.5, weight="normal", color=MUTED)
        axes[0].set_ylabel("accuracy in %")
        axes[2].set_ylabel("predictions")
        note = fitted(calibration["note"], WIDTH - 0.4, 8) if calibration.get("note") else ""
        put_footnote(
            figure,
            "ECE, the expected calibration error, is how far the dots are from the dashed line, "
            "on average over the predictions. Black lines: 95 % intervals.\nEach half of the "
            "images was scaled by the temperature that fits the other half; T is their mean.\n"
            f"{note[:1].upper()}{note[1:]}",
        )
    return figure


def localisation(summary: Mapping) -> Figure:
    """Draw, for each group of images, how far the maps look at the object, and the baselines.

    summary: `method`, `stage`, `native_size` (h, w) and `groups`. A group has `boxes` ("all" or
    "below half" of the image), `answers` ("all", "right", "wrong"), `class` ("predicted", "actual",
    "both"), `images`, and the shares `hit`, `energy`, `centre_hit`, `uniform`, `hit_minus_centre`,
    `energy_minus_uniform`: `mean`, `low` and `high` of a 95 % interval, None if unknown.
    """
    if not any(group["images"] for group in summary["groups"]):
        return message("No image was scored: nothing to draw.")
    rows, width = summary["native_size"]
    maps = f"{clean(summary['method'], 24)}, {clean(summary['stage'], 24)} ({width} × {rows})"
    sets = {"all": "all boxes", "below half": "small boxes"}
    points = {"centre_hit": "D", "uniform": "|"}
    measures = (
        ("hit", "Highest point", points, "hit_minus_centre", "centre"),
        ("energy", "Share of map", {"uniform": "|"}, "energy_minus_uniform", "even map"),
    )  # fmt: skip
    small = {"xycoords": "axes fraction"}
    with styled():
        figure = new_figure(5.6, f"Do the maps look at the object? {maps}")
        axes = add_axes(figure, 2, 2, sharex=True).reshape(2, 2)
        for row, (boxes, which) in zip(axes, sets.items(), strict=True):
            groups = [group for group in summary["groups"] if group["boxes"] == boxes]
            for ax, (key, name, baselines, difference, against) in zip(row, measures, strict=True):
                ax.set_title(f"{name}, {which}")
                annotate(ax, f"minus {against}", (1, 1), (8, 4), MUTED, "left", size=8, **small)
                for y, group in enumerate(groups):
                    draw_estimate(ax, y, group, key, baselines, difference)
                ticks = {"xticks": range(0, 101, 20), "yticks": range(len(groups))}
                ax.set(xlim=(0, 100), ylim=(len(groups) - 0.5, -0.5), **ticks)
                ax.tick_params(axis="y", length=0, labelleft=False)
                ax.grid(axis="y", visible=False)
            labels = []
            for group in groups:
                of = "" if group["class"] == "both" else f", {group['class']} class"
                labels.append(f"{group['answers']}{of} ({group['images']:,})")
            row[0].set_yticks(range(len(groups)), labels, parse_math=False)
            row[0].tick_params(axis="y", labelleft=True, labelcolor=INK)
        axes[1, 0].set_xlabel("images with it in the box, %")
        axes[1, 1].set_xlabel("mean share in the box, %")
        put_footnote(
            figure,
            "Dots: the maps. Diamonds: the centre of the image as the point. Bars: a map that is "
            "the same everywhere. Small boxes: below half of the image.\nOn the right: the "
            "difference in points; at 0 the maps are no better. Lines, brackets: 95 % intervals.",
        )
    return figure


def draw_estimate(
    ax: Axes, y: int, group: Mapping, key: str, baselines: Mapping[str, str], difference: str
) -> None:
    """Draw a group's line: its measure with the interval, the baselines, the difference beside."""
    middle = {"va": "center_baseline"}
    if group[key] is None or group[key]["mean"] is None:
        annotate(ax, "no images", (0, y), (5, 0), size=8.5, color=MUTED, ha="left", **middle)
        return
    for name, marker in baselines.items():
        if baseline := in_percent(group[name]):
            size = 5 if marker == "D" else 11
            look = {"markersize": size, "markeredgewidth": 1.4, "markerfacecolor": "white"}
            ax.plot(baseline[0], y, marker, color=MUTED, clip_on=False, **look)
    mean, *interval = in_percent(group[key])
    color = KINDS.get(group["class"], INK)
    ax.plot(interval, [y, y], color=color, linewidth=1.6, clip_on=False)
    ax.plot(mean, y, "o", color=color, markersize=5.5, clip_on=False)
    beside = {"xycoords": ax.get_yaxis_transform(), "size": 8}
    annotate(ax, in_points(group[difference]), (1, y), (8, 0), INK, "left", **middle, **beside)


def faithfulness(result: Mapping) -> Figure:
    """Draw how the predicted probability changes when pixels are removed in the map's order.

    ROAD (Rong et al. 2022). result: `images`, `method`, `stage`, `percentiles` (of the map's
    values, as the library has them: at 80 the first 20 % of the pixels are removed), `map` and
    `random`, each with the mean changes `most_relevant_first` and `least_relevant_first` for every
    percentile (-1..1, None if unknown), and `combined`, `random_combined` and `difference`: `mean`,
    `low` and `high`.
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
        figure = new_figure(4.4, f"Does the prediction rest on what the maps show? {maps}")
        axes = add_axes(figure, 1, 2, sharey=True)
        for ax, (key, name) in zip(axes, panels.items(), strict=True):
            ax.set_title(name)
            ax.hlines(0, 0, 100, color=EDGE, linewidth=1.0, zorder=1)
            for kind, label, color in (("random", "random maps", MUTED), ("map", "the maps", BLUE)):
                values = 100 * np.array(result[kind][key], float)[order]  # None becomes NaN
                draw_line(ax, removed[order], values, label, color, dashed=kind == "random")
            ax.set_xlabel("removed pixels in %")
            ax.margins(y=0.16)  # room for two labels beside the lowest point
        axes[0].set_ylabel("change of probability in points")
        for ax in axes:  # when the limits, which they share, are final
            label_ends(ax, unit="")
        scores = {"maps": "combined", "random": "random_combined", "difference": "difference"}
        words = "; ".join(f"{name} {in_points(result[key])}" for name, key in scores.items())
        put_footnote(
            figure,
            f"Means over {result['images']:,} test images; removed pixels are filled in from their "
            "neighbours. Maps that tell what matters fall faster than random ones on the left and "
            "slower on the right.\n"
            f"Half of right less left, in points, with 95 % intervals: {words}.",
        )
    return figure
