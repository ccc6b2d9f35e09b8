"""Every number that is published, read again from the records by other means than those that wrote it."""

import csv
import json
import re
import statistics
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results"
RUNS = sorted(path.parent for path in RESULTS.glob("*/summary.json"))
SPLITS = {
    "merged": ("49abea2b7c71c3c6", 77_000, 33_000),
    "official": ("e72a27b22fbc22d0", 100_000, 10_000),
    "select": ("1262bf926ea67092", 70_000, 7_000),
}
"""First digits of the hashes of all 200 classes, as the README gives them, and their images."""


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def table() -> dict[str, dict[str, str]]:
    with open(RESULTS / "results.csv", newline="", encoding="utf-8") as file:
        return {row["run"]: row for row in csv.DictReader(file)}


def part(name: str) -> str:
    return (
        (ROOT / "README.md")
        .read_text(encoding="utf-8")
        .split(f"<!-- {name} -->")[1]
        .split(f"<!-- /{name} -->")[0]
    )


@pytest.mark.parametrize("folder", RUNS, ids=lambda folder: folder.name)
def test_a_run_s_records_agree_with_each_other(folder: Path) -> None:
    summary, recipe, identity = (
        read(folder / f"{name}.json") for name in ("summary", "recipe", "run")
    )
    history = lines(folder / "metrics.jsonl")
    last = history[-1]
    assert [row["epoch"] for row in history] == list(range(1, recipe["epochs"] + 1))
    assert summary["test_top1"] == pytest.approx(
        100 * last["test_correct"] / last["test_total"], abs=1e-9
    )
    for name in ("test_top1", "test_top5", "test_loss", "test_correct", "train_top1", "train_loss"):
        assert summary[name] == last[name]
    assert summary["test_images"] == last["test_total"]
    assert summary["train_seconds"] == pytest.approx(
        sum(row["train_seconds"] for row in history), abs=0.01
    )
    if "time_to_accuracy_seconds" in summary:
        warm = summary["train_seconds"] + last["eval_seconds"]
        assert summary["time_to_accuracy_seconds"] == pytest.approx(warm, abs=0.01)
    for name in ("protocol", "classes", "seed"):
        assert summary[name] == identity[name]
    assert read(folder / "environment.json")["split_sha256"] == identity["split_sha256"]
    per_class = {"merged": (385, 165), "official": (500, 50), "select": (350, 35)}[
        summary["protocol"]
    ]
    assert (summary["train_images"], summary["test_images"]) == tuple(
        n * summary["classes"] for n in per_class
    )
    if summary["classes"] == 200:
        assert identity["split_sha256"].startswith(SPLITS[summary["protocol"]][0])
    assert summary["protocol"] != "select", "what is chosen on is not published"


@pytest.mark.parametrize("folder", RUNS, ids=lambda folder: folder.name)
def test_the_arithmetic_follows_from_the_recipe(folder: Path) -> None:
    """PFLOP of training: images x 13.33 GFLOP at 64 pixels, by the area and by the square of the width."""
    summary, recipe = read(folder / "summary.json"), read(folder / "recipe.json")
    sides, end = [recipe["resolution"]] * recipe["epochs"], 0.0
    for side, share in recipe.get("ramp", ()):  # an older record has none
        begin, end = end, end + share
        for epoch in range(
            round(begin * recipe["epochs"]),
            min(round(end * recipe["epochs"]), recipe["epochs"] - 1),
        ):
            sides[epoch] = side
    images, batch = summary["train_images"], recipe["batch_size"]
    images -= images % batch if recipe.get("drop_last") else 0
    petaflop = sum(
        images * 13.33e-6 * (side / 64) ** 2 * (recipe["width"] / 64) ** 2 for side in sides
    )
    assert float(table()[folder.name]["train_petaflop"]) == pytest.approx(petaflop, rel=1e-3)


def test_the_table_of_all_runs_says_what_the_records_say() -> None:
    rows = table()
    assert sorted(rows) == [folder.name for folder in RUNS]
    for folder in RUNS:
        row, recipe = rows[folder.name], read(folder / "recipe.json")
        records = [read(folder / f"{name}.json") for name in ("run", "environment", "summary")]
        for name, value in {
            key: value for record in records for key, value in record.items()
        }.items():
            shown = "" if value is None else str(value)
            if not isinstance(value, list):
                assert row[name].lstrip("'") == shown.lstrip("'"), (folder.name, name)
        for name, value in recipe.items():
            if not isinstance(value, list | type(None)):
                assert row[f"recipe.{name}"] == str(value), (folder.name, name)
        assert {"commit", "torch", "device", "split_sha256", "precision"} <= {
            name for name in row if row[name]
        }


def test_means_and_spreads_are_those_of_the_runs_that_differ_in_seed_only() -> None:
    seed_s = {"seed", "run", "n"}
    measured = re.compile(
        r"test_|train_(loss|top1|seconds)|seconds|images_per_second|flip|model_sha|mean_|sd_|median_|stops"
    )
    told = {
        "date",
        "commit",
        "skipped_steps",
        "compile_cache",
        "power_limit_watts",
        "processes",
        "class_order_sha256",
    }
    rows = list(table().values())

    def alike(one: dict, other: dict) -> bool:
        return all(
            one[k] == other[k] for k in one if k not in seed_s | told and not measured.search(k)
        )

    for row in rows:
        group = {other["seed"]: float(other["test_top1"]) for other in rows if alike(row, other)}
        assert int(row["n"]) == len(group)
        assert float(row["mean_top1"]) == pytest.approx(statistics.mean(group.values()))
        spread = statistics.stdev(group.values()) if len(group) > 1 else None
        assert (
            row["sd_top1"] == ""
            if spread is None
            else float(row["sd_top1"]) == pytest.approx(spread)
        )


def test_the_readme_shows_each_group_with_its_mean_and_n() -> None:
    shown = part("results")
    for row in table().values():
        (line,) = [line for line in shown.splitlines() if f"(results/{row['run']})" in line] or [
            None
        ]
        if line is None:  # it stands for its group under the name of the first run
            continue
        spread = f" ± {float(row['sd_top1']):.2f}" if row["sd_top1"] else ""
        assert f"| {float(row['mean_top1']):.2f}{spread} |" in line
        assert f"| {row['n']} |" in line
        assert f"{int(row['train_images']):,} / {int(row['test_images']):,}" in line
    for row in table().values():
        assert f"{float(row['mean_top1']):.2f}" in shown


def test_the_paired_differences_are_those_of_the_records() -> None:
    text, rows = part("paired"), table()
    run = r"\[([\d.]+) %\]\(results/([\w.-]+)\)[^|]*"
    pairs = re.findall(rf"^\| (\d+) \| {run}\| {run}\| ([+-][\d.]+) \|", text, re.M)
    both = [rows[name]["recipe"] for name in rows if rows[name]["classes"] == "20"]
    assert bool(pairs) == ({"published", "accurate"} <= set(both)) or not both
    for seed, one, first, other, second, difference in pairs:
        ours, theirs = (
            100 * int(rows[run]["test_correct"]) / int(rows[run]["test_images"])
            for run in (first, second)
        )
        assert rows[first]["seed"] == rows[second]["seed"] == seed
        assert rows[first]["split_sha256"] == rows[second]["split_sha256"]
        assert (rows[first]["recipe"], rows[second]["recipe"]) == ("published", "accurate")
        assert (float(one), float(other)) == (
            pytest.approx(ours, abs=0.005),
            pytest.approx(theirs, abs=0.005),
        )
        assert float(difference) == pytest.approx(theirs - ours, abs=0.005)
    for mean, n in re.findall(r"less `published`: ([+-][\d.]+) points \(n = (\d+)", text):
        if len(re.findall("less `published`", text)) == 1:
            assert int(n) == len(pairs)
            assert float(mean) == pytest.approx(
                statistics.mean(float(pair[-1]) for pair in pairs), abs=0.01
            )


def test_figures_and_notebook_show_a_published_run() -> None:
    shown = read(ROOT / "images-A" / "figures.json")
    summary = read(RESULTS / shown["run"] / "summary.json")
    assert (shown["test_top1"], shown["test_images"]) == (
        summary["test_top1"],
        summary["test_images"],
    )
    assert f"**{summary['test_top1']:.2f} % top-1**" in part("figures")


def test_choices_were_made_on_select_alone_and_the_log_has_them() -> None:
    selection, decisions = lines(RESULTS / "selection.jsonl"), lines(RESULTS / "decisions.jsonl")
    log = (ROOT / "LOG.md").read_text(encoding="utf-8")
    for row in selection:
        if row["status"] == "ok":
            assert row["top1"] == pytest.approx(
                100 * row["test_correct"] / row["test_images"], abs=1e-9
            )
            assert (row["train_images"], row["test_images"]) == (
                350 * row["classes"],
                35 * row["classes"],
            )
            if row["classes"] == 200:
                assert row["environment"]["split_sha256"].startswith(SPLITS["select"][0])
    known = {round(row["top1"], 6) for row in selection if row["status"] == "ok"}
    for decision in decisions:
        assert f"{decision['date']}: {decision['stage']} (`{decision['recipe']}`)" in log
        assert decision["reason"] in log
        assert {
            round(top1, 6) for outcome in decision["outcomes"] for top1 in outcome["top1"]
        } <= known


def test_the_hashes_are_those_that_the_readme_gives() -> None:
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    for name, (digits, train_images, test_images) in SPLITS.items():
        assert re.search(
            rf"`{name}` \| {train_images:,} / {test_images:,} \|.*`{digits}…`", page
        ), name
