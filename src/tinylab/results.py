"""What is published: results.csv, and the parts of the README that are made from the records.

Each part stands between two comments, `<!-- results -->` and `<!-- /results -->`; `tinylab table` makes all of them.
The functions for the tables take rows as results.csv has them, a dictionary per run, and return Markdown. What comes
from a file is shown as text, whatever it holds.
"""

import csv
import dataclasses
import io
import json
import os
import re
import statistics
import urllib.parse
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from tinylab.exceptions import UserError
from tinylab.files import as_csv, write_atomically
from tinylab.recipe import training_petaflop
from tinylab.recipes import RECIPES, named
from tinylab.run.folder import (
    ENVIRONMENT,
    METHOD_NAMES,
    Run,
    hashes,
    plain_text,
    published_history,
    read_object,
    read_text,
)

NO_RUN = "this folder is no run"


def publish_run(run: Run, results: Path, readme: Path) -> list[Path]:
    """Copies what is small and says nothing about the machine's folders to results/<run>, and makes the tables anew;
    returns what was written.

    Raises `UserError` if the run is not finished or its records are not sound, if a different run of that name was
    published, or if the tables cannot be made; nothing has been changed then.
    """
    target = Run(results / run.folder.resolve().name)
    _ = run.recipe
    records = {
        "recipe.json": read_object(run.folder / "recipe.json", NO_RUN),
        "run.json": {key: value for key, value in run.identity.items() if key != "data_folder"},
        "environment.json": read_object(run.folder / "environment.json", NO_RUN, ENVIRONMENT)
        | hashes(run.identity),
        "summary.json": run.summary,
    }
    if (
        explanation := run.explanation
    ):  # the numbers; what it says of single images stays with the run
        kept = ("model_sha256", "tested", "wrong", "method", "localisation", "faithfulness")
        records["explain.json"] = {name: explanation.get(name) for name in kept}
        records["explain.json"]["calibration"] = explanation["errors"].get("calibration")
    history = run.history
    if target.finished and target.summary["model_sha256"] != run.summary["model_sha256"]:
        raise UserError(
            f"{target.folder} holds another run of that name; delete it first to replace it"
        )
    _ = generated(results, readme)
    try:
        target.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {target.folder}: {error.strerror}") from error
    target.write_history(history)
    for name, value in records.items():
        target.write(name, value)
    return [target.folder, *rewrite_tables(results, readme)]


def rewrite_tables(results: Path, readme: Path) -> list[Path]:
    """Makes results.csv (a line per published run, every field of its recipe) and the README's generated parts anew.

    Raises `UserError` if a record is not sound or the README has no place for them. Returns the files written.
    """
    files = generated(results, readme)
    for path, content in files.items():
        write_atomically(path, content)
    return list(files)


def generated(results: Path, readme: Path) -> dict[Path, bytes]:
    """What results.csv and the README are to hold, by their paths. Raises `UserError` as `rewrite_tables` does."""
    rows = published_rows(results)
    speeds = read_throughput(results / "throughput.csv")
    figures = readme.parent / "images-A"
    columns = list(dict.fromkeys(column for row in rows for column in row))
    page = read_text(readme)
    for name, text in (
        ("results", results_table(rows, published_history(results))),
        ("targets", targets_table(rows, speeds)),
        ("paired", paired_part(rows)),
        ("throughput", throughput_part(speeds)),
        ("figures", figures_part(figures)),
        ("maps", maps_part(figures, results)),
    ):
        page = replace_between(page, name, text, readme)
    table = as_csv([columns, *([row.get(column) for column in columns] for row in rows)])
    return {results / "results.csv": table, readme: page.encode()}


def replace_between(page: str, name: str, text: str, readme: Path) -> str:
    """`page` with what stands between the comments `<!-- name -->` and `<!-- /name -->` replaced by `text`. Raises
    `UserError` if they are not there once each; `readme` is the page's path, for the message."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if page.count(begin) != 1 or page.count(end) != 1:
        raise UserError(
            f"{readme} must hold {begin} and {end} once each: the generated part goes between them"
        )
    before, rest = page.split(begin)
    return f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}"


# --- Rows and groups --------------------------------------------------------------------------------------------------

GROUP_NUMBERS = ("n", "mean_top1", "sd_top1", "mean_train_seconds", "mean_time_to_accuracy_seconds")
"""Columns of results.csv that are about all runs that differ from the line's in their seed only."""

PROTOCOLS = {
    "published": "merged",
    "accurate": "merged",
    "speedrun": "merged",
    "cpu": "merged",
    "official": "official",
}
"""The recipes with a result to reach, and the split that each is for."""
IMAGES = {"merged": (77_000, 33_000), "official": (100_000, 10_000)}
"""Training and test images of all 200 classes."""


def published_rows(results: Path) -> list[dict]:
    """The rows of results.csv, one per published run. Raises `UserError` if a record is not sound."""
    runs = [Run(path.parent) for path in sorted(results.glob("*/summary.json"))]
    published = published_history(results)
    return with_group_numbers([_csv_row(run, published) for run in runs])


def _csv_row(run: Run, published: list[dict]) -> dict:
    """What results.csv says of one run: result first, then what decided it, then where it was measured."""
    history = run.history
    last = [epoch["test_top1"] for epoch in history[-10:] if "test_top1" in epoch]
    result = {
        "run": run.folder.name,
        **run.summary,
        "train_petaflop": training_petaflop(run.recipe, run.summary["train_images"]),
        **dict.fromkeys(GROUP_NUMBERS),
        "median_last10_top1": statistics.median(last) if len(last) == 10 else None,
        "largest_gap_to_published": _largest_gap(history, published)
        if run.identity["classes"] == 200
        else None,
    }
    recipe = {f"recipe.{name}": value for name, value in dataclasses.asdict(run.recipe).items()}
    environment = read_object(run.folder / "environment.json", NO_RUN, ENVIRONMENT)
    # The order of the columns; where two files speak of one thing the environment counts, but never for the result.
    return result | run.identity | recipe | environment | result | recipe


def _largest_gap(history: list[dict], published: list[dict]) -> float | None:
    """Largest difference of test accuracy, in points, to the published run's from epoch 10 on; None for a run of
    another length."""
    if (
        len(history) != len(published)
        or len(history) < 10
        or any("test_top1" not in row for row in history[9:])
    ):
        return None
    pairs = zip(history[9:], published[9:], strict=True)
    return max(
        abs(ours["test_top1"] - float(theirs["test_accuracy_pct"])) for ours, theirs in pairs
    )


def with_group_numbers(rows: list[dict]) -> list[dict]:
    """The rows, each with the numbers of its group."""
    numbers = {_group_key(runs[0]): group_numbers(runs) for runs in grouped(rows)}
    return [row | numbers[_group_key(row)] for row in rows]


def group_numbers(runs: list[dict]) -> dict:
    """Of a group, each seed counted once: n seeds, mean and sample standard deviation of top-1 in percent, mean seconds
    of training and to accuracy (training and the one last test, warm). None where there is no such number."""
    runs = _each_seed(runs)
    top1 = [run["test_top1"] for run in runs]
    spread = statistics.stdev(top1) if len(runs) > 1 else None
    seconds = (_mean(runs, "train_seconds"), _mean(runs, "time_to_accuracy_seconds"))
    return dict(
        zip(GROUP_NUMBERS, (len(runs), statistics.mean(top1), spread, *seconds), strict=True)
    )


def grouped(rows: Iterable[dict]) -> list[list[dict]]:
    """The rows in groups of runs that differ in their seed only."""
    groups: dict[str, list[dict]] = {}
    for row in rows:
        groups.setdefault(_group_key(row), []).append(row)
    return list(groups.values())


def _group_key(row: dict) -> str:
    same = [row[name] for name in ("protocol", "classes", "content_sha256", "device", "precision")]
    unusual = [row.get("compiled"), row.get("processes") or 1]
    return json.dumps(
        same + unusual + [value for name, value in row.items() if name.startswith("recipe.")]
    )


def measured(rows: list[dict], name: str) -> list[list[dict]]:
    """The groups of the recipe exactly as recipe.py has it, on all 200 classes of the split that it is for."""
    task = (PROTOCOLS[name], 200, *IMAGES[PROTOCOLS[name]])
    fields = ("protocol", "classes", "train_images", "test_images")
    return grouped(
        row
        for row in rows
        if tuple(row[field] for field in fields) == task and _changes(row, name) == {}
    )


def _changes(row: dict, name: str) -> dict | None:
    """Fields, with their values, in which a run of the recipe `name` is not as recipe.py has it; None: of another."""
    if row["recipe"] != name or name not in RECIPES:
        return None
    values = {
        field: (row.get(f"recipe.{field}"), value)
        for field, value in dataclasses.asdict(named(name)).items()
    }
    return {field: value for field, (value, expected) in values.items() if value != expected}


def _best(groups: list[list[dict]]) -> list[dict]:
    """The group with most seeds, of those the fastest."""

    def order(runs: list[dict]) -> tuple[int, float]:
        once = _each_seed(runs)
        return len(once), -statistics.mean(run["train_seconds"] for run in once)

    return max(groups, key=order)


def _each_seed(runs: list[dict]) -> list[dict]:
    """One run per seed. Of a seed that was run again (for its cold clock, say) the first folder by name counts."""
    once: dict[int, dict] = {}
    for run in sorted(runs, key=lambda run: run["run"]):
        once.setdefault(run["seed"], run)
    return list(once.values())


def _mean(runs: list[dict], name: str) -> float | None:
    """The mean, rounded to a millionth; None unless every run has that number."""
    values = [run.get(name) for run in runs]
    sound = all(type(value) in (int, float) and abs(value) < 1e12 for value in values)
    return round(statistics.mean(values), 6) if sound else None


# --- The table of results ---------------------------------------------------------------------------------------------


def results_table(rows: list[dict], published: list[dict]) -> str:
    """The README's results table: the published run, then each group of runs that differ in seed only, those of all
    200 classes first. What is not measured is said to be so.

    published: the published run's log, as `published_history` has it.
    """
    lines = [
        "| run | split, classes | train / test images | epochs | top-1 % | top-5 % | seeds | PFLOP | training "
        "| to accuracy, warm (cold) | device |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    if published:
        last = published[-1]
        lines.append(
            f"| the published run (reference) | unseeded 70/30, 200 | 77,000 / 33,000 | {last['epoch']} "
            f"| {float(last['test_accuracy_pct']):.2f} | not reported | 1 "
            f"| {training_petaflop(named('published'), 77_000):.3g} | 79 min | not reported "
            "| a Colab GPU, fp32 |"
        )
    groups = grouped(rows)
    lines += [_table_line(runs) for runs in groups if runs[0]["classes"] == 200]
    for name, protocol in PROTOCOLS.items():
        if not measured(rows, name):
            images = " / ".join(f"{count:,}" for count in IMAGES[protocol])
            petaflop = training_petaflop(named(name), IMAGES[protocol][0])
            lines.append(
                f"| `{name}` | {protocol}, 200 | {images} | {named(name).epochs} | not yet measured | | "
                f"| {petaflop:.3g} | | | {'hours on two CPU cores' if name == 'cpu' else 'needs a GPU'} |"
            )
    lines += [_table_line(runs) for runs in groups if runs[0]["classes"] != 200]
    return "\n".join(lines)


def _table_line(runs: list[dict]) -> str:
    """The line of one or more runs that differ in their seed only."""
    first, once = runs[0], _each_seed(runs)
    cells = [
        f"{_link(first['recipe'], first['run'])}{plain_text(_overrides(first))}",
        f"{plain_text(first['protocol'])}, {_which_classes(first['classes'])}",
        f"{first['train_images']:,} / {first['test_images']:,}",
        str(first["epochs"]),
        _mean_and_spread(once, "test_top1"),
        _mean_and_spread(once, "test_top5"),
        str(len(once)) if len(once) == len(runs) else f"{len(once)} ({len(runs)} runs)",
        _petaflop(first),
        _training_time(once),
        _to_accuracy(runs),
        _device(runs),
    ]
    return f"| {' | '.join(cells)} |"


def _petaflop(run: dict) -> str:
    """Arithmetic of training; of Muon's orthogonalisation beside it."""
    muon = f" + {run['muon_petaflop']:.2g} Muon" if run.get("muon_petaflop") else ""
    return f"{run['train_petaflop']:.3g}{muon}"


def _training_time(runs: list[dict]) -> str:
    """Mean wall-clock time and, if recorded, the processor time of all cores: wall clocks count what else ran."""
    cpu = _mean(runs, "train_cpu_seconds")
    on_cpu = cpu is not None and runs[0]["device"].startswith("CPU")
    return _duration(_mean(runs, "train_seconds")) + (
        f" ({_duration(cpu)} of CPU)" if on_cpu else ""
    )


def _device(runs: list[dict]) -> str:
    """Where the runs of a group were made, and how: device, number format, what is unusual, torch."""
    first = runs[0]
    said = [first["device"], first["precision"]]
    said += ["compiled"] if first.get("compiled") else []
    said += [f"{first['processes']} processes"] if (first.get("processes") or 1) != 1 else []
    return ", ".join([*map(plain_text, said), f"torch {_listed(runs, 'torch')}"])


def _listed(rows: list[dict], name: str) -> str:
    """What the rows say there, each value once."""
    return " and ".join(dict.fromkeys(plain_text(row[name]) for row in rows))


def _to_accuracy(runs: list[dict]) -> str:
    """Means: warm over all runs, and in brackets cold over those that have a cold clock, with their number if it is
    another."""
    once = _each_seed(runs)
    cold = [run for run in once if _began_cold(run)]
    seconds = _mean(cold, "cold_time_to_accuracy_seconds") if cold else None
    count = f", n = {len(cold)}" if cold and len(cold) < len(once) else ""
    return f"{_duration(group_numbers(runs)['mean_time_to_accuracy_seconds'])} ({_duration(seconds)}{count})"


def _began_cold(run: dict) -> bool:
    """Whether it was the first run of its process, found no code compiled before, and was never stopped."""
    compiled = not run.get("compiled") or run.get("compile_cache") == "empty"
    return compiled and not run.get("earlier_runs") and not run.get("stops")


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "not recorded"
    return f"{seconds:.1f} s" if seconds < 300 else f"{seconds / 60:.1f} min"


def _link(text: str, run: str) -> str:
    name = run.replace("/", "_").lstrip(".")  # what no folder of a published run has leads nowhere
    folder = urllib.parse.quote(name.encode("utf-8", "replace"), safe="") or "unknown"
    shown = f"`{text}`" if re.fullmatch(r"[\w.-]{1,200}", text, re.ASCII) else plain_text(text)
    return f"[{shown}](results/{folder})"


def _which_classes(classes: int) -> str:
    return "200" if classes == 200 else f"first {classes}"


def _overrides(row: dict) -> str:
    """Fields in which the run's recipe is not the one of that name, the number of epochs aside: it has a column."""
    changes = _changes(row, row["recipe"]) or {}
    return "".join(f", {name} {value}" for name, value in changes.items() if name != "epochs")


def _mean_and_spread(rows: list[dict], name: str) -> str:
    values = [row[name] for row in rows]
    mean = f"{statistics.mean(values):.2f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.2f}"


# --- Beside the numbers to compare with -------------------------------------------------------------------------------

GOAL = 57.55
"""Percent top-1: the published run's, which `speedrun` is to reach."""
_REACHED_OVER, _ACCURATE_OVER = 5, 3
"""Seeds that the rules of `speedrun` and `accurate` ask for."""

_COURSE = "[the published run](https://github.com/gokul-pv/EVA6_Assignments_Session10)"
_OPENMIXUP = "[OpenMixup](https://github.com/Westlake-AI/openmixup/blob/main/configs/classification/tiny_imagenet/README.md)"
TARGETS = {
    "published": (
        "`published`: the published run reproduced",
        "merged, 30 epochs, last epoch",
        f"57.55 ({_COURSE}: unseeded split, one run)",
        "57.55 ± 0.8 (within 1.5 points of the published curve from epoch 10 on)",
    ),
    "accurate": (
        "`accurate`: top-1 in 30 epochs",
        "merged, no TTA, mean of 3 seeds or more",
        f"57.55 ({_COURSE}); 62.60 in 50 epochs (the best [public run](https://github.com/pratikiiitb2013/EVA4) of "
        "this network on such a split that we know)",
        "64.5 (66.0)",
    ),
    "speedrun": (
        "`speedrun`: least training time to 57.55",
        "merged, mean of 5 seeds or more, warm (cold beside)",
        f"79 min on a Colab GPU ({_COURSE}; other hardware)",
        "50 s (30 s)",
    ),
    "cpu": (
        "`cpu`: top-1 for a tenth of the arithmetic",
        "merged, no TTA, last epoch, at most 3.33 PFLOP of training",
        f"57.55 for 30.8 PFLOP ({_COURSE})",
        "56.0 (57.55)",
    ),
    "official": (
        "`official`: top-1 on the official split",
        "official, no TTA, last epoch, and median of the last 10",
        f"medians of the last 10 of 400 epochs: 61.68 plain, 68.89 SAMix ({_OPENMIXUP}), 69.19 "
        "[AdAutoMix](https://github.com/JinXins/Adversarial-AutoMixup)",
        "69.2 in 30 min or less (70.4)",
    ),
    "throughput": (
        "a full training step",
        "64 pixels, batch on the device",
        "-",
        "13,000 images/s on an H100 (40 % of the peak)",
    ),
}
"""What, by which rule, what to compare with, target. The numbers are the sources', not measured here."""


def targets_table(rows: list[dict], speeds: list[dict]) -> str:
    """The README's table of targets: numbers to compare with, beside what the records say was measured here.

    Of a recipe's groups the one with most seeds is shown, of those the fastest. speeds: as `read_throughput` has them.
    """
    lines = [
        "| what | protocol and rule | to compare with | target (better still) | measured here |",
        "|---|---|---|---|---|",
    ]
    for name, cells in TARGETS.items():
        here = _fastest_step(speeds) if name == "throughput" else _measured_here(rows, name)
        lines.append(f"| {' | '.join((*cells, here))} |")
    return "\n".join(lines)


def _measured_here(rows: list[dict], name: str) -> str:
    groups = measured(rows, name)
    if not groups:
        return "not yet measured"
    runs = _best(groups)
    numbers, once = group_numbers(runs), _each_seed(runs)
    where = f"{_device(runs)}, {_link(runs[0]['run'], runs[0]['run'])}"
    if name == "speedrun" and not reached(runs):
        enough = numbers["n"] >= _REACHED_OVER
        count = f"n = {numbers['n']}" if enough else f"{numbers['n']} of {_REACHED_OVER} seeds"
        return f"{'not reached: ' if enough else ''}{numbers['mean_top1']:.2f} ({count}), {where}"
    few = name == "accurate" and numbers["n"] < _ACCURATE_OVER
    count = f"{numbers['n']} of {_ACCURATE_OVER} seeds" if few else f"n = {numbers['n']}"
    said = [f"{_mean_and_spread(once, 'test_top1')} ({count})"]
    gaps = [
        run["largest_gap_to_published"]
        for run in once
        if run.get("largest_gap_to_published") is not None
    ]
    if name == "published" and gaps:
        said.append(f"from epoch 10 on at most {max(gaps):.2f} points from the published curve")
    if name == "official":
        median = _mean(once, "median_last10_top1")
        said.append(
            "fewer than 10 epochs recorded"
            if median is None
            else f"median of the last 10 epochs {median:.2f}"
        )
    said.append(f"{_duration(numbers['mean_train_seconds'])} of training")
    if name == "speedrun":
        said.append(f"to accuracy, warm (cold): {_to_accuracy(runs)}")
    return ", ".join((*said, where))


def reached(runs: list[dict]) -> bool:
    """The rule of `speedrun`: a mean of 57.55 % or more over five seeds or more."""
    numbers = group_numbers(runs)
    return numbers["n"] >= _REACHED_OVER and numbers["mean_top1"] >= GOAL


# --- Two recipes on the same images -----------------------------------------------------------------------------------


def paired_part(rows: list[dict]) -> str:
    """`published` and `accurate` side by side, seed by seed: a table for every task on which both were run, on the
    same kind of device. Both are as recipe.py has them, the number of epochs apart.

    Where a recipe has several groups there (number format, compiled or not), the two that share most seeds are shown.
    """
    tasks: dict[str, dict[str, list[dict]]] = {}
    same = ("protocol", "classes", "epochs", "content_sha256", "split_sha256", "device")
    for row in rows:
        changes = _changes(row, row["recipe"])
        if (
            row["recipe"] in ("published", "accurate")
            and changes is not None
            and not changes.keys() - {"epochs"}
        ):
            task = json.dumps([row[name] for name in same])
            tasks.setdefault(task, {}).setdefault(row["recipe"], []).append(row)
    pairs = [pair for both in tasks.values() if (pair := _pair(both))]
    pairs.sort(key=lambda pair: (pair[0][0]["classes"], pair[0][0]["epochs"]), reverse=True)
    return "\n\n".join(_paired_table(*pair) for pair in pairs) or "Not yet measured."


def _pair(both: dict[str, list[dict]]) -> tuple[list[dict], list[dict]] | None:
    """The runs of `published` and of `accurate`, in the order of the seeds that they have in common; None without."""
    found: tuple[list[dict], list[dict]] | None = None
    for ours in grouped(both.get("published", [])):
        for theirs in grouped(both.get("accurate", [])):
            first, second = (
                {run["seed"]: run for run in _each_seed(runs)} for runs in (ours, theirs)
            )
            seeds = sorted(first.keys() & second.keys())
            if len(seeds) > (len(found[0]) if found else 0):
                found = [first[seed] for seed in seeds], [second[seed] for seed in seeds]
    return found


def _paired_table(published: list[dict], accurate: list[dict]) -> str:
    first = published[0]
    lines = [
        f"{plain_text(first['protocol'])}, {_which_classes(first['classes'])} classes, {first['epochs']} epochs, "
        f"{first['train_images']:,} / {first['test_images']:,} images, "
        f"{plain_text(first['device'])}, {' and '.join(dict.fromkeys(map(_arithmetic, (first, accurate[0]))))}:",
        "",
        "| seed | `published` top-1 | `accurate` top-1 | difference in points |",
        "|---|---|---|---|",
    ]
    differences = []
    for one, other in zip(published, accurate, strict=True):
        differences.append(other["test_top1"] - one["test_top1"])
        lines.append(
            f"| {one['seed']} | {_correct(one)} | {_correct(other)} | {differences[-1]:+.2f} |"
        )
    n, mean = len(differences), statistics.mean(differences)
    spread = "no spread from one seed"
    if n > 1:
        deviation = statistics.stdev(differences)
        spread = (
            f"sample standard deviation {deviation:.2f}, standard error {deviation / n**0.5:.2f}"
        )
    steps, minutes = (
        [each(runs) for runs in (published, accurate)] for each in (_optimiser_steps, _minutes)
    )
    lines += [
        "",
        f"Mean difference, `accurate` less `published`: {mean:+.2f} points (n = {n}, {spread}). Optimiser steps: "
        f"{steps[0]:,} and {steps[1]:,}. Training, mean: {minutes[0]} and {minutes[1]} minutes.",
    ]
    return "\n".join(lines)


def _arithmetic(row: dict) -> str:
    return plain_text(f"{row['precision']}{', compiled' if row.get('compiled') else ''}")


def _correct(row: dict) -> str:
    correct = row.get("test_correct")
    counts = f" ({correct:,} / {row['test_images']:,})" if type(correct) is int else ""
    top1 = f"{row['test_top1']:.2f} %"
    return f"{_link(top1, row['run'])}{counts}"


def _optimiser_steps(runs: list[dict]) -> int:
    recipe = replace(named(runs[0]["recipe"]), epochs=runs[0]["epochs"])
    return recipe.steps_per_epoch(runs[0]["train_images"]) * recipe.epochs


def _minutes(runs: list[dict]) -> str:
    return f"{statistics.mean(run['train_seconds'] for run in runs) / 60:.1f}"


# --- Throughput -------------------------------------------------------------------------------------------------------

THROUGHPUT = (
    "gpu", "torch", "commit", "date", "precision", "layout", "compiled", "batch", "resolution", "images_per_second",
    "share_of_peak", "peak_tflops", "status",
)  # fmt: skip
"""Columns of results/throughput.csv, which benchmarks/gpu_suite.py writes. status: "ok", or why there is no number."""
_MOST_ROWS = 12
"""Rows of 64 pixels that the README shows."""


def read_throughput(path: Path) -> list[dict]:
    """The rows of throughput.csv: text, but `batch` and `resolution` int, `images_per_second`, `share_of_peak` (of the
    matmul peak measured in that number format, 0 to 1) and `peak_tflops` float; None where the file says nothing.

    No file: no rows. Raises `UserError` naming the file if it is not what gpu_suite.py writes.
    """
    if not os.path.lexists(path):
        return []
    text = read_text(path)
    try:
        header, *lines = csv.reader(io.StringIO(text, newline=""), strict=True)
        if tuple(header) != THROUGHPUT:
            raise ValueError(f"its columns must be {', '.join(THROUGHPUT)}")
        return [_speed(dict(zip(THROUGHPUT, line, strict=True))) for line in lines]
    except (ValueError, csv.Error) as error:
        raise UserError(f"{path} is not what benchmarks/gpu_suite.py writes: {error}") from error


def _speed(row: dict[str, str]) -> dict:
    """One row with its numbers as numbers. Raises `ValueError`, also where a row that is ok lacks one that it needs."""
    ok, numbers = row["status"] == "ok", {}
    for name in ("batch", "resolution", "images_per_second", "share_of_peak", "peak_tflops"):
        needed = ok and name in ("batch", "resolution", "images_per_second")
        if not row[name] and not needed:
            numbers[name] = None
            continue
        numbers[name] = (int if name in ("batch", "resolution") else float)(row[name])
        if not 0 <= numbers[name] < 1e12:
            raise ValueError(f"{name} is {row[name]!r}")
    if not row["status"]:
        raise ValueError("a row has no status")
    return row | numbers


def throughput_part(speeds: list[dict]) -> str:
    """Images/s of a full training step on a GPU: with the GPU and torch of the newest row (the last one of the newest
    date) the 12 fastest rows at 64 pixels, the fastest at each other resolution, and what gave no number."""
    gpus = [row for row in speeds if not row["gpu"].startswith("CPU")]
    if not any(row["status"] == "ok" for row in gpus):
        return "Not yet measured on a GPU: `python benchmarks/gpu_suite.py` measures it."
    newest = max(
        reversed([row for row in gpus if row["status"] == "ok"]), key=lambda row: row["date"]
    )
    rows = [row for row in gpus if (row["gpu"], row["torch"]) == (newest["gpu"], newest["torch"])]
    done = sorted(
        (row for row in rows if row["status"] == "ok"), key=lambda row: -row["images_per_second"]
    )
    others = {row["resolution"]: row for row in reversed(done) if row["resolution"] != 64}
    shown = [row for row in done if row["resolution"] == 64][:_MOST_ROWS] + [
        others[size] for size in sorted(others)
    ]
    lines = [
        f"{plain_text(newest['gpu'])}, torch {plain_text(newest['torch'])}, commit {_listed(rows, 'commit')}, "
        f"{_listed(rows, 'date')}:",
        "",
        "| number format | layout | step | batch | pixels | images/s | share of the measured matmul peak |",
        "|---|---|---|---|---|---|---|",
        *(_speed_line(row) for row in shown),
    ]
    if failed := Counter(row["status"] for row in rows if row["status"] != "ok"):
        reasons = ", ".join(
            f"{plain_text(reason)} ({count})" for reason, count in failed.most_common()
        )
        lines += ["", f"{failed.total()} of {len(rows)} settings gave no number: {reasons}."]
    return "\n".join(lines)


def _speed_line(row: dict) -> str:
    share = "" if row["share_of_peak"] is None else f"{100 * row['share_of_peak']:.0f} %"
    if share and row["peak_tflops"] is not None:
        share += f" of {row['peak_tflops']:.0f} TFLOP/s"
    cells = (
        plain_text(row["precision"]),
        plain_text(row["layout"]),
        _how_compiled(row),
        f"{row['batch']:,}",
        str(row["resolution"]),
        f"{row['images_per_second']:,.0f}",
        share,
    )
    return f"| {' | '.join(cells)} |"


def _how_compiled(row: dict) -> str:
    known = {"no": "eager", "yes": "compiled"}
    return known.get(row["compiled"]) or plain_text(f"compiled, {row['compiled']}")


def _fastest_step(speeds: list[dict]) -> str:
    """The fastest training step at 64 pixels on any GPU."""
    done = [row for row in speeds if row["status"] == "ok" and row["resolution"] == 64]
    done = [row for row in done if not row["gpu"].startswith("CPU")]
    if not done:
        return "not yet measured"
    row = max(done, key=lambda row: row["images_per_second"])
    how = [plain_text(row[name]) for name in ("gpu", "precision", "layout")]
    return f"{row['images_per_second']:,.0f} images/s, {', '.join(how)}, {_how_compiled(row)}, batch {row['batch']:,}"


# --- Figures and maps -------------------------------------------------------------------------------------------------

CAPTIONS = {
    "curves": "Loss and accuracy per epoch. Dashed: the published run, which had 200 classes and 30 epochs.",
    "gradcam": "Grad-CAM of the four stages, heat map and overlay, for the predicted class, on ten misclassified test "
    "images drawn at random. Each map is scaled to itself.",
    "class_maps": "The last stage on the same mistakes: what spoke for the class that was predicted, and what for the "
    "actual one.",
    "localisation": "Do the maps look at the object? Beside the two baselines that need no network.",
    "confused_pairs": "The pairs of classes that are confused most often.",
    "confusion": "All confusions, in an order that brings classes together that are confused.",
    "reliability": "How often answers of a given confidence are right, before and after a temperature fitted on the "
    "other half of the test images.",
    "classes": "Accuracy per class.",
    "augmentation": "Training images before and after the recipe's augmentation.",
    "learning_rate": "The one-cycle schedule.",
}


def figures_part(figures: Path) -> str:
    """The README's figures in Markdown, each with a caption, headed by the run that they show."""
    path = figures / "figures.json"
    if not os.path.lexists(path):
        return "Not yet drawn: `make run DATA=full` draws them."
    texts = dict.fromkeys(("run", "title", "device", "precision", "torch", "date"), str)
    numbers = {"train_images": int, "test_images": int, "test_top1": float, "test_top5": float}
    shown = read_object(path, "it was there just now", texts | numbers)
    said = {name: plain_text(shown[name]) for name in texts}
    lines = [
        f"All from one run, {_link(shown['run'], shown['run'])}: {said['title']}, "
        f"{shown['train_images']:,} / {shown['test_images']:,} images, **{shown['test_top1']:.2f} % top-1** and "
        f"{shown['test_top5']:.2f} % top-5 after the last epoch ({said['device']}, {said['precision']}, "
        f"torch {said['torch']}, {said['date']})."
    ]
    for name, caption in CAPTIONS.items():
        if (figures / f"{name}.png").exists():
            lines += ["", f"![{caption}]({figures.name}/{name}.png)", "", f"*{caption}*"]
    return "\n".join(lines)


ANSWERS = {
    ("all", "predicted"): "all, predicted class",
    ("all", "actual"): "all, actual class",
    ("right", "both"): "right answers",
    ("wrong", "predicted"): "wrong answers, predicted class",
    ("wrong", "actual"): "wrong answers, actual class",
}


def maps_part(figures: Path, results: Path) -> str:
    """The README's table of how well the maps meet the boxes, for the run that its figures show."""
    missing = "Not yet measured: `tinylab explain` measures it, `tinylab publish` puts it here."
    if not os.path.lexists(figures / "figures.json"):
        return missing
    name = read_object(figures / "figures.json", "it was there just now", {"run": str})["run"]
    path = results / name.replace("/", "_").lstrip(".") / "explain.json"
    found = (
        read_object(path, "it was there just now").get("localisation")
        if os.path.lexists(path)
        else None
    )
    if not found:
        return missing
    try:
        return _maps_table(name, found)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} is not what tinylab writes: its part on localisation lacks {error}"
        ) from error


def _maps_table(name: str, found: dict) -> str:
    method = METHOD_NAMES.get(found["method"], found["method"])
    lines = [
        f"{_link(name, name)}, {plain_text(method)} of {plain_text(found['stage'])}, {found['scored']:,} test "
        f"images (left out for want of a usable box: {found['degenerate']:,}):",
        "",
        "| boxes | answers | images | highest point in the box | image centre in the box | map inside | box area |",
        "|---|---|---|---|---|---|---|",
    ]
    for group in found["groups"]:
        which = ANSWERS.get((group["answers"], group["class"]))
        if which is None or not group["images"]:
            continue
        boxes = "all" if group["boxes"] == "all" else "below half of the image"
        shares = " | ".join(
            _with_interval(group[key]) for key in ("hit", "centre_hit", "energy", "uniform")
        )
        lines.append(f"| {boxes} | {which} | {group['images']:,} | {shares} |")
    return "\n".join(lines)


def _with_interval(share: dict) -> str:
    mean, low, high = (f"{100 * float(share[name]):.1f}" for name in ("mean", "low", "high"))
    return f"{mean} % ({low} to {high})"
