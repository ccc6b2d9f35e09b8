"""A finished run as one HTML file to read: result, recipe, curves, tables, galleries, maps.

Everything is inside the file, figures as data URIs. It needs no script, and its own security
policy forbids it any. The text is report.html.j2, the looks are report.css. Class names and
whatever else a run's files hold are foreign text: jinja2 escapes all of it.
"""

import base64
import dataclasses
import hashlib
import re
import struct
from collections.abc import Mapping
from pathlib import Path

from markupsafe import Markup

from tinylab.figures.scores import wilson
from tinylab.files import printable
from tinylab.recipes import RECIPES, named
from tinylab.run.folder import Run
from tinylab.share.template import render

LONGEST = 160  # characters of a class name that are shown; Tiny ImageNet's longest has 121


def page(run: Run, explanation: Mapping) -> str:
    """Return the HTML page of a finished run; the same inputs give the same characters.

    explanation: what explain.json holds. The page says what is missing and which command makes it.
    """
    style = (Path(__file__).parent / "report.css").read_text(encoding="utf-8")
    filters = {
        "number": number, "count": lambda value: number(value, 0), "percent": percent,
        "points": points, "duration": duration, "interval": interval, "words": in_words,
        "shortened": shortened,
    }  # fmt: skip

    summary, recipe = run.summary, run.recipe
    usual = dataclasses.asdict(named(recipe.name)) if recipe.name in RECIPES else {}
    fields = []
    for name, value in dataclasses.asdict(recipe).items():
        other = None if usual.get(name, value) == value else in_words(usual[name])
        fields.append({"name": name, "value": in_words(value), "usual": other})
    files = {path.name: path.stat().st_size for path in run.folder.iterdir() if path.is_file()}
    files |= {path.name: None for path in run.folder.iterdir() if path.is_dir()}
    pictures = {}
    # A name with a path in it would put another picture of this disk on the page.
    for name in filter(re.compile("[a-z_]+").fullmatch, map(str, explanation["figures"])):
        path = run.figures / f"{name}.png"
        data = path.read_bytes() if path.is_file() else b""
        if data.startswith(b"\x89PNG") and len(data) >= 24:
            # Width and height keep a picture's place while it is decoded.
            width, height = struct.unpack(">II", data[16:24])
            uri = Markup("data:image/png;base64," + base64.b64encode(data).decode("ascii"))
            pictures[name] = {"uri": uri, "width": width // 2, "height": height // 2}  # 200 dpi
    optional = dict.fromkeys(("errors", "label_conflicts", "localisation", "faithfulness"))

    values = {
        "style": Markup(style), "title": run.title, "summary": summary, "history": run.history,
        "style_hash": base64.b64encode(hashlib.sha256(style.encode()).digest()).decode(),
        "identity": {name: each for name, each in run.identity.items() if name != "data_folder"},
        "environment": run.environment, "data": run.data, "recipe": fields,
        "interval95": wilson(summary["test_top1"] / 100, summary["test_images"]),
        "course_run": run.course_run[-1] if run.course_run else None, "recipe_name": recipe.name,
        "files": files, "pictures": pictures, "explanation": optional | dict(explanation),
    }  # fmt: skip
    text = render("report.html.j2", filters, values, autoescape=True, finalize=finalize)
    return text.lstrip()  # what stands between the template's macros


# --- How values are shown -------------------------------------------------------------------------


def finalize(value: object) -> object:
    """Return foreign text, which jinja2 will escape, without what is not printed, on one line."""
    if value is None:
        return "unknown"
    if not isinstance(value, str) or hasattr(value, "__html__"):
        return value
    one_line = re.sub(r"[^\S\u00a0]+", " ", value)
    return shortened(printable(one_line, len(one_line)), 10 * LONGEST)


def shortened(text: object, limit: int = LONGEST) -> str:
    """Return at most so many characters."""
    text = str(text)
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def in_words(value: object) -> str:
    """Return a field of a recipe or of an environment in words."""
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    if isinstance(value, Mapping):
        known = {name: each for name, each in value.items() if each is not None}
        return "; ".join(f"{name} {in_words(each)}" for name, each in known.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(in_words, value)) or "none"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def number(value: object, digits: int = 2) -> str:
    """Return a number with so many decimals, a dash for None."""
    if isinstance(value, int | float):
        return f"{value:,.{digits}f}"
    return "–" if value is None else str(value)


def percent(share: float | None, digits: int = 1) -> str:
    """Return a share in 0..1 in percent."""
    return "–" if share is None else f"{100 * share:.{digits}f}\u00a0%"


def points(share: float | None) -> str:
    """Return a difference of shares with its sign; the minus as wide as the plus."""
    return "–" if share is None else f"{100 * share:+.1f}".replace("-", "−")


def interval(estimate: Mapping | None, kind: str = "percent") -> str:
    """Return an estimate as HTML, its 95 % interval below it: `mean`, `low` and `high`, shares."""
    if estimate is None:
        return "–"
    show = points if kind == "points" else lambda share: f"{100 * share:.1f}"
    mean, low, high = (show(estimate[name]) for name in ("mean", "low", "high"))
    return Markup('<b>{}</b> <span class="interval">{} to {}</span>').format(mean, low, high)


def duration(seconds: float) -> str:
    """Return seconds in the unit that suits them."""
    for unit, size in (("hours", 3600), ("minutes", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} seconds"
