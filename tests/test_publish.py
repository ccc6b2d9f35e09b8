"""What is published is computed from the records: groups, targets, pairs, throughput."""

import csv
import dataclasses
import json
import shutil
from pathlib import Path

import publish
import pytest

from tinylab.exceptions import UserError
from tinylab.recipes import RECIPES, named
from tinylab.run.folder import Run

PARTS = ("results", "targets", "paired", "throughput", "figures", "maps")
PAGE = "".join(f"<!-- {part} -->\n<!-- /{part} -->\n" for part in PARTS)


def row(recipe: str = "accurate", seed: int = 0, top1: float = 60.0, **fields: object) -> dict:
    """Return a made-up row of results.csv: the recipe as it stands, on all 200 classes."""
    protocol = fields.get("protocol", publish.PROTOCOLS[recipe])
    train_images, test_images = publish.IMAGES.get(protocol, (70_000, 7_000))
    recorded = {
        "run": f"{recipe}-{protocol}-s{seed}", "recipe": recipe, "protocol": protocol,
        "classes": 200, "seed": seed, "epochs": named(recipe).epochs,
        "train_images": train_images, "test_images": test_images, "test_top1": top1,
        "test_top5": 80.0, "test_correct": round(top1 * test_images / 100),
        "train_seconds": 360.0, "train_petaflop": 30.8, "time_to_accuracy_seconds": 363.0,
        "cold_time_to_accuracy_seconds": 393.0, "median_last10_top1": top1 - 0.5,
        "largest_gap_to_published": None, "content_sha256": "c", "split_sha256": "s",
        "device": "NVIDIA H100", "precision": "fp16", "torch": "2.11",
    }  # fmt: skip
    own = {f"recipe.{name}": value for name, value in dataclasses.asdict(named(recipe)).items()}
    return recorded | own | fields


def seeds(recipe: str, *top1: float, **fields: object) -> list[dict]:
    return [row(recipe, seed, value, **fields) for seed, value in enumerate(top1)]


def test_only_runs_that_differ_in_seed_share_a_line() -> None:
    first, again = row(top1=50.0), row(seed=1, top1=52.0, processes=1)
    (line,) = [
        line
        for line in publish.results_table([first, again], []).splitlines()
        if "results/accurate" in line
    ]
    assert "| 51.00 ± 1.41 | 80.00 ± 0.00 | 2 | 30.8 | 6.0 min | 6.0 min (6.5 min) |" in line
    for other in ({"compiled": True}, {"recipe.micro_batch": 8}, {"precision": "fp32"}):
        table = publish.results_table([first, again | other], [])
        assert table.count("results/accurate") == 2, other
    table = publish.results_table([row(compiled=True, processes=2), row(seed=1, torch="2.12")], [])
    assert "NVIDIA H100, fp16, compiled, 2 processes, torch 2.11 |" in table


def test_the_numbers_of_a_group_count_each_seed_once() -> None:
    runs = seeds("accurate", 50.0, 52.0, 57.0)
    runs[2] |= {"train_seconds": 390.0, "time_to_accuracy_seconds": 394.5}
    expected = {
        "n": 3,
        "mean_top1": 53.0,
        "sd_top1": pytest.approx(13**0.5),  # of the sample: (9 + 1 + 16) / 2
        "mean_train_seconds": 370.0,
        "mean_time_to_accuracy_seconds": 373.5,
    }
    assert publish.group_numbers(runs) == expected
    assert publish.group_numbers([*runs, runs[0] | {"run": "z", "test_top1": 99.0}]) == expected
    assert publish.group_numbers(runs[:1])["sd_top1"] is None


@pytest.mark.parametrize(
    "warm", [{"earlier_runs": 1}, {"stops": 1}, {"compiled": True, "compile_cache": "filled"}]
)
def test_a_cold_clock_needs_a_run_that_began_with_nothing(warm: dict) -> None:
    assert publish.to_accuracy([row()]) == "6.0 min (6.5 min)"
    assert publish.to_accuracy([row(**warm)]) == "6.0 min (not recorded)"
    assert publish.to_accuracy([row(), row(seed=1, **warm)]) == "6.0 min (6.5 min, n = 1)"


@pytest.mark.parametrize("name", publish.PROTOCOLS)
def test_what_is_not_measured_says_so_until_the_recipe_as_it_stands_is(name: str) -> None:
    assert publish.results_table([], []).count("not yet measured") == 5
    assert publish.results_table([row(name)], []).count("not yet measured") == 4
    for other in ({"classes": 10}, {"recipe.epochs": 3}, {"protocol": "select"}):
        assert publish.results_table([row(name, **other)], []).count("not yet measured") == 5


def test_targets() -> None:
    def here(rows: list[dict], name: str) -> str:
        return publish.measured_here(rows, name)

    assert here([], "accurate") == "not yet measured"
    assert here(seeds("accurate", 64.0, 65.0), "accurate").startswith("64.50 ± 0.71 (2 of 3 seeds)")
    assert here(seeds("accurate", 64.0, 65.0, 66.0), "accurate").startswith("65.00 ± 1.00 (n = 3)")
    few = here(seeds("speedrun", 58.0, 59.0), "speedrun")
    assert few.startswith("58.50 (2 of 5 seeds)")
    assert here(seeds("speedrun", *[57.0] * 5), "speedrun").startswith("not reached: 57.00 (n = 5)")
    reached = here(seeds("speedrun", *[58.0] * 5), "speedrun")
    assert "to accuracy, warm (cold): 6.0 min (6.5 min)" in reached
    gap = here(seeds("published", 57.5, largest_gap_to_published=1.25), "published")
    assert "from epoch 10 on at most 1.25 points from the published curve" in gap
    assert "median of the last 10 epochs 69.50" in here(seeds("official", 70.0), "official")
    slow, fast = seeds("accurate", 60.0), seeds("accurate", 61.0, compiled=True, train_seconds=9.0)
    assert here([*slow, *fast], "accurate").startswith("61.00")


def test_the_course_runs_curve_is_compared_from_epoch_ten_on() -> None:
    course = [{"test_accuracy_pct": "50.0"}] * 12
    ours = [{"test_top1": 0.0}] * 9 + [{"test_top1": 51.0}] * 2 + [{"test_top1": 48.5}]
    assert publish.largest_gap(ours, course) == 1.5
    assert publish.largest_gap(ours[:-1], course) is None
    assert publish.largest_gap([*ours[:-1], {}], course) is None  # an epoch without a test


def test_two_recipes_are_compared_seed_by_seed() -> None:
    rows = seeds("published", 57.0, 58.0, 50.0) + seeds("accurate", 64.0, 66.0)
    part = publish.paired_part(rows)
    assert "| 0 | [57.00 %](results/published-merged-s0) (18,810 / 33,000) |" in part
    assert part.count("\n| ") == 3  # the third seed has no partner
    assert "+7.50 points (n = 2, sample standard deviation 0.71, standard error 0.50)" in part
    assert "Optimiser steps: 9,030 and 4,500." in part
    assert "no spread from one seed" in publish.paired_part([rows[0], rows[3]])
    for other in ({"device": "CPU"}, {"classes": 10}, {"recipe.weight_decay": 0.0}):
        assert publish.paired_part([rows[0], rows[3] | other]) == "Not yet measured.", other


def speed(**fields: object) -> dict:
    usual = {
        "gpu": "NVIDIA H100", "torch": "2.11", "commit": "c", "date": "2026-01-01",
        "precision": "bf16", "layout": "NHWC", "compiled": "yes", "batch": 512, "resolution": 64,
        "images_per_second": 20000.0, "share_of_peak": 0.4, "peak_tflops": 800.0, "status": "ok",
    }  # fmt: skip
    return usual | fields


def test_the_table_of_throughput(tmp_path: Path) -> None:
    rows = [
        speed(),
        speed(compiled="no", images_per_second=15000.0),
        speed(resolution=48, images_per_second=30000.0),
        speed(status="out of memory", images_per_second=None, share_of_peak=None),
        speed(gpu="CPU (x)", images_per_second=10.0),
    ]
    path = tmp_path / "throughput.csv"
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    assert publish.read_throughput(path) == rows
    part = publish.throughput_part(rows)
    assert "| bf16 | NHWC | compiled | 512 | 64 | 20,000 | 40 % of 800 TFLOP/s |" in part
    assert part.index("20,000") < part.index("15,000") < part.index("30,000")
    assert "1 of 4 settings gave no number: out of memory (1)." in part
    assert publish.fastest_step(rows).startswith("20,000 images/s, NVIDIA H100, bf16, NHWC")
    assert publish.throughput_part(rows[-1:]).startswith("Not yet measured on a GPU")


def test_what_records_hold_is_shown_as_text() -> None:
    hostile = "<b>|[x](http://y)"
    table = publish.results_table([row(device=hostile, torch=hostile)], [])
    assert "<b>" not in table
    assert "http://" not in table


def test_a_run_is_published_and_its_line_made(finished_run: Run, tmp_path: Path) -> None:
    results, readme = tmp_path / "results", tmp_path / "README.md"
    results.mkdir()
    readme.write_text(PAGE)
    publish.publish_run(finished_run, results, readme)
    (own,) = publish.published_rows(results)
    assert own["test_top1"] == finished_run.summary["test_top1"]
    assert own["recipe.width"] == finished_run.recipe.width
    assert own["largest_gap_to_published"] is None  # three classes
    assert "data_folder" not in json.loads((results / own["run"] / "run.json").read_text())
    assert own["run"] in readme.read_text()
    with open(results / "results.csv", newline="") as file:
        (line,) = csv.DictReader(file)
    assert line["test_correct"] == str(finished_run.summary["test_correct"])

    other = tmp_path / "other" / finished_run.folder.name
    shutil.copytree(finished_run.folder, other)
    Run(other).write("summary.json", finished_run.summary | {"model_sha256": "0" * 64})
    with pytest.raises(UserError, match="holds another run"):
        publish.publish_run(Run(other), results, readme)
    readme.write_text("nothing")
    with pytest.raises(UserError, match="must hold <!-- results -->"):
        publish.rewrite_tables(results, readme)


def test_readme_and_results_csv_are_current(repository: Path) -> None:
    files = publish.generated(repository / "results", repository / "README.md")
    for path, content in files.items():
        assert path.read_bytes() == content, f"{path.name} is not current: run `make tables`"


@pytest.mark.parametrize("name", publish.PROTOCOLS)
def test_a_recipe_carries_its_result(name: str, repository: Path) -> None:
    text = " ".join(RECIPES[name].__doc__.split())
    groups = publish.measured(publish.published_rows(repository / "results"), name)
    numbers = [publish.group_numbers(runs) for runs in groups]
    if not numbers:
        assert "not yet measured" in text
    else:
        assert any(f"{n['mean_top1']:.2f} %" in text and f"n = {n['n']}" in text for n in numbers)
