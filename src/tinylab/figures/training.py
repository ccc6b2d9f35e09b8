"""Curves of a run: loss and accuracy, learning rate, range test."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from tinylab.figures.style import (  # isort: skip
    BLUE, DASHED, EDGE, FONT, MUTED, VERMILION, add_axes, annotate, clean, draw_line, from_zero,
    label_ends, message, new_figure, styled, whole_numbers,
)  # fmt: skip


def accuracy_and_loss(
    history: Sequence[Mapping],
    reference: Sequence[Mapping] | None = None,
    title: str = "",
    label: str = "this run",
) -> Figure:
    """Draw loss (left) and top-1 accuracy (right) per epoch, of training and, below, test images.

    history: `epoch` (from 1), `train_loss`, `test_loss` (mean cross-entropy, nats), `train_top1`,
    `test_top1` (percent). reference: the rows of results/reference/published_run.csv, drawn dashed.
    What it prints as test loss is the sum of its 129 batch means over 33,000 images, so 33000 / 129
    times that is the mean cross-entropy (within 0.013: it prints four decimals). Of its training
    loss it kept only each epoch's last batch, which is noisier than the epoch's mean.
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

    def column(rows: Sequence[Mapping], key: str) -> np.ndarray:
        """Return one column; NaN where a row lacks it."""
        values = [math.nan if row.get(key) in (None, "") else row[key] for row in rows]
        return np.array(values, dtype=float)

    with styled():
        figure = new_figure(5.6, title)
        axes = add_axes(figure, 2, 2, sharex=True, sharey="col")
        for ax, (name, key, its_key, its_label, factor, _) in zip(axes, panels, strict=True):
            ax.set_title(name)
            if reference:
                values = factor * column(reference, its_key)
                draw_line(ax, column(reference, "epoch"), values, its_label, MUTED, dashed=True)
            draw_line(ax, column(history, "epoch"), column(history, key), clean(label, 16), BLUE)
        whole_numbers(axes[0])
        axes[2].set_xlabel("epoch")
        axes[3].set_xlabel("epoch")
        from_zero(axes[0::2])
        from_zero(axes[1::2])
        for ax, panel in zip(axes, panels, strict=True):
            label_ends(ax, unit=panel[-1])
    return figure


def learning_rate_curve(
    learning_rates: Sequence[float],
    momenta: Sequence[float] | None = None,
    steps_per_epoch: int | None = None,
) -> Figure:
    """Draw learning rate, and momentum if given, at every step; the x axis counts epochs if it can."""
    curves = {"Learning rate": learning_rates} | ({"Momentum": momenta} if momenta else {})
    if not len(learning_rates):
        return message("The schedule has no steps: nothing to draw.")
    with styled():
        figure = new_figure(0.5 + 2.0 * len(curves))
        axes = add_axes(figure, len(curves), sharex=True)
        for ax, (name, values) in zip(axes, curves.items(), strict=True):
            x = np.arange(len(values)) / (steps_per_epoch or 1)
            ax.plot(x, values, color=BLUE)
            ax.set_title(name)
            ax.margins(x=0.08, y=0.2)
            # Start, turning point and end say it all; short or constant schedules have fewer.
            turn = int(np.argmax(np.abs(np.asarray(values) - values[0])))
            for step in {0, turn, len(values) - 1}:
                at = (x[step], values[step])
                ax.plot(*at, "o", color=BLUE, markersize=4)
                offset = (0, -13) if values[step] < np.mean(values) else (0, 6)
                annotate(ax, f"{values[step]:.4g}", at, offset, BLUE, "center")
        whole_numbers(axes[-1])
        axes[-1].set_xlabel("epoch" if steps_per_epoch else "step")
    return figure


def learning_rate_test(
    learning_rates: Sequence[float],
    losses: Sequence[float],
    smoothed: Sequence[float],
    suggestion: float | None = None,
) -> Figure:
    """Draw the loss while the learning rate grows step by step (Smith 2015), and the suggestion.

    One value for each step; losses in nats, of single batches and smoothed. What is not finite is
    left out, and what rises far above the start is cut off.
    """
    rates, raw, smooth = (np.asarray(each, float) for each in (learning_rates, losses, smoothed))
    known, shown = (np.isfinite(each) & (rates > 0) for each in (smooth, raw))
    if not known.any():
        return message("No step has a finite loss: nothing to draw.")
    with styled():
        figure = new_figure(3.8, "Learning-rate range test")
        (ax,) = add_axes(figure)
        ax.set_xscale("log")
        ax.plot(rates[shown], raw[shown], color=EDGE, linewidth=1.0, label="each batch")
        ax.plot(rates[known], smooth[known], color=BLUE, label="smoothed")
        lowest, start = min(smooth[known].min(), *raw[shown]), smooth[known][0]
        room = max(start - lowest, 0.05 * abs(start), 1e-6)
        ax.set_ylim(lowest - 0.1 * room, start + 0.75 * room)
        if suggestion is not None:
            ax.axvline(suggestion, color=VERMILION, **(DASHED | {"linewidth": 1.4}))
            text, look = f"suggestion {suggestion:.2g}", {"xycoords": ax.get_xaxis_transform()}
            annotate(ax, text, (suggestion, 1), (0, 3), VERMILION, "center", size=8.5, **look)
        none = ": no suggestion" if suggestion is None else ""
        ax.set(xlabel=f"learning rate{none}", ylabel="training loss")
        decades = np.ptp(np.log10(rates[rates > 0]))
        ax.xaxis.set_major_locator(LogLocator(subs=(1,) if decades > 2 else (1, 2, 5), numticks=12))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        ax.legend(loc="best", frameon=False, labelcolor=MUTED, prop={"family": FONT, "size": 8.5})
    return figure
