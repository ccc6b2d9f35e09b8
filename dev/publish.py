"""Publish a run, and make results/results.csv and the tables of README and docs/ anew.

    make publish RUN=runs/NAME     copies the run's small records to results/NAME first
    make tables                    only the tables

Each generated part of a page stands between `<!-- name -->` and `<!-- /name -->`; its template is
dev/templates/name.md.j2. Every value that a template shows is escaped: it is text, whatever the
file held.
"""

import argparse
import csv
import dataclasses
import json
import re
import statistics
import sys
import urllib.parse
from collections import Counter
from functools import partial
from pathlib import Path

import jinja2
from markupsafe import Markup

from tinylab.exceptions import UserError
from tinylab.files import as_csv, plain_text, write_atomically
from tinylab.recipe import training_petaflop
from tinylab.recipes import RECIPES, named
from tinylab.run.folder import Run, published_history

REPOSITORY = Path(__file__).resolve().parents[1]
PAGES = {
    "README.md": ("front", "mistakes"),
    "docs/results.md": ("results", "targets", "figures"),
    "docs/maps.md": ("maps", "road"),
    "docs/speed.md": ("throughput",),
}
"""The generated parts of each page."""
with open(REPOSITORY / "results" / "targets.csv", newline="", encoding="utf-8") as _file:
    TARGETS = tuple(csv.DictReader(_file))
PROTOCOLS = {target["recipe"]: target["protocol"] for target in TARGETS if target["recipe"]}
"""The recipes with a result to reach, and the split that each is for."""
IMAGES = {"merged": (77_000, 33_000), "official": (100_000, 10_000)}
"""Training and test images of all 200 classes."""


def publish_run(run: Run, home: Path) -> list[Path]:
    """Copy the run's records to results/, without machine paths, and make the tables anew.

    Return what was written. Raise `UserError`, with nothing written, if the run is not finished, if
    another run of that name was published, or if a page lacks a place for its tables.
    """
    if run.data == "made-up shapes":
        raise UserError(f"{run.folder} was trained on made-up shapes: that is no result")
    target = Run(home / "results" / run.folder.resolve().name)
    records = {
        "run.json": {name: value for name, value in run.identity.items() if name != "data_folder"},
        "recipe.json": json.loads((run.folder / "recipe.json").read_text()),
        "environment.json": run.environment,
        "summary.json": run.summary,
    }
    if explanation := run.explanation:  # what it says of single images stays with the run
        kept = ("model_sha256", "tested", "wrong", "method", "localisation", "faithfulness")
        records["explain.json"] = {name: explanation.get(name) for name in kept}
        records["explain.json"]["calibration"] = explanation["errors"].get("calibration")
        records["explain.json"]["macro"] = explanation["errors"].get("macro")
    tables = [run.folder / name for name in ("classes.csv", "confusion.csv") if explanation]
    history = run.history
    if target.finished and target.summary["model_sha256"] != run.summary["model_sha256"]:
        raise UserError(f"{target.folder} is another run of that name: delete it to replace it")
    generate(home)
    target.folder.mkdir(parents=True, exist_ok=True)
    target.write_history(history)
    for name, value in records.items():
        target.write(name, value)
    for table in tables:
        write_atomically(target.folder / table.name, table.read_bytes())
    return [target.folder, *rewrite_tables(home)]


def rewrite_tables(home: Path) -> list[Path]:
    """Make results.csv and the pages' generated parts anew, and return the files."""
    files = generate(home)
    for path, content in files.items():
        write_atomically(path, content)
    return list(files)


def generate(home: Path) -> dict[Path, bytes]:
    """Return what results.csv and the pages below `home` are to hold, by their paths."""
    rows = read_rows(home / "results")
    columns = list(dict.fromkeys(column for row in rows for column in row))
    table = as_csv([columns, *([row.get(column) for column in columns] for row in rows)])
    files = {home / "results" / "results.csv": table}
    for page, parts in PAGES.items():
        text = (home / page).read_text(encoding="utf-8")
        for name in parts:
            text = replace_between(text, name, render(name, rows, home), home / page)
        files[home / page] = text.encode()
    return files


def replace_between(page: str, name: str, text: str, path: Path) -> str:
    """Replace what stands between the comments `<!-- name -->` and `<!-- /name -->`."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if page.count(begin) != 1 or page.count(end) != 1:
        raise UserError(f"{path} must hold {begin} and {end} once each")
    before, rest = page.split(begin)
    return f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}"


# --- Rows of results.csv --------------------------------------------------------------------------


def read_rows(results: Path) -> list[dict]:
    """Return the rows of results.csv, one per published run: result, recipe, where it was made."""
    reference = published_history(results)
    rows = []
    for path in sorted(results.glob("*/summary.json")):
        run = Run(path.parent)
        history, identity = run.history, run.identity
        tested = [epoch.get("test_top1") for epoch in history]
        last, gap = tested[-10:], None
        whole = len(last) == 10 and None not in last
        comparable = identity["classes"] == 200 and len(tested) == len(reference)
        if comparable and whole and None not in tested[9:]:
            theirs = [float(epoch["test_accuracy_pct"]) for epoch in reference]
            gap = max(abs(ours - own) for ours, own in zip(tested[9:], theirs[9:], strict=True))
        result = {
            "run": run.folder.name,
            **run.summary,
            "train_petaflop": training_petaflop(run.recipe, run.summary["train_images"]),
            **dict.fromkeys(GROUP_NUMBERS),
            "median_last10_top1": statistics.median(last) if whole else None,
            "largest_gap_to_published": gap,
        }
        recipe = {f"recipe.{name}": value for name, value in dataclasses.asdict(run.recipe).items()}
        # This fixes the order of columns; result and recipe have the last word.
        rows.append(result | identity | recipe | run.environment | result | recipe)
    return with_group_numbers(rows)


GROUP_NUMBERS = ("n", "mean_top1", "sd_top1", "mean_train_seconds", "mean_time_to_accuracy_seconds")
"""Columns of results.csv about all runs that differ from the line's in their seed only."""


def group_runs(rows: list[dict]) -> list[list[dict]]:
    """Return groups of runs that differ in their seed only."""
    fields = ("protocol", "classes", "content_sha256", "device", "precision", "compiled")
    groups: dict[str, list[dict]] = {}
    for row in rows:
        same = [row.get(name) for name in fields] + [row.get("processes") or 1]
        same += [value for name, value in row.items() if name.startswith("recipe.")]
        groups.setdefault(json.dumps(same), []).append(row)
    return list(groups.values())


def with_group_numbers(rows: list[dict]) -> list[dict]:
    """Return the rows, in their order, each with the numbers of its group."""
    groups = {id(run): summarise(runs) for runs in group_runs(rows) for run in runs}
    return [row | {name: groups[id(row)][name] for name in GROUP_NUMBERS} for row in rows]


def each_seed(runs: list[dict]) -> list[dict]:
    """Return one run per seed, the first by name, sorted by name."""
    once: dict[int, dict] = {}
    for run in sorted(runs, key=lambda run: run["run"]):
        once.setdefault(run["seed"], run)
    return list(once.values())


def summarise(runs: list[dict]) -> dict:
    """Return a group's numbers, each seed counted once; None where one was not recorded."""
    once = each_seed(runs)

    def mean(name: str, some: list[dict] = once) -> float | None:
        values = [run.get(name) for run in some]
        return round(statistics.mean(values), 6) if values and None not in values else None

    def spread(name: str) -> tuple[float, float | None]:
        values = [run[name] for run in once]
        return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None

    (mean_top1, sd_top1), top5 = spread("test_top1"), spread("test_top5")
    # Cold: the first run of its process, no compiled code at hand, never stopped.
    cold = [run for run in once if not run.get("earlier_runs") and not run.get("stops")]
    cold = [r for r in cold if not r.get("compiled") or r.get("compile_cache") == "empty"]
    gaps = [run.get("largest_gap_to_published") for run in once]
    return {
        "first": once[0],
        "runs": runs,
        "n": len(once),
        "mean_top1": mean_top1,
        "sd_top1": sd_top1,
        "top5": top5,
        "mean_train_seconds": mean("train_seconds"),
        "mean_train_cpu_seconds": mean("train_cpu_seconds"),
        "mean_time_to_accuracy_seconds": mean("time_to_accuracy_seconds"),
        "cold_seconds": mean("cold_time_to_accuracy_seconds", cold),
        "cold_n": len(cold),
        "median_last10": mean("median_last10_top1"),
        "largest_gap": max((gap for gap in gaps if gap is not None), default=None),
        "torch": list(dict.fromkeys(run["torch"] for run in runs)),
        "changes": changes(once[0]) or {},
    }


def changes(row: dict) -> dict | None:
    """Return the fields, with their values, in which a run's recipe is not the one of that name."""
    if row["recipe"] not in RECIPES:
        return None
    recipe = dataclasses.asdict(named(row["recipe"]))
    values = {name: row.get(f"recipe.{name}") for name in recipe}
    return {name: values[name] for name in recipe if values[name] != recipe[name]}


def measured(rows: list[dict], recipe: str) -> list[dict]:
    """Return the groups of the recipe as it stands, on all 200 classes of the split it is for."""
    protocol = PROTOCOLS[recipe]
    task = (recipe, protocol, 200, *IMAGES[protocol])
    fields = ("recipe", "protocol", "classes", "train_images", "test_images")
    same = [row for row in rows if tuple(row[field] for field in fields) == task]
    return [summarise(runs) for runs in group_runs([row for row in same if changes(row) == {}])]


def best(rows: list[dict], recipe: str) -> dict | None:
    """Return the group with most seeds, of those the fastest."""
    order = lambda group: (group["n"], -group["mean_train_seconds"])  # noqa: E731
    return max(measured(rows, recipe), key=order, default=None)


# --- What the templates show ----------------------------------------------------------------------


def read_throughput(path: Path) -> list[dict]:
    """Return the rows of throughput.csv that were measured on a GPU; none without the file."""
    if not path.exists():
        return []
    kinds = {"batch": int, "resolution": int, "images_per_second": float}
    kinds |= {"share_of_peak": float, "peak_tflops": float}
    with open(path, newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if not row["gpu"].startswith("CPU")]
    return [
        row | {name: kind(row[name]) if row[name] else None for name, kind in kinds.items()}
        for row in rows
    ]


def throughput(speeds: list[dict]) -> dict | None:
    """Return what the newest GPU and torch gave: the 12 fastest steps at 64 px, failures."""
    done = [row for row in speeds if row["status"] == "ok"]
    if not done:
        return None
    newest = max(reversed(done), key=lambda row: row["date"])
    rows = [row for row in speeds if (row["gpu"], row["torch"]) == (newest["gpu"], newest["torch"])]
    ordered = [row for row in done if row in rows]
    ordered.sort(key=lambda row: -row["images_per_second"])
    shown = [row for row in ordered if row["resolution"] == 64][:12]
    for size in sorted({row["resolution"] for row in ordered} - {64}):  # the fastest of each
        shown.append(next(row for row in ordered if row["resolution"] == size))
    failed = Counter(row["status"] for row in rows if row["status"] != "ok")
    return {"newest": newest, "rows": rows, "shown": shown, "failed": failed.most_common()}


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "not recorded"
    return f"{seconds:.1f} s" if seconds < 300 else f"{seconds / 60:.1f} min"


def link(up: str, text: str, run: str) -> Markup:
    """Return a Markdown link to a published run; what no such folder has leads nowhere."""
    name = run.replace("/", "_").lstrip(".").encode("utf-8", "replace")
    shown = f"`{text}`" if re.fullmatch(r"[\w.-]{1,200}", text, re.ASCII) else plain_text(text)
    return Markup(f"[{shown}]({up}results/{urllib.parse.quote(name, safe='') or 'unknown'})")


def render(name: str, rows: list[dict], home: Path) -> str:
    """Return a generated part in Markdown, as the page that holds it links to files."""
    up = "../" * next(page.count("/") for page, parts in PAGES.items() if name in parts)
    results, figures = home / "results", home / "images-A"
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        finalize=lambda value: value if isinstance(value, Markup) else Markup(plain_text(value)),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    templates.filters |= {"duration": duration, "commas": "{:,}".format, "markdown": Markup}
    shown, explained = None, {}
    if (figures / "figures.json").exists():
        shown = json.loads((figures / "figures.json").read_text(encoding="utf-8"))
        record = results / shown["run"].replace("/", "_").lstrip(".") / "explain.json"
        if record in results.glob("*/explain.json"):  # the name may be no file's
            explained = json.loads(record.read_text(encoding="utf-8"))
    speeds = read_throughput(results / "throughput.csv")
    fastest = [row for row in speeds if row["status"] == "ok" and row["resolution"] == 64]
    context = {
        "up": Markup(up),
        "link": partial(link, up),
        "groups": [summarise(runs) for runs in group_runs(rows)],
        "reference": published_history(results)[-1:],
        "named": named,
        "petaflop": training_petaflop,
        "targets": TARGETS,
        "best": {recipe: best(rows, recipe) for recipe in PROTOCOLS},
        "throughput": throughput(speeds),
        "fastest": max(fastest, key=lambda row: row["images_per_second"], default=None),
        "shown": shown,
        "drawn": {path.stem for path in figures.glob("*.png")},
        "localisation": explained.get("localisation"),
        "road": explained.get("faithfulness"),
    }
    return templates.get_template(f"{name}.md.j2").render(context).strip("\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=Path, nargs="?", help="the run folder; without it, the tables")
    run = parser.parse_args().run
    try:
        for path in publish_run(Run(run), REPOSITORY) if run else rewrite_tables(REPOSITORY):
            print(path.relative_to(REPOSITORY))
    except UserError as error:
        print(f"publish.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
