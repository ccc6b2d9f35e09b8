"""The look of every figure: sizes, colours, text that fits.

Nothing touches pyplot or global settings, so no figure lingers in memory and nobody else's style
changes. As the last value of a notebook's cell a figure shows itself. Class names are foreign text:
they are never read as formulas, lose characters that cannot be printed, and are cut to fit.
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
from matplotlib.colors import Colormap
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
    """A figure that a notebook shows without pyplot, whose inline backend is what shows figures
    otherwise."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        write_png(self, buffer, self.dpi)
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
        write_png(figure, temporary, dpi)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def message(text: str) -> Figure:
    """A figure that says why there is nothing to draw."""
    with styled():
        figure = new_canvas(1.2)
        ax = figure.add_axes((0, 0, 1, 1))
        ax.set_axis_off()
        ax.text(
            0.5, 0.5, fitted(text, WIDTH - 0.4, 11), size=11, color=MUTED, ha="center", va="center"
        )
    return figure


def clean(text: str, limit: int = 60) -> str:
    """One line of at most `limit` characters: what cannot be printed becomes a space, what is cut
    off an ellipsis."""
    printable = "".join(character if character.isprintable() else " " for character in text)
    line = " ".join(printable.split()) or "(no name)"
    return line if len(line) <= limit else line[: limit - 1].rstrip() + "…"


def fitted(text: str, inches: float, size: float, weight: str = "normal") -> str:
    """`clean` text, cut until it is at most `inches` wide."""
    line = clean(text, 200)
    most = max(
        int(inches * 72 / (0.25 * size)), 0
    )  # characters: an i is wider than a quarter of the size
    if len(line) <= most and text_width(line, size, weight) <= inches:
        return line
    lengths = range(min(len(line), most + 1))
    longest = (
        bisect_right(
            lengths, inches, key=lambda length: text_width(line[:length] + "…", size, weight)
        )
        - 1
    )
    return line[: max(longest, 0)].rstrip() + "…"


@lru_cache(10_000)
def text_width(text: str, size: float, weight: str = "normal") -> float:
    """The width of a line of text."""
    path = TextPath((0, 0), text, size=size, prop=FontProperties(family=FONT, weight=weight))
    return 1.05 * path.get_extents().width / 72  # on screen, glyphs are moved apart to whole pixels


def wrapped(text: str, inches: float, size: float) -> str:
    """`clean` text on one or two lines of at most `inches`."""
    lines = textwrap.wrap(
        clean(text), int(72 * inches / (0.6 * size)), max_lines=2, placeholder="…"
    )
    return "\n".join(fitted(line, inches, size) for line in lines)


@contextmanager
def styled() -> Iterator[None]:
    """The house style for what is made inside, whatever the settings around it; they come back
    unchanged."""
    with matplotlib.style.context(["default", STYLE]):
        yield


def write_png(figure: Figure, target: Path | io.BytesIO, dpi: float) -> None:
    with styled():  # without the library's name in the file, which would change with its version
        figure.savefig(target, format="png", dpi=dpi, metadata={"Software": None})


def new_figure(height: float, title: str = "") -> Figure:
    """A figure for axes, `height` in inches."""
    figure = SelfShowing(figsize=(WIDTH, height), layout="constrained")
    if title:
        figure.suptitle(
            fitted(title, WIDTH - 0.2, 11.5, "bold"), x=0.008, ha="left", size=11.5, weight="bold"
        )
    return figure


def add_axes(figure: Figure, rows: int = 1, columns: int = 1, **sharing: bool | str) -> np.ndarray:
    """A flat array of axes. Their ticks are made when the figure is drawn, outside the style, so
    they get it here."""
    axes = figure.subplots(rows, columns, squeeze=False, **sharing).ravel()
    for ax in axes:
        ax.tick_params(
            color=EDGE, labelcolor=MUTED, labelsize=8.5, labelfontfamily=FONT, length=3, width=0.8
        )
        ax.tick_params(grid_color=GRID, grid_linewidth=0.8)
    return axes


def new_canvas(height: float, title: str = "") -> Figure:
    """A figure for pictures placed by hand, `height` in inches."""
    figure = SelfShowing(figsize=(WIDTH, height))
    if title:
        put_text(
            figure, 0.08, 0.27, fitted(title, WIDTH - 1.6, 11.5, "bold"), size=11.5, weight="bold"
        )
    return figure


def title_height(title: str) -> float:
    """Inches that `new_canvas` needs above the pictures."""
    return 0.42 if title else 0.06


def put_text(
    figure: Figure, left: float, top: float, text: str, va: str = "baseline", **style: object
) -> None:
    """Text at `left`, `top` inches from the figure's upper left corner."""
    width, height = figure.get_size_inches()
    figure.text(left / width, 1 - top / height, text, va=va, **style)


def put_picture(figure: Figure, left: float, top: float, side: float, image: np.ndarray) -> Axes:
    """A square image of `side` inches, `left` and `top` inches from the figure's upper left
    corner."""
    width, height = figure.get_size_inches()
    ax = figure.add_axes((left / width, 1 - (top + side) / height, side / width, side / height))
    ax.imshow(image, interpolation="nearest", aspect="auto")
    ax.set_axis_off()
    return ax


def put_box(ax: Axes, box: Sequence[int]) -> None:
    """A frame around the pixels x0 y0 x1 y1, both ends included: light on a dark edge, so it shows
    on any picture."""
    x0, y0, x1, y1 = (int(value) for value in box)
    frame = Rectangle(
        (x0 - 0.5, y0 - 0.5), x1 - x0 + 1, y1 - y0 + 1, fill=False, edgecolor="white", linewidth=1.0
    )
    frame.set_path_effects([withStroke(linewidth=2.2, foreground="black", alpha=0.55)])
    ax.add_patch(frame)


def put_ramp(figure: Figure, left: float, top: float, wide: float, colors: str | Colormap) -> None:
    """A strip of all the colours of a scale."""
    width, height = figure.get_size_inches()
    ax = figure.add_axes((left / width, 1 - (top + 0.12) / height, wide / width, 0.12 / height))
    ax.imshow(np.linspace(0, 1, 256)[None], cmap=colors, aspect="auto")
    ax.set_axis_off()


def put_caption(
    figure: Figure, left: float, top: float, width: float, lines: Sequence[tuple], size: float = 8.5
) -> None:
    """Lines of a name on the left, cut to fit, a remark on the right, and their colour."""
    for number, (name, remark, color) in enumerate(lines):
        height = top + 0.17 * (number + 1)
        room = width - (text_width(remark, size) + 0.08 if remark else 0)
        put_text(figure, left, height, fitted(name, room, size), size=size, color=color)
        put_text(figure, left + width, height, remark, size=size, color=color, ha="right")


def put_names_key(figure: Figure, kinds: Mapping[str, str]) -> None:
    """The words in their colours, in the upper right corner."""
    right = WIDTH - 0.08
    for word, color in reversed(kinds.items()):
        put_text(figure, right, 0.27, word, size=8.5, color=color, weight="bold", ha="right")
        right -= text_width(word, 8.5, "bold") + 0.14


def put_footnote(figure: Figure, text: str) -> None:
    """Small text below the axes of a figure made by `new_figure`, wrapped to its width."""
    text = "\n".join(line for part in text.splitlines() for line in textwrap.wrap(part, 145))
    figure.supxlabel(text, x=0.008, ha="left", size=8, color=MUTED, linespacing=1.45)


def column_of(rows: Sequence[Mapping], key: str) -> list[float]:
    """One column as numbers; what a row lacks is left out of the line."""
    return [float(row[key]) if row.get(key) not in (None, "") else math.nan for row in rows]


def draw_line(
    ax: Axes, x: list[float], y: list[float], label: str, color: str, dashed: bool = False
) -> None:
    """A curve through the values there are, with a dot on the last one; `label_ends` names it."""
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


def whole_numbers(ax: Axes) -> None:
    """No ticks between two epochs or steps."""
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7, min_n_ticks=1))


def from_zero(axes: Sequence[Axes]) -> None:
    """One height for all `axes`, from 0 to a little above their highest value; labels need it
    final."""
    values = np.concatenate([line.get_ydata() for ax in axes for line in ax.lines])
    highest = max(values[np.isfinite(values)], default=0)
    for ax in axes:
        ax.set_ylim(0, 1.06 * highest or 1)


def label_ends(ax: Axes, unit: str) -> None:
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
        annotate(
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


def annotate(
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


def in_percent(estimate: Mapping | None) -> tuple[float, float, float] | None:
    """Mean and ends of the interval of a share, in percent, or None if nothing was measured."""
    if not estimate or estimate["mean"] is None:
        return None
    mean, low, high = (100 * estimate[key] for key in ("mean", "low", "high"))
    return mean, low, high


def in_points(estimate: Mapping | None) -> str:
    """A difference of shares with its interval, as text."""
    values = in_percent(estimate)
    return "{:+.1f} ({:+.1f} to {:+.1f})".format(*values).replace("-", "−") if values else "unknown"


def wilson(share: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a share of `count`, in percent (Wilson 1927)."""
    z = 1.96
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = (
        z
        / (1 + z * z / count)
        * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    )
    return 100 * (middle - half), 100 * (middle + half)
