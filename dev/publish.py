"""Publish a run: its small records into results/, results.csv and the README's generated parts.

    python dev/publish.py runs/NAME     copy the run's records, then make all tables anew
    python dev/publish.py               make all tables anew

What comes from a file is shown as text, whatever it holds.
"""

import argparse
import csv
import dataclasses
import json
import statistics
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

from tinylab.exceptions import UserError
from tinylab.files import as_csv, write_atomically
from tinylab.recipe import training_petaflop
from tinylab.recipes import RECIPES, named
from tinylab.run.folder import Run, hashes, plain_text, published_history

REPOSITORY = Path(__file__).resolve().parents[1]

# --- Records and rows -----------------------------------------------------------------------------

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


def publish_run(run: Run, results: Path, readme: Path) -> list[Path]:
    """Copy what is small and says nothing of the machine's folders to results/<run>; make tables.

    Raise `UserError` if the run is not finished or another one of that name was published.
    """
    target = Run(results / run.folder.resolve().name)
    records = {
        "recipe.json": dataclasses.asdict(run.recipe),
        "run.json": {key: value for key, value in run.identity.items() if key != "data_folder"},
        "environment.json": run.environment | hashes(run.identity),
        "summary.json": run.summary,
    }
    if explanation := run.explanation:  # what it says of single images stays with the run
        kept = ("model_sha256", "tested", "wrong", "method", "localisation", "faithfulness")
        records["explain.json"] = {name: explanation.get(name) for name in kept}
        records["explain.json"]["calibration"] = explanation["errors"].get("calibration")
    if target.finished and target.summary["model_sha256"] != run.summary["model_sha256"]:
        raise UserError(f"{target.folder} holds another run: delete it first to replace it")
    target.folder.mkdir(parents=True, exist_ok=True)
    target.write_history(run.history)
    for name, value in records.items():
        target.write(name, value)
    return [target.folder, *rewrite_tables(results, readme)]


def rewrite_tables(results: Path, readme: Path) -> list[Path]:
    """Make results.csv and the README's generated parts anew; return the files."""
    files = generated(results, readme)
    for path, content in files.items():
        write_atomically(path, content)
    return list(files)


def generated(results: Path, readme: Path) -> dict[Path, bytes]:
    """Return what results.csv and the README are to hold, by their paths."""
    rows, speeds = published_rows(results), read_throughput(results / "throughput.csv")
    figures = readme.parent / "images-A"
    page = readme.read_text(encoding="utf-8")
    for name, text in {
        "results": results_table(rows, published_history(results)),
        "targets": targets_table(rows, speeds),
        "paired": paired_part(rows),
        "throughput": throughput_part(speeds),
        "figures": figures_part(figures),
        "maps": maps_part(figures, results),
    }.items():
        page = replace_between(page, name, text, readme)
    columns = list(dict.fromkeys(column for row in rows for column in row))
    table = as_csv([columns, *([row.get(column) for column in columns] for row in rows)])
    return {results / "results.csv": table, readme: page.encode()}


def replace_between(page: str, name: str, text: str, readme: Path) -> str:
    """Replace what stands between `<!-- name -->` and `<!-- /name -->`."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if page.count(begin) != 1 or page.count(end) != 1:
        raise UserError(f"{readme} must hold {begin} and {end} once each")
    before, rest = page.split(begin)
    return f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}"


def published_rows(results: Path) -> list[dict]:
    """Return the rows of results.csv: result first, then what decided it, then where it was had."""
    rows, published = [], published_history(results)
    for path in sorted(results.glob("*/summary.json")):
        run = Run(path.parent)
        last = [epoch["test_top1"] for epoch in run.history[-10:] if "test_top1" in epoch]
        whole = run.identity["classes"] == 200
        result = {
            "run": run.folder.name,
            **run.summary,
            "train_petaflop": training_petaflop(run.recipe, run.summary["train_images"]),
            **dict.fromkeys(GROUP_NUMBERS),
            "median_last10_top1": statistics.median(last) if len(last) == 10 else None,
            "largest_gap_to_published": largest_gap(run.history, published) if whole else None,
        }
        recipe = {f"recipe.{name}": value for name, value in dataclasses.asdict(run.recipe).items()}
        # Where two files speak of one thing the environment counts, but never for the result.
        rows.append(result | run.identity | recipe | run.environment | result | recipe)
    numbers = {group_key(runs[0]): group_numbers(runs) for runs in grouped(rows)}
    return [row | numbers[group_key(row)] for row in rows]


def largest_gap(history: list[dict], published: list[dict]) -> float | None:
    """Return the largest difference of test top-1 to the course run's from epoch 10 on, in points.

    None for a run of another length.
    """
    ours = [row.get("test_top1") for row in history[9:]]
    if len(history) != len(published) or not ours or None in ours:
        return None
    theirs = [float(row["test_accuracy_pct"]) for row in published[9:]]
    return max(abs(one - other) for one, other in zip(ours, theirs, strict=True))


def grouped(rows: list[dict]) -> list[list[dict]]:
    """Return the rows in groups of runs that differ in their seed only."""
    groups: dict[str, list[dict]] = {}
    for row in rows:
        groups.setdefault(group_key(row), []).append(row)
    return list(groups.values())


def group_key(row: dict) -> str:
    """Return what runs of one group have in common."""
    same = [row[name] for name in ("protocol", "classes", "content_sha256", "device", "precision")]
    same += [row.get("compiled"), row.get("processes") or 1]
    return json.dumps(same + [row[name] for name in row if name.startswith("recipe.")])


def group_numbers(runs: list[dict]) -> dict:
    """Return n, mean and sample standard deviation of top-1, and mean seconds; each seed once."""
    runs = each_seed(runs)
    top1 = [run["test_top1"] for run in runs]
    spread = statistics.stdev(top1) if len(runs) > 1 else None
    seconds = (mean(runs, "train_seconds"), mean(runs, "time_to_accuracy_seconds"))
    numbers = (len(runs), statistics.mean(top1), spread, *seconds)
    return dict(zip(GROUP_NUMBERS, numbers, strict=True))


def each_seed(runs: list[dict]) -> list[dict]:
    """Return one run per seed: of a seed that was run again the first folder by name."""
    once: dict[int, dict] = {}
    for run in sorted(runs, key=lambda run: run["run"]):
        once.setdefault(run["seed"], run)
    return list(once.values())


def mean(runs: list[dict], name: str) -> float | None:
    """Return the mean, rounded to a millionth; None unless every run has that number."""
    values = [run.get(name) for run in runs]
    return None if None in values else round(statistics.mean(values), 6)


def changes(row: dict, name: str) -> dict | None:
    """Return the fields in which a run is not as the recipe `name` has them; None: of another."""
    if row["recipe"] != name or name not in RECIPES:
        return None
    now = dataclasses.asdict(named(name))
    own = {field: row.get(f"recipe.{field}") for field in now}
    return {field: value for field, value in own.items() if value != now[field]}


def measured(rows: list[dict], name: str) -> list[list[dict]]:
    """Return the groups of the recipe exactly as it stands, on all classes of its own split."""
    task = (PROTOCOLS[name], 200, *IMAGES[PROTOCOLS[name]])
    fields = ("protocol", "classes", "train_images", "test_images")
    own = [row for row in rows if tuple(row[field] for field in fields) == task]
    return grouped([row for row in own if changes(row, name) == {}])


# --- The table of results -------------------------------------------------------------------------


def table(header: str, rows: list[list[str]]) -> str:
    """Return a table in Markdown. header: its cells, separated by " | "."""
    lines = [f"| {header} |", "|" + "---|" * len(header.split(" | "))]
    return "\n".join([*lines, *(f"| {' | '.join(cells)} |".replace("  ", " ") for cells in rows)])


def results_table(rows: list[dict], published: list[dict]) -> str:
    """Return the README's results: the course run, all 200 classes, what is not measured, others."""
    cells = []
    if published:
        last, petaflop = published[-1], training_petaflop(named("published"), 77_000)
        top1 = f"{float(last['test_accuracy_pct']):.2f}"
        cells.append([
            "the published run (reference)", "unseeded 70/30, 200", "77,000 / 33,000",
            str(last["epoch"]), top1, "not reported", "1", f"{petaflop:.3g}", "79 min",
            "not reported", "a Colab GPU, fp32",
        ])  # fmt: skip
    groups = grouped(rows)
    cells += [result_line(runs) for runs in groups if runs[0]["classes"] == 200]
    for name, protocol in PROTOCOLS.items():
        if not measured(rows, name):
            images = " / ".join(f"{count:,}" for count in IMAGES[protocol])
            petaflop = f"{training_petaflop(named(name), IMAGES[protocol][0]):.3g}"
            needs = "hours on two CPU cores" if name == "cpu" else "needs a GPU"
            what = [f"`{name}`", f"{protocol}, 200", images, str(named(name).epochs)]
            cells.append([*what, "not yet measured", "", "", petaflop, "", "", needs])
    cells += [result_line(runs) for runs in groups if runs[0]["classes"] != 200]
    header = (
        "run | split, classes | train / test images | epochs | top-1 % | top-5 % | seeds | PFLOP"
    )
    return table(f"{header} | training | to accuracy, warm (cold) | device", cells)


def result_line(runs: list[dict]) -> list[str]:
    """Return the cells of one or more runs that differ in their seed only."""
    first, once = runs[0], each_seed(runs)
    own = changes(first, first["recipe"]) or {}
    overrides = "".join(f", {name} {own[name]}" for name in own if name != "epochs")
    cpu = mean(once, "train_cpu_seconds") if first["device"].startswith("CPU") else None
    muon = f" + {first['muon_petaflop']:.2g} Muon" if first.get("muon_petaflop") else ""
    return [
        f"{link(first['recipe'], first['run'])}{plain_text(overrides)}",
        f"{plain_text(first['protocol'])}, {which_classes(first['classes'])}",
        f"{first['train_images']:,} / {first['test_images']:,}",
        str(first["epochs"]),
        mean_and_spread(once, "test_top1"),
        mean_and_spread(once, "test_top5"),
        str(len(once)) if len(once) == len(runs) else f"{len(once)} ({len(runs)} runs)",
        f"{first['train_petaflop']:.3g}{muon}",
        duration(mean(once, "train_seconds")) + (f" ({duration(cpu)} of CPU)" if cpu else ""),
        to_accuracy(runs),
        where(runs),
    ]


def where(runs: list[dict]) -> str:
    """Return device, number format, what is unusual, torch."""
    first = runs[0]
    parts = [first["device"], first["precision"]]
    parts += ["compiled"] if first.get("compiled") else []
    parts += [f"{first['processes']} processes"] if (first.get("processes") or 1) != 1 else []
    return ", ".join([*map(plain_text, parts), f"torch {listed(runs, 'torch')}"])


def listed(rows: list[dict], name: str) -> str:
    """Return what the rows hold there, each value once."""
    return " and ".join(dict.fromkeys(plain_text(row[name]) for row in rows))


def to_accuracy(runs: list[dict]) -> str:
    """Return mean times, warm and, in brackets, cold.

    A clock is cold in the first run of a process that found no compiled code and never stopped.
    """
    once = each_seed(runs)
    cold = [
        run
        for run in once
        if (not run.get("compiled") or run.get("compile_cache") == "empty")
        and not (run.get("earlier_runs") or run.get("stops"))
    ]
    seconds = mean(cold, "cold_time_to_accuracy_seconds") if cold else None
    count = f", n = {len(cold)}" if cold and len(cold) < len(once) else ""
    return f"{duration(mean(once, 'time_to_accuracy_seconds'))} ({duration(seconds)}{count})"


def duration(seconds: float | None) -> str:
    """Return seconds in words."""
    if seconds is None:
        return "not recorded"
    return f"{seconds:.1f} s" if seconds < 300 else f"{seconds / 60:.1f} min"


def link(text: str, run: str) -> str:
    """Return a link to the record of a published run."""
    plain = all(each.isalnum() or each in "_.-" for each in text)
    return f"[{f'`{text}`' if plain else plain_text(text)}](results/{plain_text(run)})"


def which_classes(classes: int) -> str:
    """Return how many classes, in words."""
    return "200" if classes == 200 else f"first {classes}"


def mean_and_spread(rows: list[dict], name: str) -> str:
    """Return the mean and, of several runs, the sample standard deviation."""
    values = [row[name] for row in rows]
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


# --- Targets --------------------------------------------------------------------------------------

GOAL = 57.55
"""Percent top-1: the course run's, which `speedrun` is to reach."""
SEEDS = {"speedrun": 5, "accurate": 3}
"""How many seeds the targets ask for."""


def targets_table(rows: list[dict], speeds: list[dict]) -> str:
    """Return numbers to compare with (results/targets.csv) beside what was measured here."""
    with open(REPOSITORY / "results" / "targets.csv", newline="", encoding="utf-8") as file:
        targets = list(csv.reader(file))
    cells = [
        [*own, fastest_step(speeds) if name == "throughput" else measured_here(rows, name)]
        for name, *own in targets[1:]
    ]
    return table(" | ".join([*targets[0][1:], "measured here"]), cells)


def measured_here(rows: list[dict], name: str) -> str:
    """Return the result of the recipe's group with most seeds, of those the fastest."""
    groups = measured(rows, name)
    if not groups:
        return "not yet measured"
    runs = max(groups, key=lambda own: (len(each_seed(own)), -mean(own, "train_seconds")))
    numbers, once = group_numbers(runs), each_seed(runs)
    n, wanted = numbers["n"], SEEDS.get(name, 1)
    count = f"n = {n}" if n >= wanted else f"{n} of {wanted} seeds"
    place = f"{where(runs)}, {link(runs[0]['run'], runs[0]['run'])}"
    if name == "speedrun" and (n < wanted or numbers["mean_top1"] < GOAL):
        not_reached = "not reached: " if n >= wanted else ""
        return f"{not_reached}{numbers['mean_top1']:.2f} ({count}), {place}"
    parts = [f"{mean_and_spread(once, 'test_top1')} ({count})"]
    gaps = [run["largest_gap_to_published"] for run in once if run["largest_gap_to_published"]]
    if name == "published" and gaps:
        parts.append(f"from epoch 10 on at most {max(gaps):.2f} points from the published curve")
    if name == "official" and (median := mean(once, "median_last10_top1")):
        parts.append(f"median of the last 10 epochs {median:.2f}")
    parts.append(f"{duration(numbers['mean_train_seconds'])} of training")
    if name == "speedrun":
        parts.append(f"to accuracy, warm (cold): {to_accuracy(runs)}")
    return ", ".join([*parts, place])


# --- Two recipes on the same images ---------------------------------------------------------------


def paired_part(rows: list[dict]) -> str:
    """Return `published` and `accurate` seed by seed, for every task on which both were run."""
    tasks: dict[str, dict[str, dict[int, dict]]] = {}
    same = ("protocol", "classes", "epochs", "content_sha256", "split_sha256", "device")
    same = (*same, "precision", "compiled")
    for row in sorted(rows, key=lambda row: row["run"], reverse=True):
        own = changes(row, row["recipe"])
        if (
            row["recipe"] in ("published", "accurate")
            and own is not None
            and not own.keys() - {"epochs"}
        ):
            task = tasks.setdefault(json.dumps([row.get(name) for name in same]), {})
            task.setdefault(row["recipe"], {})[row["seed"]] = row
    parts = []
    for task in tasks.values():
        ones, others = task.get("published", {}), task.get("accurate", {})
        if seeds := sorted(ones.keys() & others.keys()):
            parts.append(
                paired_table([ones[seed] for seed in seeds], [others[seed] for seed in seeds])
            )
    return "\n\n".join(parts) or "Not yet measured."


def paired_table(published: list[dict], accurate: list[dict]) -> str:
    """Return the table of two recipes' runs with equal seeds, and a sentence about it."""
    first, n = published[0], len(published)
    differences, cells = [], []
    for pair in zip(published, accurate, strict=True):
        differences.append(pair[1]["test_top1"] - pair[0]["test_top1"])
        tops = [
            f"{link(f'''{run['test_top1']:.2f} %''', run['run'])} "
            f"({run['test_correct']:,} / {run['test_images']:,})"
            for run in pair
        ]
        cells.append([str(pair[0]["seed"]), *tops, f"{differences[-1]:+.2f}"])
    spread = "no spread from one seed"
    if n > 1:
        deviation = statistics.stdev(differences)
        error = f"standard error {deviation / n**0.5:.2f}"
        spread = f"sample standard deviation {deviation:.2f}, {error}"
    steps, minutes = [], []
    for runs in (published, accurate):
        recipe = replace(named(runs[0]["recipe"]), epochs=runs[0]["epochs"])
        steps.append(f"{recipe.steps_per_epoch(runs[0]['train_images']) * recipe.epochs:,}")
        minutes.append(f"{statistics.mean(run['train_seconds'] for run in runs) / 60:.1f}")
    arithmetic = plain_text(f"{first['precision']}{', compiled' if first.get('compiled') else ''}")
    return (
        f"{plain_text(first['protocol'])}, {which_classes(first['classes'])} classes, "
        f"{first['epochs']} epochs, {first['train_images']:,} / {first['test_images']:,} images, "
        f"{plain_text(first['device'])}, {arithmetic}:\n\n"
        + table("seed | `published` top-1 | `accurate` top-1 | difference in points", cells)
        + f"\n\nMean difference, `accurate` less `published`: {statistics.mean(differences):+.2f} "
        f"points (n = {n}, {spread}). Optimiser steps: {' and '.join(steps)}. "
        f"Training, mean: {' and '.join(minutes)} minutes."
    )


# --- Throughput -----------------------------------------------------------------------------------


def read_throughput(path: Path) -> list[dict]:
    """Return the rows of throughput.csv (bench_throughput.py writes it), numbers as numbers."""
    if not path.exists():
        return []
    kinds = {"batch": int, "resolution": int, "images_per_second": float}
    kinds |= {"share_of_peak": float, "peak_tflops": float}
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [
        {name: kinds.get(name, str)(value) if value else None for name, value in row.items()}
        for row in rows
    ]


def throughput_part(speeds: list[dict]) -> str:
    """Return images/s of a training step on the GPU of the newest row.

    The 12 fastest at 64 pixels, the fastest at each other size, and what gave no number.
    """
    gpus = [row for row in speeds if not row["gpu"].startswith("CPU")]
    done = sorted(
        (row for row in gpus if row["status"] == "ok"), key=lambda row: -row["images_per_second"]
    )
    if not done:
        return "Not yet measured on a GPU: `python benchmarks/bench_throughput.py` measures it."
    newest = max(done, key=lambda row: row["date"])
    rows = [row for row in gpus if (row["gpu"], row["torch"]) == (newest["gpu"], newest["torch"])]
    done = [row for row in done if row in rows]
    others = {row["resolution"]: row for row in reversed(done) if row["resolution"] != 64}
    shown = [row for row in done if row["resolution"] == 64][:12]
    shown += [others[side] for side in sorted(others)]
    cells = []
    for row in shown:
        share = f"{100 * row['share_of_peak']:.0f} %" if row["share_of_peak"] else ""
        share += f" of {row['peak_tflops']:.0f} TFLOP/s" if row["peak_tflops"] else ""
        speed = f"{row['images_per_second']:,.0f}"
        what = [row["precision"], row["layout"], how_compiled(row)]
        cells.append(
            [*map(plain_text, what), f"{row['batch']:,}", str(row["resolution"]), speed, share]
        )
    parts = [
        f"{plain_text(newest['gpu'])}, torch {plain_text(newest['torch'])}, "
        f"commit {listed(rows, 'commit')}, {listed(rows, 'date')}:",
        table(
            "number format | layout | step | batch | pixels | images/s "
            "| share of the measured matmul peak",
            cells,
        ),
    ]
    if failed := Counter(row["status"] for row in rows if row["status"] != "ok"):
        reasons = [f"{plain_text(reason)} ({count})" for reason, count in failed.most_common()]
        numbers = f"{failed.total()} of {len(rows)} settings gave no number"
        parts.append(f"{numbers}: {', '.join(reasons)}.")
    return "\n\n".join(parts)


def how_compiled(row: dict) -> str:
    """Return "eager" or how the step was compiled."""
    known = {"no": "eager", "yes": "compiled"}
    return known.get(row["compiled"], f"compiled, {row['compiled']}")


def fastest_step(speeds: list[dict]) -> str:
    """Return the fastest training step at 64 pixels on any GPU."""
    done = [row for row in speeds if row["status"] == "ok" and row["resolution"] == 64]
    done = [row for row in done if not row["gpu"].startswith("CPU")]
    if not done:
        return "not yet measured"
    row = max(done, key=lambda row: row["images_per_second"])
    how = [plain_text(row[name]) for name in ("gpu", "precision", "layout")]
    how += [how_compiled(row), f"batch {row['batch']:,}"]
    return f"{row['images_per_second']:,.0f} images/s, {', '.join(how)}"


# --- Figures and maps -----------------------------------------------------------------------------

CAPTIONS = {
    "curves": "Loss and accuracy per epoch. Dashed: the published run, which had 200 classes and "
    "30 epochs.",
    "gradcam": "Grad-CAM of the four stages, heat map and overlay, for the predicted class, on ten "
    "misclassified test images drawn at random. Each map is scaled to itself.",
    "class_maps": "The last stage on the same mistakes: what spoke for the class that was "
    "predicted, and what for the actual one.",
    "localisation": "Do the maps look at the object? Beside the two baselines that need no "
    "network.",
    "confused_pairs": "The pairs of classes that are confused most often.",
    "confusion": "All confusions, in an order that brings classes together that are confused.",
    "reliability": "How often answers of a given confidence are right, before and after a "
    "temperature fitted on the other half of the test images.",
    "classes": "Accuracy per class.",
    "augmentation": "Training images before and after the recipe's augmentation.",
    "learning_rate": "The one-cycle schedule.",
}
ANSWERS = {
    ("all", "predicted"): "all, predicted class",
    ("all", "actual"): "all, actual class",
    ("right", "both"): "right answers",
    ("wrong", "predicted"): "wrong answers, predicted class",
    ("wrong", "actual"): "wrong answers, actual class",
}


def figures_part(figures: Path) -> str:
    """Return the README's figures, each with a caption, headed by the run that they show."""
    if not (figures / "figures.json").exists():
        return "Not yet drawn: `make run DATA=full` draws them."
    run = json.loads((figures / "figures.json").read_text(encoding="utf-8"))
    text = {
        name: plain_text(run[name]) for name in ("title", "device", "precision", "torch", "date")
    }
    lines = [
        f"All from one run, {link(run['run'], run['run'])}: {text['title']}, "
        f"{run['train_images']:,} / {run['test_images']:,} images, "
        f"**{run['test_top1']:.2f} % top-1** and {run['test_top5']:.2f} % top-5 after the last "
        f"epoch ({text['device']}, {text['precision']}, torch {text['torch']}, {text['date']})."
    ]
    for name, caption in CAPTIONS.items():
        if (figures / f"{name}.png").exists():
            lines += ["", f"![{caption}]({figures.name}/{name}.png)", "", f"*{caption}*"]
    return "\n".join(lines)


def maps_part(figures: Path, results: Path) -> str:
    """Return how well the maps meet the boxes, for the run that the figures show."""
    missing = "Not yet measured: `tinylab explain` measures it, `make publish` puts it here."
    if not (figures / "figures.json").exists():
        return missing
    name = json.loads((figures / "figures.json").read_text(encoding="utf-8"))["run"]
    path = results / Path(name).name / "explain.json"
    record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    boxes = record.get("localisation")
    if not boxes:
        return missing
    cells = []
    for group in boxes["groups"]:
        which = ANSWERS.get((group["answers"], group["class"]))
        if which is None or not group["images"]:
            continue
        shares = []
        for key in ("hit", "centre_hit", "energy", "uniform"):
            share, low, high = (f"{100 * group[key][part]:.1f}" for part in ("mean", "low", "high"))
            shares.append(f"{share} % ({low} to {high})")
        size = "all" if group["boxes"] == "all" else "below half of the image"
        cells.append([size, which, f"{group['images']:,}", *shares])
    header = "boxes | answers | images | highest point in the box | image centre in the box"
    return (
        f"{link(name, name)}, Grad-CAM of {plain_text(boxes['stage'])}, {boxes['scored']:,} test "
        f"images (left out for want of a usable box: {boxes['degenerate']:,}):\n\n"
        + table(f"{header} | map inside | box area", cells)
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=Path, nargs="?", help="the run folder to publish")
    run = parser.parse_args().run
    where = (REPOSITORY / "results", REPOSITORY / "README.md")
    try:
        for path in publish_run(Run(run), *where) if run else rewrite_tables(*where):
            print(path.relative_to(REPOSITORY))
    except UserError as error:
        print(f"publish.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
