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

from tinylab.exceptions import UserError
from tinylab.files import printable
from tinylab.recipe import Recipe
from tinylab.recipes import RECIPES, named
from tinylab.run.folder import Run, published_history

LONGEST = 160
"""Characters of a class name that are shown; the longest of Tiny ImageNet has 121."""

METHOD_NAMES = {
    "gradcam": "Grad-CAM", "gradcam++": "Grad-CAM++", "hirescam": "HiResCAM",
    "layercam": "LayerCAM", "eigencam": "Eigen-CAM",
}  # fmt: skip
"""What the page calls the methods that older records may hold."""

TEMPLATE, STYLE = "report.html.j2", "report.css"


def page(run: Run, explanation: Mapping, figures: Mapping[str, bytes]) -> str:
    """Return the HTML page of a finished run; the same inputs give the same characters.

    explanation: what explain.json holds. figures: PNG files by name. The page says what is missing
    and which command makes it.
    """
    import jinja2
    from markupsafe import Markup

    folder = Path(__file__).parent
    style = (folder / STYLE).read_text(encoding="utf-8")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_printable,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": _number, "count": _count, "percent": _percent, "points": _points,
        "duration": _duration,
        "interval": _interval, "words": _value, "shortened": _shortened,
    }  # fmt: skip
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    pictures = {name: picture for name, data in figures.items() if (picture := _picture(data))}
    optional = ("errors", "label_conflicts", "localisation", "faithfulness")
    try:
        text = environment.get_template(TEMPLATE).render(
            style=Markup(style),
            style_hash=digest,
            explanation=dict.fromkeys(optional) | dict(explanation),
            pictures=pictures,
            **_records(run),
        )
    except (jinja2.UndefinedError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"explain.json is not what this version of tinylab writes ({printable(error)}): "
            "`tinylab explain` makes it anew"
        ) from error
    return text.lstrip()  # what stands between the template's macros


def _records(run: Run) -> dict:
    """What the page tells of the run itself, apart from what `explain` found out."""
    summary, identity, history = run.summary, run.identity, run.history
    reference = published_history()
    return {
        "title": run.title,
        "summary": summary,
        "identity": {name: value for name, value in identity.items() if name != "data_folder"},
        "environment": run.environment,
        "history": history,
        "interval95": wilson(summary["test_top1"] / 100, summary["test_images"]),
        "recipe": _recipe_rows(run.recipe),
        "recipe_name": run.recipe.name,
        "published": reference[-1] if reference else None,
        "files": _files(run),
        "methods": METHOD_NAMES,
    }


def wilson(share: float, count: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval, in percent, of a share in 0..1 of so many images."""
    from scipy.stats import binomtest

    interval = binomtest(round(share * count), count).proportion_ci(method="wilson")
    return 100 * interval.low, 100 * interval.high


def _recipe_rows(recipe: Recipe) -> list[dict]:
    """Every field of the recipe, and what the recipe of that name has where that is something
    else."""
    usual = dataclasses.asdict(named(recipe.name)) if recipe.name in RECIPES else {}
    return [
        {
            "name": name,
            "value": _value(value),
            "usual": None if usual.get(name, value) == value else _value(usual[name]),
        }
        for name, value in dataclasses.asdict(recipe).items()
    ]


FILES = {
    "model.safetensors": "the weights, with class list, normalisation, recipe and metrics inside",
    "summary.json": "the final numbers",
    "recipe.json": "every field of the recipe",
    "run.json": "what else decides the result: split, seed, classes, hashes",
    "environment.json": "device and versions",
    "metrics.jsonl": "one line per epoch",
    "predictions.npz": "the logits of every test image",
    "SHA256SUMS": "hashes of the above, for sha256sum -c",
    "explain.json": "the numbers of this page",
    "classes.csv": "accuracy per class",
    "confusion.csv": "how often each class was taken for each",
    "localisation.csv": "map against box, image by image",
    "figures": "the figures of this page",
    "tensorboard": "the curves, for TensorBoard",
    "export": "weights, model card and class list, to hand over",
}
"""What a run folder may hold, for the reader of the page."""


def _files(run: Run) -> list[dict]:
    """What of `FILES` there is: name, bytes (None for a folder), what it is."""
    found = []
    for name, what in FILES.items():
        path = run.folder / name
        if path.is_file():
            found.append({"name": name, "bytes": path.stat().st_size, "what": what})
        elif path.is_dir():
            found.append({"name": f"{name}/", "bytes": None, "what": what})
    return found


def _picture(data: bytes) -> dict | None:
    """A PNG as the page needs it: its data URI, and width and height, which keep its place while it
    is decoded. None if it is no PNG."""
    from markupsafe import Markup

    if data[:8] != b"\x89PNG\r\n\x1a\n" or len(data) < 24:
        return None
    width, height = struct.unpack(">II", data[16:24])
    uri = Markup("data:image/png;base64," + base64.b64encode(data).decode("ascii"))
    return {"uri": uri, "width": width, "height": height}


# --- How values are shown -------------------------------------------------------------------------


def _printable(value: object) -> object:
    """What jinja2 is about to escape: foreign text without what is not printed, on one line, not
    too long."""
    if value is None:
        return "unknown"
    if not isinstance(value, str) or hasattr(value, "__html__"):
        return value
    one_line = re.sub(r"[^\S\u00a0]+", " ", value)
    return _shortened(printable(one_line, len(one_line)), 10 * LONGEST)


def _shortened(text: object, limit: int = LONGEST) -> str:
    """At most so many characters."""
    text = str(text)
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def _value(value: object) -> str:
    """A field of a recipe or of an environment in words."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return "; ".join(
            f"{name} {_value(each)}" for name, each in value.items() if each is not None
        )
    if isinstance(value, list | tuple):
        return ", ".join(map(_value, value)) or "none"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _number(value: object, digits: int = 2) -> str:
    if isinstance(value, int | float):
        return f"{value:,.{digits}f}"
    return "–" if value is None else str(value)


def _count(value: object) -> str:
    return _number(value, 0)


def _percent(share: float | None, digits: int = 1) -> str:
    """A share in 0..1."""
    return "–" if share is None else f"{100 * share:.{digits}f}\u00a0%"


def _points(share: float | None, digits: int = 1) -> str:
    """A difference of shares, with its sign; the minus as wide as the plus."""
    return "–" if share is None else f"{100 * share:+.{digits}f}".replace("-", "−")


def _interval(estimate: Mapping | None, kind: str = "percent") -> str:
    """An estimate as HTML, its 95 % interval below it: `mean`, `low` and `high` as shares."""
    from markupsafe import Markup

    if estimate is None:
        return "–"
    show = _points if kind == "points" else lambda share: f"{100 * share:.1f}"
    mean, low, high = (show(estimate[name]) for name in ("mean", "low", "high"))
    return Markup('<b>{}</b> <span class="interval">{} to {}</span>').format(mean, low, high)


def _duration(seconds: float) -> str:
    for unit, size in (("hours", 3600), ("minutes", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} seconds"
