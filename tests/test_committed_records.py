"""Every number that is published, read again from the records by other means."""

import csv
import json
import re
import statistics
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results"
RUNS = sorted(path.parent for path in RESULTS.glob("*/summary.json"))
README, PROTOCOL, FINDINGS = (
    (ROOT / page).read_text(encoding="utf-8")
    for page in ("README.md", "docs/protocol.md", "docs/results.md")
)
SPLITS = {
    "merged": ("49abea2b7c71c3c6", 385, 165),
    "official": ("e72a27b22fbc22d0", 500, 50),
    "select": ("1262bf926ea67092", 350, 35),
}
"""First digits of the hashes of all 200 classes, training and test images of each class."""
with open(RESULTS / "results.csv", newline="", encoding="utf-8") as _file:
    TABLE = {row["run"]: row for row in csv.DictReader(_file)}


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def part(page: str, name: str) -> str:
    return page.split(f"<!-- {name} -->")[1].split(f"<!-- /{name} -->")[0]


@pytest.mark.parametrize("folder", RUNS, ids=lambda folder: folder.name)
def test_a_runs_records_agree_with_each_other(folder: Path) -> None:
    names = ("summary", "recipe", "run", "environment")
    summary, recipe, identity, environment = (read(folder / f"{name}.json") for name in names)
    history = lines(folder / "metrics.jsonl")
    last = history[-1]
    assert [row["epoch"] for row in history] == list(range(1, recipe["epochs"] + 1))
    top1 = 100 * last["test_correct"] / last["test_total"]
    assert summary["test_top1"] == pytest.approx(top1, abs=1e-9)
    for name in ("test_top1", "test_top5", "test_loss", "test_correct", "train_top1", "train_loss"):
        assert summary[name] == last[name]
    assert summary["test_images"] == last["test_total"]
    seconds = sum(row["train_seconds"] for row in history)
    assert summary["train_seconds"] == pytest.approx(seconds, abs=0.01)
    if "time_to_accuracy_seconds" in summary:
        warm = seconds + last["eval_seconds"]
        assert summary["time_to_accuracy_seconds"] == pytest.approx(warm, abs=0.02)
    for name in ("protocol", "classes", "seed"):
        assert summary[name] == identity[name]
    assert environment["split_sha256"] == identity["split_sha256"]
    digits, *per_class = SPLITS[summary["protocol"]]
    images = [summary["train_images"], summary["test_images"]]
    assert images == [count * summary["classes"] for count in per_class]
    assert summary["classes"] < 200 or identity["split_sha256"].startswith(digits)
    assert summary["protocol"] != "select", "what is chosen on is not published"


@pytest.mark.parametrize("folder", RUNS, ids=lambda folder: folder.name)
def test_the_arithmetic_follows_from_the_recipe(folder: Path) -> None:
    """Images x 13.33 GFLOP at 64 pixels, by the area and by the square of the width."""
    summary, recipe = read(folder / "summary.json"), read(folder / "recipe.json")
    epochs = recipe["epochs"]
    sides, end = [recipe["resolution"]] * epochs, 0.0
    for side, share in recipe.get("ramp", ()):  # an older record has none
        begin, end = end, end + share
        for epoch in range(round(begin * epochs), min(round(end * epochs), epochs - 1)):
            sides[epoch] = side
    images = summary["train_images"]
    images -= images % recipe["batch_size"] if recipe.get("drop_last") else 0
    area = sum((side / 64) ** 2 for side in sides) * (recipe["width"] / 64) ** 2
    petaflop = float(TABLE[folder.name]["train_petaflop"])
    assert petaflop == pytest.approx(images * 13.33e-6 * area, rel=1e-3)


def test_the_table_of_all_runs_holds_what_the_records_hold() -> None:
    assert sorted(TABLE) == [folder.name for folder in RUNS]
    for folder in RUNS:
        row, recipe = TABLE[folder.name], read(folder / "recipe.json")
        record: dict = {}
        for name in ("run", "environment", "summary"):
            record |= read(folder / f"{name}.json")
        record |= {f"recipe.{name}": value for name, value in recipe.items()}
        for name, value in record.items():
            if not isinstance(value, list) and not (name in row and value is None):
                assert row[name].lstrip("'") == str(value).lstrip("'"), (folder.name, name)
        assert all(row[name] for name in ("commit", "torch", "device", "split_sha256", "precision"))


def test_means_and_spreads_are_those_of_the_runs_that_differ_in_seed_only() -> None:
    measured = re.compile(
        r"test_|train_(loss|top1|seconds)|seconds|images_per_second|flip|model_sha|mean_|sd_|median_"
        r"|stops|^(seed|run|n|date|commit|skipped_steps|compile_cache|power_limit_watts|processes"
        r"|class_order_sha256)$"
    )
    groups: dict[tuple, dict[str, float]] = {}
    for row in TABLE.values():
        key = tuple((name, value) for name, value in row.items() if not measured.search(name))
        groups.setdefault(key, {})[row["seed"]] = float(row["test_top1"])
    for row in TABLE.values():
        key = tuple((name, value) for name, value in row.items() if not measured.search(name))
        group = groups[key].values()
        assert int(row["n"]) == len(group)
        assert float(row["mean_top1"]) == pytest.approx(statistics.mean(group))
        spread = statistics.stdev(group) if len(group) > 1 else None
        assert (float(row["sd_top1"]) if row["sd_top1"] else None) == pytest.approx(spread)


def test_the_pages_show_each_group_with_its_mean_and_n() -> None:
    shown, front = part(FINDINGS, "results"), part(README, "front")
    for row in TABLE.values():
        spread = f" ± {float(row['sd_top1']):.2f}" if row["sd_top1"] else ""
        cell = f"| {float(row['mean_top1']):.2f}{spread} |"
        assert cell in shown
        own = [line for line in shown.splitlines() if f"(results/{row['run']})" in line]
        for line in own:  # others of the group stand under the name of its first run
            images = f"{int(row['train_images']):,} / {int(row['test_images']):,}"
            assert all(text in line for text in (cell, f"| {row['n']} |", images))
        for line in front.splitlines():
            if f"(results/{row['run']})" in line:
                assert f"| {float(row['mean_top1']):.2f}" in line
    (best,) = re.findall(r"on Tiny ImageNet to ([\d.]+) % top-1", README)
    whole = [float(row["mean_top1"]) for row in TABLE.values() if row["classes"] == "200"]
    assert float(best) == pytest.approx(max(whole), abs=0.005)


def test_figures_and_notebook_show_a_published_run() -> None:
    shown = read(ROOT / "images-A" / "figures.json")
    summary = read(RESULTS / shown["run"] / "summary.json")
    for name in ("test_top1", "test_images"):
        assert shown[name] == summary[name]
    assert f"**{summary['test_top1']:.2f} % top-1**" in part(FINDINGS, "figures")


def test_choices_were_made_on_select_alone() -> None:
    digits, train_images, test_images = SPLITS["select"]
    for row in lines(RESULTS / "selection.jsonl"):
        if row["status"] == "ok":
            top1 = 100 * row["test_correct"] / row["test_images"]
            assert row["top1"] == pytest.approx(top1, abs=1e-9)
            images = [count * row["classes"] for count in (train_images, test_images)]
            assert [row["train_images"], row["test_images"]] == images
            if row["classes"] == 200:
                assert row["environment"]["split_sha256"].startswith(digits)


def test_the_hashes_are_those_that_the_docs_give() -> None:
    for name, (digits, train, test) in SPLITS.items():
        images = f"{200 * train:,} / {200 * test:,}"
        assert re.search(rf"`{name}` \| {images} \|.*`{digits}…`", PROTOCOL), name
