"""A finished run as one HTML file to read: result, recipe, curves, tables, galleries, maps.

Everything is inside the file, figures as data URIs. It needs no script, and its own security policy forbids it any:
nothing is loaded from anywhere. The page's text and structure stand in report.html.j2, its looks in report.css.
Class names and whatever else a run's files hold are foreign text: jinja2 escapes all of it, and no character is left in
it that is not printed, such as those that turn the direction of what follows.
"""

import base64
import dataclasses
import hashlib
import math
import re
import struct
import unicodedata
from collections.abc import Mapping
from pathlib import Path

from tinylab.exceptions import UserError
from tinylab.recipe import Recipe
from tinylab.recipes import RECIPES, named
from tinylab.run.folder import ENVIRONMENT, METHOD_NAMES, Run, published_history, read_object

LONGEST = 160
"""Characters of a class name that are shown; the longest of Tiny ImageNet has 121."""

TEMPLATE, STYLE = "report.html.j2", "report.css"


def page(run: Run, explanation: Mapping, figures: Mapping[str, bytes]) -> str:
    """The HTML page of a finished run: the same inputs give the same characters.

    `explanation` is what explain.json holds; `localisation` and `faithfulness` may be None or missing. `figures` are
    PNG files by name (curves, classes, confusion, ...). The page says what is missing and which command makes it.
    Raises `UserError` if the run is not finished, or if one of its records lacks what the page tells.
    """
    import jinja2
    from markupsafe import Markup

    if wrong := _misfit(explanation, SHAPE, "explain.json"):
        raise UserError(
            f"{wrong}: this version of tinylab did not write it; `tinylab explain` makes it anew"
        )
    if road := explanation.get("faithfulness"):
        curves = [
            curve
            for kind in ("map", "random")
            for curve in road[kind].values()
            if isinstance(curve, list)
        ]
        if {len(curve) for curve in curves} != {len(road["percentiles"])}:
            raise UserError(
                "explain.json: faithfulness.map is not of that many percentiles; `tinylab explain` makes it anew"
            )
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
        "number": _number, "count": _count, "percent": _percent, "points": _points, "duration": _duration,
        "interval": _interval, "words": _value, "shortened": _shortened,
    }  # fmt: skip
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    text = environment.get_template(TEMPLATE).render(
        style=Markup(style),
        style_hash=digest,
        explanation=dict.fromkeys(SHAPE) | dict(explanation),
        pictures={name: picture for name, data in figures.items() if (picture := _picture(data))},
        **_records(run),
    )
    return text.lstrip()  # what stands between the template's macros


def _records(run: Run) -> dict:
    """What the page tells of the run itself, apart from what `explain` found out."""
    summary, identity, history = run.summary, run.identity, run.history
    reference = published_history()
    return {
        "title": run.title,
        "summary": summary,
        "identity": {name: value for name, value in identity.items() if name != "data_folder"},
        "environment": read_object(
            run.folder / "environment.json", "this folder is no run", ENVIRONMENT
        ),
        "history": history,
        "interval95": wilson(summary["test_top1"] / 100, summary["test_images"]),
        "recipe": _recipe_rows(run.recipe),
        "recipe_name": run.recipe.name,
        "published": reference[-1] if reference else None,
        "files": _files(run),
        "methods": METHOD_NAMES,
    }


def wilson(share: float, count: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's 95 % interval, in percent, of a share in 0..1 that was counted on so many images."""
    if count < 1:
        return 0.0, 100.0
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = (
        z
        / (1 + z**2 / count)
        * math.sqrt(max(share * (1 - share), 0) / count + z**2 / (4 * count**2))
    )
    return 100 * max(middle - half, 0), 100 * min(middle + half, 1)


def _recipe_rows(recipe: Recipe) -> list[dict]:
    """Every field of the recipe, and what the recipe of that name has where that is something else."""
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
    """A PNG as the page needs it: its data URI, and width and height, which keep its place while it is decoded. None
    if it is no PNG."""
    from markupsafe import Markup

    if data[:8] != b"\x89PNG\r\n\x1a\n" or len(data) < 24:
        return None
    width, height = struct.unpack(">II", data[16:24])
    uri = Markup("data:image/png;base64," + base64.b64encode(data).decode("ascii"))
    return {"uri": uri, "width": width, "height": height}


# --- How values are shown ---------------------------------------------------------------------------------------------


def _printable(value: object) -> object:
    """What jinja2 is about to escape: foreign text without what is not printed, on one line, not too long."""
    if value is None:
        return "unknown"
    if not isinstance(value, str) or hasattr(value, "__html__"):
        return value
    # Controls, lone surrogates and what turns the direction of the text; a name in Arabic still runs as it should.
    one_line = re.sub(r"[^\S\u00a0]+", " ", value)
    shown = "".join(c for c in one_line if not unicodedata.category(c).startswith("C"))
    return shown if len(shown) <= 10 * LONGEST else _shortened(shown, 10 * LONGEST)


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


# --- What explain.json must hold --------------------------------------------------------------------------------------

NAMED = {"wnid": str, "name": str}
ANSWER = NAMED | {"probability": float}
INTERVAL = ({"mean": float, "low": float, "high": float}, None)
CURVES = {"most_relevant_first": [(float, None)], "least_relevant_first": [(float, None)]}
CLASS = NAMED | {
    "images": int, "top1": (float, None), "top5": (float, None), "mistaken_for": ({"name": str, "count": int}, None),
}  # fmt: skip
SHARPNESS = {"ece": float, "nll": float, "mean_confidence": float, "accuracy_overall": float}
CALIBRATION = {
    "bins": int,
    "temperature": float,
    "note": (str, None),
    "before": SHARPNESS,
    "after": SHARPNESS,
}
PAIR = {"one": NAMED, "other": NAMED, "one_as_other": int, "other_as_one": int, "count": int}
CONFLICTS = {
    "pairs": [{"rows": [int, int], "names": [str, str], "tested": [bool, bool]}],
    "tested": int, "wrong": int, "answered_as_twin": int, "wrong_in_all": int, "share_of_error": (float, None),
}  # fmt: skip
GROUP = {"boxes": str, "answers": str, "class": str, "images": int} | dict.fromkeys(
    ("hit", "energy", "centre_hit", "uniform", "hit_minus_centre", "energy_minus_uniform"), INTERVAL
)
LOCALISATION = {
    "stage": str, "method": str, "native_size": [int], "sampled": int, "degenerate": int, "scored": int,
    "groups": [GROUP],
}  # fmt: skip
FAITHFULNESS = {
    "images": int, "method": str, "stage": str, "percentiles": [float], "map": CURVES, "random": CURVES,
    "combined": INTERVAL, "random_combined": INTERVAL, "difference": INTERVAL, "seconds": (float, None),
}  # fmt: skip
ERRORS = {
    "best": [CLASS],
    "worst": [CLASS],
    "classes": [CLASS],
    "pairs": [PAIR],
    "calibration": CALIBRATION,
}
SHAPE = {
    "tested": int,
    "wrong": int,
    "method": str,
    "images": [{"row": int, "predicted": ANSWER, "actual": ANSWER}],
    "errors": (ERRORS, None),
    "label_conflicts": (CONFLICTS, None),
    "localisation": (LOCALISATION, None),
    "faithfulness": (FAITHFULNESS, None),
}
"""What the page reads of it: a type, fields with their shapes, a list (of one shape: of any length), or a tuple of what
it may be. What may be None may be missing."""


def _misfit(value: object, shape: object, where: str) -> str:
    """What does not fit, and how; empty if all does. The file may be anybody's."""
    if isinstance(shape, tuple):
        return "" if value is None else _misfit(value, shape[0], where)
    if isinstance(shape, dict):
        if not isinstance(value, Mapping):
            return f"{where} is no object"
        wrong = (
            _misfit(
                value.get(name),
                each,
                f"{where}: {name}" if ": " not in where else f"{where}.{name}",
            )
            for name, each in shape.items()
        )
        return next(filter(None, wrong), "")
    if isinstance(shape, list):
        if not isinstance(value, list):
            return f"{where} is no list"
        if len(shape) > 1 and len(value) != len(shape):
            return f"{where} has {len(value)} entries, not {len(shape)}"
        return next(
            filter(
                None, (_misfit(each, shape[0], f"{where}[{i}]") for i, each in enumerate(value))
            ),
            "",
        )
    fits = type(value) is shape or (shape is float and type(value) is int)
    if fits and shape is float:
        fits = abs(value) < 1e100  # neither infinite nor a whole number that no float can hold
    return "" if fits else f"{where} is missing or of another type"
