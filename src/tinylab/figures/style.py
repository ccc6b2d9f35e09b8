"""The look of every figure: sizes, colours, text that fits.

Nothing touches pyplot or global settings, so no figure lingers in memory and nobody else's style
changes. Class names are foreign text: they are never read as formulas, lose characters that cannot
be printed, and are cut to fit. What is put by hand has its place in inches from the upper left.
"""

import contextlib
import io
import os
import textwrap
import warnings
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from functools import lru_cache
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

from tinylab.exceptions import UserError

DPI = 200  # of files: sharp on screens of two pixels a point
WIDTH = 9.0  # inches: at 100 dpi about the width of a README column on GitHub
FONT = "DejaVu Sans"  # comes with matplotlib: the same picture on every machine
INK, MUTED, EDGE, GRID = "#1f2328", "#656d76", "#afb8c1", "#e4e7eb"
BLUE, VERMILION = "#0072b2", "#c2410c"  # stay apart for colour-blind eyes and in grey
KINDS = {"predicted": VERMILION, "actual": BLUE}
HEAT = "inferno"  # its lightness rises evenly, unlike that of the customary jet
NOTE = {"color": MUTED, "size": 8}
LABEL = {"color": MUTED, "size": 8.5}
HEADING = {"size": 11.5, "weight": "bold"}
RAMP = {"image": np.linspace(0, 1, 256)[None], "high": 0.12, "interpolation": None}  # all colours
DASHED = {"linestyle": (0, (3, 1.6)), "linewidth": 1.2}
STYLE = {
    "font.family": FONT, "font.size": 9, "text.color": INK, "text.parse_math": False,
    "axes.titlesize": 10, "axes.titlelocation": "left", "axes.titleweight": "bold",
    "axes.labelcolor": MUTED, "axes.edgecolor": EDGE, "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True, "grid.color": GRID,
    "lines.linewidth": 1.8, "lines.solid_capstyle": "round",
}  # fmt: skip
styled = matplotlib.style.context(["default", STYLE])
"""Decorator: what the function makes or draws has this style, whatever the settings around it."""


class SelfShowing(Figure):
    """A figure that a notebook shows without pyplot's inline backend."""

    @styled
    def _repr_png_(self, dpi: int = 100) -> bytes:
        """Return a PNG file without matplotlib's version: the same picture has the same bytes."""
        buffer = io.BytesIO()
        with warnings.catch_warnings(action="ignore"):  # a sign that the font lacks is a box
            self.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
        return buffer.getvalue()


def save(figure: SelfShowing, path: Path, dpi: int = DPI) -> Path:
    """Write a PNG, whole or not at all, and return its path. Raise `UserError` if that fails."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(figure._repr_png_(dpi))
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    return path


def clean(text: str, limit: int = 60) -> str:
    """Return one line of at most `limit` characters, without what cannot be printed."""
    printable = "".join(character if character.isprintable() else " " for character in text)
    line = " ".join(printable.split()) or "(no name)"
    return line if len(line) <= limit else line[: limit - 1].rstrip() + "…"


@lru_cache(10_000)
def text_width(text: str, size: float, weight: str = "normal") -> float:
    """Return the width of a line of text in inches."""
    path = TextPath((0, 0), text, size=size, prop=FontProperties(family=FONT, weight=weight))
    return 1.05 * path.get_extents().width / 72  # on screen, glyphs are moved apart to whole pixels


def fitted(text: str, inches: float, size: float, weight: str = "normal") -> str:
    """Return `clean` text, cut until it is at most `inches` wide."""
    line = clean(text, 200)
    if text_width(line, size, weight) <= inches:
        return line
    cuts = [line[:length] + "…" for length in range(len(line))]
    fitting = bisect_right(cuts, inches, key=lambda cut: text_width(cut, size, weight))
    return line[: max(fitting - 1, 0)].rstrip() + "…"


def new_canvas(height: float, title: str = "") -> Figure:
    """Return a figure for pictures placed by hand, `height` in inches."""
    figure = SelfShowing(figsize=(WIDTH, height))
    if title:
        put_text(figure, 0.08, 0.27, fitted(title, WIDTH - 1.6, **HEADING), **HEADING)
    return figure


def title_height(title: str) -> float:
    """Return the inches that `new_canvas` needs above the pictures."""
    return 0.42 if title else 0.06


@styled
def message(text: str) -> Figure:
    """Return a figure that says why there is nothing to draw."""
    figure, look = new_canvas(1.2), {"size": 11, "color": MUTED, "ha": "center", "va": "center"}
    put_text(figure, WIDTH / 2, 0.6, fitted(text, WIDTH - 0.4, 11), **look)
    return figure


def put_text(figure: Figure, left: float, top: float, text: str, **style: object) -> None:
    """Write text, by default on a line at `top`."""
    width, height = figure.get_size_inches()
    figure.text(left / width, 1 - top / height, text, **style)


def put_picture(
    figure: Figure, left: float, top: float, wide: float, image: np.ndarray,
    high: float | None = None, box: Sequence[int] | None = None, **look: object,
) -> Axes:  # fmt: skip
    """Show an image, perhaps with a box's pixels (x0 y0 x1 y1) framed, and return its axes."""
    width, height = figure.get_size_inches()
    high = high or wide
    ax = figure.add_axes((left / width, 1 - (top + high) / height, wide / width, high / height))
    ax.set_axis_off()
    ax.imshow(image, aspect="auto", **({"interpolation": "nearest"} | look))
    if box is not None:
        x0, y0, x1, y1 = map(int, box)
        at, size = (x0 - 0.5, y0 - 0.5), (x1 - x0 + 1, y1 - y0 + 1)
        frame = Rectangle(at, *size, fill=False, edgecolor="white", linewidth=1.0)
        # Light on a dark edge shows on any picture.
        frame.set_path_effects([withStroke(linewidth=2.2, foreground="black", alpha=0.55)])
        ax.add_patch(frame)
    return ax


def put_caption(
    figure: Figure, left: float, top: float, width: float, lines: Sequence[tuple], size: float = 8.5
) -> None:
    """Write lines of a name on the left, cut to fit, a remark on the right, and their colour."""
    for number, (name, remark, color) in enumerate(lines, start=1):
        height, look = top + 0.17 * number, {"size": size, "color": color}
        room = width - (text_width(remark, size) + 0.08 if remark else 0)
        put_text(figure, left, height, fitted(name, room, size), **look)
        put_text(figure, left + width, height, remark, ha="right", **look)


def put_names_key(figure: Figure, kinds: Mapping[str, str]) -> None:
    """Write the words in their colours in the upper right corner."""
    right = WIDTH - 0.08
    for word, color in reversed(kinds.items()):
        put_text(figure, right, 0.27, word, size=8.5, color=color, weight="bold", ha="right")
        right -= text_width(word, 8.5, "bold") + 0.14


def new_figure(
    height: float, title: str, rows: int = 1, columns: int = 1, **sharing: object
) -> tuple[Figure, np.ndarray]:
    """Return a figure, `height` in inches, and a flat array of its axes."""
    figure = SelfShowing(figsize=(WIDTH, height), layout="constrained")
    if title:
        figure.suptitle(fitted(title, WIDTH - 0.2, **HEADING), x=0.008, ha="left", **HEADING)
    axes = figure.subplots(rows, columns, squeeze=False, **sharing).ravel()
    for ax in axes:
        ax.tick_params(color=EDGE, labelcolor=MUTED, labelsize=8.5, length=3)
    return figure, axes


def put_footnote(figure: Figure, text: str) -> None:
    """Write small text below the axes, wrapped to the figure's width."""
    text = "\n".join(line for part in text.splitlines() for line in textwrap.wrap(part, 145))
    figure.supxlabel(text, x=0.008, ha="left", linespacing=1.45, **NOTE)


def draw_line(ax: Axes, x: Sequence, y: Sequence, label: str, **style: object) -> None:
    """Draw a curve through the values there are, its last one a dot; `label_ends` names it."""
    x, y = np.asarray(x, float), np.asarray(y, float)  # None becomes NaN
    known = np.isfinite(y)
    dot = {"marker": "o", "markersize": 4, "markevery": slice(-1, None)}
    ax.plot(x[known], y[known], label=label, **dot, **style)


def label_ends(ax: Axes, unit: str) -> None:
    """Write each line's name and last value right of all lines, pushed apart; limits are final."""
    bottom, top = ax.get_ylim()
    lines = [line for line in ax.lines if len(line.get_xdata())]
    ends = [[min((line.get_ydata()[-1] - bottom) / (top - bottom), 1), line] for line in lines]
    ends.sort(key=lambda end: end[0])
    apart = 12 / (72 * ax.figure.get_figheight() * ax.get_position().height)  # 12 points
    for lower, upper in [*pairwise(ends)] * 8:  # pushing one pair apart may close another
        overlap = apart - (upper[0] - lower[0])
        if overlap > 0:
            lower[0] -= overlap / 2
            upper[0] += overlap / 2
    right = max((line.get_xdata()[-1] for line in lines), default=0)
    look = {"va": "center", "ha": "left", "xycoords": ax.get_xaxis_transform(), "size": 8.5}
    for height, line in ends:
        text = f"{line.get_label()} {line.get_ydata()[-1]:.2f}{unit}".replace("-", "−")
        annotate(ax, text, (right, height), (7, 0), color=line.get_color(), **look)


def annotate(ax: Axes, text: str, at: tuple, offset: tuple, **style: object) -> None:
    """Write text `offset` points away from `at`, on white."""
    box = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
    ax.annotate(text, at, offset, textcoords="offset points", bbox=box, **style)
