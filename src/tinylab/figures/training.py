"""Curves of a run: loss and accuracy, learning rate, range test."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from tinylab.figures.style import (  # isort: skip
    BLUE, DASHED, EDGE, MUTED, VERMILION, annotate, draw_line, label_ends, message,
    new_figure, styled,
)  # fmt: skip


@styled
def accuracy_and_loss(
    history: Sequence[Mapping], reference: Sequence[Mapping] = (), title: str = ""
) -> Figure:
    """Draw loss (left) and top-1 accuracy (right) per epoch, of training and of test images.

    history: `epoch` (from 1), `train_loss`, `test_loss` (mean cross-entropy, nats), `train_top1`,
    `test_top1` (percent). reference: the rows of results/reference/published_run.csv, whose
    accuracies are drawn dashed; its losses are of another kind (a last batch, a sum of means).
    """
    if not history:
        return message("No epoch is finished yet: nothing to draw.")
    figure, (losses, accuracies) = new_figure(3.3, title, 1, 2)
    if reference:
        epochs = [row["epoch"] for row in reference]
        for key, name in (("test_accuracy_pct", "test"), ("train_accuracy_pct", "training")):
            values = [row[key] for row in reference]
            draw_line(accuracies, epochs, values, f"course run, {name}", color=MUTED, **DASHED)
    names = ("Loss (mean cross-entropy)", "Accuracy (top-1, %)")
    epochs = [row["epoch"] for row in history]
    for ax, kind, name in zip((losses, accuracies), ("loss", "top1"), names, strict=True):
        trained, tested = ([row.get(f"{on}_{kind}") for row in history] for on in ("train", "test"))
        draw_line(ax, epochs, trained, "training", color=VERMILION)
        draw_line(ax, epochs, tested, "test", color=BLUE)
        ax.set(title=name, xlabel="epoch")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7, min_n_ticks=1))
        values = np.array([y for line in ax.lines for y in line.get_ydata()])
        if ax is losses and len(values) >= 10:  # a few spikes of many values are cut off
            firsts = [y for line in ax.lines for y in line.get_ydata()[:1]]
            limit = max(2 * np.percentile(values, 90, method="lower"), *firsts)
            values = values[values <= limit]
        ax.set_ylim(0, 1.06 * values.max(initial=0) or 1)
        label_ends(ax, unit=" %" if ax is accuracies else "")
    return figure


@styled
def learning_rate_curve(
    learning_rates: Sequence[float], momenta: Sequence[float] | None = None,
    steps_per_epoch: int | None = None,
) -> Figure:  # fmt: skip
    """Draw learning rate, and momentum if given, at every step; x counts epochs if it can."""
    if not len(learning_rates):
        return message("The schedule has no steps: nothing to draw.")
    curves = {"Learning rate": learning_rates} | ({"Momentum": momenta} if momenta else {})
    figure, axes = new_figure(0.5 + 2.0 * len(curves), "", len(curves), sharex=True)
    for ax, (name, values) in zip(axes, curves.items(), strict=True):
        x = np.arange(len(values)) / (steps_per_epoch or 1)
        ax.plot(x, values, color=BLUE)
        ax.set_title(name)
        ax.margins(x=0.08, y=0.2)
        # Start, turning point and end say it all; short or constant schedules have fewer.
        turn = int(np.argmax(np.abs(np.asarray(values) - values[0])))
        for step in {0, turn, len(values) - 1}:
            at, up = (x[step], values[step]), 6 if values[step] >= np.mean(values) else -13
            ax.plot(*at, "o", color=BLUE, markersize=4)
            annotate(ax, f"{values[step]:.2g}", at, (0, up), color=BLUE, ha="center")
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7, min_n_ticks=1))
    axes[-1].set_xlabel("epoch" if steps_per_epoch else "step")
    return figure


@styled
def learning_rate_test(
    learning_rates: Sequence[float], losses: Sequence[float], smoothed: Sequence[float],
    suggestion: float | None = None,
) -> Figure:  # fmt: skip
    """Draw the loss while the learning rate grows step by step (Smith 2015), and the suggestion.

    One value for each step; losses in nats, of single batches and smoothed. What is not finite is
    left out, and what rises far above the start is cut off.
    """
    rates, raw, smooth = (np.asarray(each, float) for each in (learning_rates, losses, smoothed))
    known, shown = (np.isfinite(each) & (rates > 0) for each in (smooth, raw))
    if not known.any():
        return message("No step has a finite loss: nothing to draw.")
    figure, (ax,) = new_figure(3.8, "Learning-rate range test")
    ax.set(xscale="log", xlabel="learning rate: no suggestion", ylabel="training loss")
    ax.plot(rates[shown], raw[shown], color=EDGE, linewidth=1.0, label="each batch")
    ax.plot(rates[known], smooth[known], color=BLUE, label="smoothed")
    lowest, start = min(smooth[known].min(), *raw[shown]), smooth[known][0]
    room = max(start - lowest, 0.05 * abs(start), 1e-6)
    ax.set_ylim(lowest - 0.1 * room, start + 0.75 * room)
    if suggestion is not None:
        ax.set_xlabel("learning rate")
        ax.axvline(suggestion, color=VERMILION, **(DASHED | {"linewidth": 1.4}))
        look = {"color": VERMILION, "ha": "center", "xycoords": ax.get_xaxis_transform()}
        annotate(ax, f"suggestion {suggestion:.2g}", (suggestion, 1), (0, 3), size=8.5, **look)
    decades = np.ptp(np.log10(rates[rates > 0]))
    ax.xaxis.set_major_locator(LogLocator(subs=(1,) if decades > 2 else (1, 2, 5), numticks=12))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.legend(loc="best", frameon=False, labelcolor=MUTED, fontsize=8.5)
    return figure
