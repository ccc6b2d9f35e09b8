"""Scores: per class, confusions, calibration, maps against boxes, ROAD."""

import math
from collections.abc import Mapping, Sequence
from itertools import product

import numpy as np
from matplotlib.colors import LinearSegmentedColormap, Normalize, PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tinylab.figures.style import (  # isort: skip
    BLUE, DASHED, EDGE, INK, KINDS, MUTED, NOTE, RAMP, VERMILION, WIDTH, annotate, clean, draw_line,
    fitted, label_ends, message, new_canvas, new_figure, put_caption, put_footnote, put_names_key,
    put_picture, put_text, styled, text_width,
)  # fmt: skip


GOOD = LinearSegmentedColormap.from_list("right", ("#eaf2f8", BLUE, "#00304d"))
BAD = LinearSegmentedColormap.from_list("wrong", ("#f3f4f6", "#f3b185", VERMILION, "#5c1e00"))


@styled
def class_accuracy(
    names: Sequence[str], accuracies: Sequence[float], counts: Sequence[int], best: int = 10,
    worst: int = 10,
) -> Figure:  # fmt: skip
    """Draw the best and the worst classes (all if they are few) as bars, and the mean of all.

    accuracies in percent, counts test images of each class. The thin lines, 95 % intervals, show
    what more images of a class would; they do not allow for having picked the extremes.
    """
    accuracy, count = np.asarray(accuracies, float), np.asarray(counts)
    known = [i for i in np.argsort(-accuracy, kind="stable") if count[i] > 0]
    if not known:
        return message("No class has test images: nothing to draw.")
    heading = f"Accuracy per class: the {best} best and {worst} worst of {len(known)}"
    if len(known) <= best + worst:
        best, worst, heading = len(known), 0, f"Accuracy per class, all {len(known)}"
    shown = known[:best] + known[len(known) - worst :]
    low, high = wilson(accuracy[shown] / 100, count[shown])
    y = np.arange(len(shown))
    y[best:] += 1  # a gap
    figure, (ax,) = new_figure(1.4 + 0.2 * y[-1], heading)
    ax.barh(y, accuracy[shown], height=0.68, color=[BLUE] * best + [VERMILION] * worst, alpha=0.85)
    ax.plot([low, high], [y, y], color=INK, linewidth=0.9)
    for share, end, at in zip(accuracy[shown], high, y, strict=True):
        look = {"color": INK, "ha": "left", "va": "center", "size": 8.5}
        annotate(ax, f"{share:.1f} %", (end, at), (5, 0), **look)
    mean = accuracy[known].mean()
    ax.axvline(mean, color=MUTED, linewidth=1.0, linestyle=(0, (3, 2)), zorder=0)
    look = {"color": MUTED, "ha": "center", "size": 8.5, "xycoords": ax.get_xaxis_transform()}
    annotate(ax, f"mean of all classes {mean:.1f} %", (mean, 1), (0, 3), **look)
    ax.set_yticks(y, [fitted(names[i], 2.2, 8.5) for i in shown], parse_math=False)
    ax.tick_params(axis="y", length=0, labelcolor=INK)
    ax.grid(axis="y", visible=False)
    ax.set(xlim=(0, 108), ylim=(y[-1] + 0.6, -0.7), xticks=range(0, 101, 20))
    fewest, most = count[known].min(), count[known].max()
    of = f"{most:,}" if fewest == most else f"{fewest:,} to {most:,}"
    ax.set_xlabel(f"top-1 accuracy in % of {of} test images per class; thin lines: 95 % intervals")
    return figure


@styled
def confusion(matrix: np.ndarray, names: Sequence[str], order: Sequence[int]) -> Figure:
    """Draw how often each class (rows) was predicted as each class (columns), in % of the row.

    matrix: counts, integer (C, C). order: (C,), of the classes on both axes: blocks show if it puts
    confused classes side by side. Right answers, on the diagonal, have a scale of their own, or the
    mistakes would drown. Up to 30 classes are all named; of more, those most often mistaken.
    """
    if not np.sum(matrix):
        return message("No class has test images: nothing to draw.")
    matrix = matrix[np.ix_(order, order)]
    images, classes = matrix.sum(axis=1, keepdims=True), len(matrix)
    shares = np.where(images > 0, 100 * matrix / np.maximum(images, 1), np.nan)
    diagonal = np.eye(classes, dtype=bool)
    worst = np.where(diagonal | (images == 0), 0, shares).max(axis=1)
    every, size, room = (True, 8.5, 1.8) if classes <= 30 else (False, 7.5, 1.5)

    # ---- sizes, in inches ----
    labels = [fitted(names[i], room, size) for i in order]
    widest = max(text_width(label, size) for label in labels) if every else room
    left, top, below = 0.4 + max(widest, 0.4), 1.0, 0.4 + (0.75 * widest if every else 0)
    # Cells have whole pixels, or they would be uneven.
    cell = max(min(math.floor(100 * (WIDTH - left - 0.12) / classes), 72), 1) / 100
    side = cell * classes
    bottom = top + side + below
    share = f"{100 * np.trace(matrix) / matrix.sum():.1f} % of {matrix.sum():,} predictions"
    title = f"{classes} class{'' if classes == 1 else 'es'}: {share} are right"
    figure = new_canvas(math.ceil(100 * bottom + 44) / 100, title)

    # ---- each scale's key and cells, with numbers where they are large enough ----
    highest = next(each for each in (1, 2, 5, 10, 20, 50, 100) if each >= worst.max())
    # Many classes have no numbers: the root shows rare mistakes beside the most frequent one.
    norm = Normalize(0, highest) if every else PowerNorm(0.5, 0, highest)
    root = "" if every else " (square-root scale)"
    right = ("right (diagonal), % of the row", diagonal, GOOD, Normalize(0, 100))
    wrong = (f"mistakes, % of the row{root}", ~diagonal, BAD, norm)
    ax = put_picture(figure, left, top, side, np.ones((classes, classes, 3)))
    for i, (name, part, colors, scale) in enumerate((right, wrong)):
        start, look = left + 2.5 * i, {"color": MUTED, "size": 7.5}
        put_text(figure, start, 0.54, name, **NOTE)
        put_picture(figure, start, 0.6, 2.1, cmap=colors, **RAMP)
        for at, ha in ((0, "left"), (0.5, "center"), (1, "right")):
            put_text(figure, start + 2.1 * at, 0.86, f"{scale.inverse(at):g}", ha=ha, **look)
        values = np.ma.array(shares, mask=~part | np.isnan(shares))
        ax.imshow(values, cmap=colors, norm=scale, interpolation="nearest", aspect="auto")
        for row, column in np.argwhere(part & (shares > 0)) if cell >= 0.25 else ():
            share = shares[row, column]
            dark = np.dot(colors(scale(share))[:3], (0.3, 0.59, 0.11)) < 0.55
            look = {"size": min(8.5, 26 * cell), "ha": "center", "va": "center_baseline"}
            text = "<1" if share < 0.5 else f"{share:.0f}"
            ax.text(column, row, text, color="white" if dark else INK, **look)
    if cell >= 0.1:
        edges, look = np.arange(1, classes) - 0.5, {"color": "white", "linewidth": 0.8}
        ax.hlines(edges, -0.5, classes - 0.5, **look)
        ax.vlines(edges, -0.5, classes - 0.5, **look)

    # ---- names: of many classes as many as there is room for, the most confused first ----
    named = []
    for i in np.argsort(-worst, kind="stable"):
        near = any(abs(i - j) < math.ceil(0.12 / cell) for j in named)
        if not every and (near or worst[i] == 0):
            continue
        named.append(i)
        at, look = (i + 0.5) * cell, {"size": size, "ha": "right"}
        put_text(figure, left - 0.05, top + at, labels[i], va="center_baseline", **look)
        if every:
            look |= {"rotation": 45, "rotation_mode": "anchor", "va": "center"}
            put_text(figure, left + at, top + side + 0.09, labels[i], **look)
    look = {"color": MUTED, "ha": "center", "va": "center"}
    put_text(figure, 0.14, top + side / 2, "actual class", rotation=90, **look)
    put_text(figure, left + side / 2, bottom - 0.18, "predicted class", **look)
    most = "most often mistaken for one other, as far as there is room"
    which = "" if every else f"Named are the classes that are {most}. "
    notes = (
        "Same order on both axes: a block on the diagonal is a group of classes that are confused "
        f"with each other.\n{which}{'' if images.all() else 'White rows: no test images.'}"
    )
    put_text(figure, 0.08, bottom + 0.02, notes.rstrip(), va="top", linespacing=1.45, **NOTE)
    return figure


@styled
def confused_pairs(
    pairs: Sequence[Mapping], thumbnails: Sequence[tuple[np.ndarray, np.ndarray]], title: str = ""
) -> Figure:
    """Draw pairs of classes that are confused, with up to three images of each mistake.

    pairs: `pairs` of `explain.mistakes.Errors`. thumbnails: for each, uint8 (k, h, w, 3) of images
    of `one` that were predicted as `other`, and of the reverse.
    """
    if not pairs:
        return message("No class was mistaken for another: there is no confused pair.")
    margin, gutter, side, near, far, text, columns = 0.08, 0.32, 0.64, 0.02, 0.1, 0.4, 2
    half = 3 * side + 2 * near
    column, height = (WIDTH - 2 * margin + 0.16) / columns, text + side + 0.2
    bottom = 0.42 + math.ceil(len(pairs) / columns) * height
    figure = new_canvas(bottom + 0.24, title or "Classes that are confused most often")
    put_names_key(figure, KINDS)
    for i, (pair, pictures) in enumerate(zip(pairs, thumbnails, strict=True)):
        left, upper = margin + i % columns * column, 0.42 + i // columns * height
        total = str(pair["count"])
        put_text(figure, left, upper + 0.34, total, size=min(10, 28 / len(total)), weight="bold")
        ways = (("one", "other", "one_as_other"), ("other", "one", "other_as_one"))
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
        "Bold: test images of either class that were predicted as the other; below, up to three of "
        "them each way."
    )
    put_text(figure, margin, bottom + 0.14, notes, **NOTE)
    return figure


@styled
def reliability(calibration: Mapping) -> Figure:
    """Draw a `calibration` of `explain.mistakes`: accuracy against confidence, counts below."""
    if not sum(calibration["before"]["count"]):
        return message("No test images: nothing to draw.")
    look = {"sharex": True, "sharey": "row", "height_ratios": (3, 1)}
    figure, axes = new_figure(5.6, "When the network is sure, is it right?", 2, 2, **look)
    scaled = f"After temperature scaling (T = {calibration['temperature']:.2f})"
    halves = ((calibration["before"], "As trained"), (calibration["after"], scaled))
    for (result, name), ax, below in zip(halves, axes[:2], axes[2:], strict=True):
        # ---- accuracy against confidence ----
        ax.plot([0, 100], [0, 100], color=MUTED, **DASHED)
        counts = np.array(result["count"])
        share = np.array((result["confidence"], result["accuracy"]), float)[:, counts > 0]
        confidence, accuracy = 100 * share
        interval = wilson(share[1], counts[counts > 0])
        ax.plot([confidence, confidence], interval, color=INK, linewidth=0.9)
        look = {"marker": "o", "markersize": 4.5, "linewidth": 1.2, "clip_on": False}
        ax.plot(confidence, accuracy, color=BLUE, **look)
        title = f"{name}: ECE {100 * result['ece']:.1f} %"
        ax.set(xlim=(0, 100), ylim=(0, 100), xticks=range(0, 101, 20), title=title)
        look = {"color": MUTED, "size": 8.5}
        annotate(ax, "underconfident", (3, 95), (0, 0), ha="left", va="top", **look)
        annotate(ax, "overconfident", (97, 5), (0, 0), ha="right", va="bottom", **look)

        # ---- counts ----
        middles = 100 * (np.arange(len(counts)) + 0.5) / len(counts)
        below.bar(middles, counts, width=88 / len(counts), color=BLUE, alpha=0.85)
        below.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=3))
        below.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        below.set_xlabel("confidence in %")
        mean, right = 100 * result["mean_confidence"], 100 * result["accuracy_overall"]
        text = f"{mean:.1f} % confidence on average, {right:.1f} % right"
        below.set_title(text, size=8.5, weight="normal", color=MUTED)
    axes[0].set_ylabel("accuracy in %")
    axes[2].set_ylabel("predictions")
    note = fitted(calibration["note"], WIDTH - 0.4, 8) if calibration.get("note") else ""
    put_footnote(
        figure,
        "ECE, the expected calibration error, is how far the dots are from the dashed line, on "
        "average over the predictions. Black lines: 95 % intervals.\nEach half of the images was "
        "scaled by the temperature that fits the other half; T is their mean.\n"
        f"{note[:1].upper()}{note[1:]}",
    )
    return figure


@styled
def localisation(summary: Mapping) -> Figure:
    """Draw the summary of a `Localisation`, and `method`: how far the maps look at the object."""
    if not any(group["images"] for group in summary["groups"]):
        return message("No image was scored: nothing to draw.")
    rows, width = summary["native_size"]
    maps = f"{clean(summary['method'], 24)}, {clean(summary['stage'], 24)} ({width} × {rows})"
    figure, axes = new_figure(5.6, f"Do the maps look at the object? {maps}", 2, 2, sharex=True)
    measures = (
        ("hit", "Highest point", {"centre_hit": "D", "uniform": "|"}, "hit_minus_centre", "centre"),
        ("energy", "Share of map", {"uniform": "|"}, "energy_minus_uniform", "even map"),
    )
    panels = product((("all", "all boxes"), ("below half", "small boxes")), measures)
    for ax, ((boxes, which), measure) in zip(axes, panels, strict=True):
        key, name, baselines, difference, against = measure
        groups = [group for group in summary["groups"] if group["boxes"] == boxes]
        labels = []
        for y, group in enumerate(groups):
            of = "" if group["class"] == "both" else f", {group['class']} class"
            labels.append(f"{group['answers']}{of} ({group['images']:,})")
            look = {"ha": "left", "va": "center_baseline"}
            if not (measured := in_percent(group[key])):
                annotate(ax, "no images", (0, y), (5, 0), size=8.5, color=MUTED, **look)
                continue
            for baseline, marker in baselines.items():
                if at := in_percent(group[baseline]):
                    shape = {"markersize": 5 if marker == "D" else 11, "markeredgewidth": 1.4}
                    shape |= {"markerfacecolor": "white", "clip_on": False}
                    ax.plot(at[0], y, marker, color=MUTED, **shape)
            mean, *interval = measured
            color = KINDS.get(group["class"], INK)
            ax.plot(interval, [y, y], color=color, linewidth=1.6, clip_on=False)
            ax.plot(mean, y, "o", color=color, markersize=5.5, clip_on=False)
            look |= {"size": 8, "color": INK, "xycoords": ax.get_yaxis_transform()}
            annotate(ax, in_points(group[difference]), (1, y), (8, 0), **look)
        look = {"size": 8, "color": MUTED, "ha": "left", "xycoords": "axes fraction"}
        annotate(ax, f"minus {against}", (1, 1), (8, 4), **look)
        ax.set_yticks(range(len(groups)), labels, parse_math=False)
        ax.set(xlim=(0, 100), ylim=(len(groups) - 0.5, -0.5), xticks=range(0, 101, 20))
        ax.set_title(f"{name}, {which}")
        ax.tick_params(axis="y", length=0, labelleft=key == "hit", labelcolor=INK)
        ax.grid(axis="y", visible=False)
    axes[2].set_xlabel("images with it in the box, %")
    axes[3].set_xlabel("mean share in the box, %")
    put_footnote(
        figure,
        "Dots: the maps. Diamonds: the centre of the image as the point. Bars: a map that is the "
        "same everywhere. Small boxes: below half of the image.\nOn the right: the difference in "
        "points; at 0 the maps are no better. Lines, brackets: 95 % intervals.",
    )
    return figure


@styled
def faithfulness(result: Mapping) -> Figure:
    """Draw how the predicted probability changes when pixels are removed in the map's order.

    ROAD (Rong et al. 2022). result: of `explain.road`, and `method`. Its percentiles are the
    library's: at 80 the first 20 % of the pixels are removed.
    """
    if not result["images"]:
        return message("No image was scored: nothing to draw.")
    removed = 100 - np.asarray(result["percentiles"], float)
    order = np.argsort(removed)
    maps = f"{clean(result['method'], 24)}, {clean(result['stage'], 24)}"
    title = f"Does the prediction rest on what the maps show? {maps}"
    figure, axes = new_figure(4.4, title, 1, 2, sharey=True)
    for ax, which in zip(axes, ("most", "least"), strict=True):
        ax.set(title=f"{which.capitalize()} relevant pixels first", xlabel="removed pixels in %")
        ax.hlines(0, 0, 100, color=EDGE, linewidth=1.0, zorder=1)
        kinds = (result[kind][f"{which}_relevant_first"] for kind in ("random", "map"))
        random, ours = (100 * np.array(each, float)[order] for each in kinds)  # None becomes NaN
        draw_line(ax, removed[order], random, "random maps", color=MUTED, **DASHED)
        draw_line(ax, removed[order], ours, "the maps", color=BLUE)
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


def in_percent(estimate: Mapping | None) -> list[float] | None:
    """Return a share's mean and the ends of its interval in percent; None: not measured."""
    if not estimate or estimate["mean"] is None:
        return None
    return [100 * estimate[key] for key in ("mean", "low", "high")]


def in_points(estimate: Mapping | None) -> str:
    """Return a difference of shares with its interval, as text."""
    values = in_percent(estimate)
    return "{:+.1f} ({:+.1f} to {:+.1f})".format(*values).replace("-", "−") if values else "unknown"


def wilson(share: np.ndarray, count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the ends of the 95 % intervals of shares of `count`, in percent (Wilson 1927)."""
    z2 = 1.96**2 / count
    middle, half = share + z2 / 2, np.sqrt(z2 * share * (1 - share) + z2 * z2 / 4)
    return 100 * (middle - half) / (1 + z2), 100 * (middle + half) / (1 + z2)
