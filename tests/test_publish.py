"""What is published is computed from the records: groups, targets, throughput."""

import csv
import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from publish import (
    IMAGES,
    PAGES,
    PROTOCOLS,
    generate,
    measured,
    publish_run,
    read_rows,
    render,
    rewrite_tables,
    summarise,
)

from tinylab.data.dataset import Dataset
from tinylab.data.split import make_split
from tinylab.exceptions import UserError
from tinylab.explain.analysis import analyse_run
from tinylab.recipes import RECIPES, named
from tinylab.run.folder import Run


def row(recipe: str = "accurate", seed: int = 0, top1: float = 60.0, **fields: object) -> dict:
    """Return a made-up row of results.csv: the recipe as it stands, on all 200 classes."""
    protocol = fields.get("protocol", PROTOCOLS[recipe])
    train_images, test_images = IMAGES.get(protocol, (70_000, 7_000))
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


def part(name: str, rows: list[dict], home: Path = Path("nowhere")) -> str:
    return render(name, rows, home)


def here(rows: list[dict], recipe: str) -> str:
    """Return the last cell of the recipe's line in the table of targets."""
    (line,) = [x for x in part("targets", rows).splitlines() if x.startswith(f"| `{recipe}`")]
    return line.split(" | ")[-1].removesuffix(" |")


def test_only_runs_that_differ_in_seed_share_a_line() -> None:
    first, again = row(top1=50.0), row(seed=1, top1=52.0, processes=1)  # older ones do not say
    table = part("results", [first, again])
    assert "| 51.00 ± 1.41 | 80.00 ± 0.00 | 2 | 30.8 | 6.0 min | 6.0 min (6.5 min) |" in table
    for other in ({"compiled": True}, {"recipe.micro_batch": 8}, {"precision": "fp32"}):
        assert part("results", [first, again | other]).count("results/accurate") == 2, other
    table = part("results", [row(compiled=True, processes=2), row(torch="2.12", run="z")])
    assert "<br>NVIDIA H100, fp16, compiled, 2 processes, torch 2.11 |" in table
    assert "torch 2.11 and 2.12 |" in part("results", [row(), row(seed=1, torch="2.12")])
    table = part("results", [row(**{"recipe.weight_decay": 0.0})])
    assert " `--weight-decay 0.0`<br>NVIDIA" in table
    cpu = row("cpu", device="CPU (x)", train_cpu_seconds=600.0, muon_petaflop=0.2)
    assert "| 30.8 + 0.2 Muon | 6.0 min (10.0 min of CPU) |" in part("results", [cpu])


def test_the_numbers_of_a_group_count_each_seed_once() -> None:
    runs = seeds("accurate", 50.0, 52.0, 57.0)
    runs[2] |= {"train_seconds": 390.0, "time_to_accuracy_seconds": 394.5}
    again = runs[0] | {"run": "z", "test_top1": 99.0}
    for group in (summarise(runs), summarise([again, *runs])):
        assert (group["n"], group["mean_top1"]) == (3, 53.0)
        assert group["sd_top1"] == pytest.approx(13**0.5)  # of the sample: (9 + 1 + 16) / 2
        assert group["mean_train_seconds"] == 370.0
        assert group["mean_time_to_accuracy_seconds"] == 373.5
    assert "| 3 (4 runs) |" in part("results", [*runs, again])
    assert summarise(runs[:1])["sd_top1"] is None
    lacking = row(time_to_accuracy_seconds=None, cold_time_to_accuracy_seconds=None)
    assert "| not recorded (not recorded) |" in part("results", [lacking])


@pytest.mark.parametrize(
    "warm", [{"earlier_runs": 1}, {"stops": 1}, {"compiled": True, "compile_cache": "filled"}]
)
def test_a_cold_clock_needs_a_run_that_began_with_nothing(warm: dict) -> None:
    assert "6.0 min (not recorded) |" in part("results", [row(**warm)])
    cold = {"compiled": warm.get("compiled"), "compile_cache": "empty"}
    both = part("results", [row(**cold), row(seed=1, **warm)])
    assert "6.0 min (6.5 min, n = 1) |" in both


@pytest.mark.parametrize("name", PROTOCOLS)
def test_what_is_not_measured_says_so_until_the_recipe_as_it_stands_is(name: str) -> None:
    assert part("targets", []).count("not yet measured") == 6  # a full training step is the sixth
    assert part("targets", [row(name)]).count("not yet measured") == 5
    assert here([], name) == "not yet measured" != here([row(name)], name)
    for other in ({"classes": 10}, {"recipe.epochs": 3}, {"protocol": "select"}):
        assert here([row(name, **other)], name) == "not yet measured"


def test_targets() -> None:
    assert here(seeds("accurate", 64.0, 65.0), "accurate").startswith("64.50 ± 0.71 (2 of 3 seeds)")
    assert here(seeds("accurate", 64.0, 65.0, 66.0), "accurate").startswith("65.00 ± 1.00 (n = 3)")
    assert here(seeds("speedrun", 58.0, 59.0), "speedrun").startswith("58.50 (2 of 5 seeds), NVI")
    missed = here(seeds("speedrun", *[57.549] * 5), "speedrun")
    assert missed.startswith("not reached: 57.55 (n = 5)")
    reached = here(seeds("speedrun", *[57.55] * 5), "speedrun")
    assert "to accuracy, warm (cold): 6.0 min (6.5 min)" in reached
    gap = here(seeds("published", 57.5, largest_gap_to_published=1.25), "published")
    assert "from epoch 10 on at most 1.25 points from the published curve" in gap
    assert "median of the last 10 epochs 69.50" in here(seeds("official", 70.0), "official")
    slow, fast = seeds("accurate", 60.0), seeds("accurate", 61.0, compiled=True, train_seconds=9.0)
    assert here([*slow, *fast], "accurate").startswith("61.00")
    many = seeds("accurate", 59.0, 59.0, device="another", train_seconds=9e3)
    assert here([*slow, *fast, *many], "accurate").startswith("59.00")


def test_the_table_of_throughput(tmp_path: Path) -> None:
    usual = {
        "gpu": "NVIDIA H100", "torch": "2.11", "commit": "c", "date": "2026-01-01",
        "precision": "bf16", "layout": "NHWC", "compiled": "yes", "batch": 512, "resolution": 64,
        "images_per_second": 20000.0, "share_of_peak": 0.4, "peak_tflops": 800.0, "status": "ok",
    }  # fmt: skip
    rows = [
        usual,
        usual | {"compiled": "no", "images_per_second": 15000.4, "share_of_peak": None},
        usual | {"resolution": 48, "images_per_second": 30000.0},
        usual | {"status": "out of memory", "images_per_second": None, "share_of_peak": None},
        usual | {"gpu": "older", "date": "2025-12-31", "images_per_second": 25000.0},
        usual | {"gpu": "CPU (x)", "date": "2026-02-02"},
    ]
    (tmp_path / "results").mkdir()
    assert part("throughput", [], tmp_path).startswith("Not yet measured on a GPU")
    with open(tmp_path / "results" / "throughput.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, usual)
        writer.writeheader()
        writer.writerows(rows)
    text = part("throughput", [], tmp_path)
    assert [line for line in text.splitlines() if line.startswith("| bf16")] == [
        "| bf16 | NHWC | compiled | 512 | 64 | 20,000 | 40 % of 800 TFLOP/s |",
        "| bf16 | NHWC | eager | 512 | 64 | 15,000 |  |",
        "| bf16 | NHWC | compiled | 512 | 48 | 30,000 | 40 % of 800 TFLOP/s |",
    ]
    assert text.endswith("1 of 4 settings gave no number: out of memory (1).")
    assert "25,000 images/s, older, bf16, NHWC, compiled, batch 512 |" in part(
        "targets", [], tmp_path
    )


def test_what_records_hold_is_shown_as_text() -> None:
    hostile = "<b>|[x](http://y)"
    own = {"device": hostile, "precision": hostile, "run": hostile}
    rows = seeds("published", 57.0, torch=hostile, **own) + seeds("accurate", 64.0, **own)
    for name in ("results", "targets", "front"):
        text = part(name, rows)
        assert "<b>" not in text
        assert "](http://y" not in text
        assert "&#60;b&#62;" in text
        lines = [line for line in text.splitlines() if line.startswith("|")]
        assert len({line.count("|") for line in lines}) == 1


def test_a_run_is_published_and_its_line_made(
    finished_run: Run, tiny_dataset: Dataset, tmp_path: Path
) -> None:
    results, page = tmp_path / "results", tmp_path / "docs" / "results.md"
    results.mkdir()
    page.parent.mkdir()
    for name, parts in PAGES.items():
        empty = (f"<!-- {part} -->\n<!-- /{part} -->\n" for part in parts)
        (tmp_path / name).write_text("".join(empty))
    run = Run(tmp_path / "runs" / "run")
    shutil.copytree(finished_run.folder, run.folder)
    split = make_split(tiny_dataset, "merged")
    list(analyse_run(run, tiny_dataset, split, None, count=0, sample=0).save(run))
    publish_run(run, tmp_path)
    for name in ("classes.csv", "confusion.csv"):
        assert (results / "run" / name).read_bytes() == (run.folder / name).read_bytes()
    macro = json.loads((results / "run" / "explain.json").read_text())["macro"]
    assert macro["recall"] == pytest.approx(run.summary["test_top1"])  # classes of one size
    (own,) = read_rows(results)
    assert own["test_top1"] == finished_run.summary["test_top1"]
    assert own["recipe.width"] == finished_run.recipe.width
    assert own["largest_gap_to_published"] is None  # three classes
    assert "data_folder" not in json.loads((results / own["run"] / "run.json").read_text())
    assert f"](../results/{own['run']})" in page.read_text()
    with open(results / "results.csv", newline="") as file:
        (line,) = csv.DictReader(file)
    assert line["test_correct"] == str(finished_run.summary["test_correct"])

    before = {path: path.read_bytes() for path in results.rglob("*.*")}
    other = tmp_path / "other" / finished_run.folder.name
    shutil.copytree(finished_run.folder, other)
    Run(other).write("summary.json", finished_run.summary | {"model_sha256": "0" * 64})
    with pytest.raises(UserError, match="another run of that name"):
        publish_run(Run(other), tmp_path)
    page.write_text("nothing")
    with pytest.raises(UserError, match="must hold <!-- results -->"):
        rewrite_tables(tmp_path)
    assert {path: path.read_bytes() for path in results.rglob("*.*")} == before


def test_the_published_runs_curve_is_compared_from_epoch_ten_on(
    finished_run: Run, tmp_path: Path, repository: Path
) -> None:
    shutil.copytree(repository / "results" / "reference", tmp_path / "reference")
    shutil.copytree(finished_run.folder, tmp_path / "run")
    run = Run(tmp_path / "run")
    run.write_history([finished_run.history[-1] | {"test_top1": 60.0}] * 30)
    run.write("run.json", run.identity | {"classes": 200})
    with open(tmp_path / "reference" / "published_run.csv", newline="") as file:
        theirs = [float(line["test_accuracy_pct"]) for line in csv.DictReader(file)]
    (own,) = read_rows(tmp_path)
    assert own["largest_gap_to_published"] == max(abs(60.0 - top1) for top1 in theirs[9:])
    assert own["median_last10_top1"] == 60.0


def test_results_csv_and_the_generated_parts_are_current(repository: Path) -> None:
    for path, content in generate(repository).items():
        assert path.read_bytes() == content, f"{path.name} is not current: run `make tables`"


@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_recipe_carries_its_result(name: str, repository: Path) -> None:
    text = " ".join(RECIPES[name].__doc__.split())
    groups = measured(read_rows(repository / "results"), name)
    said = [f"{g['mean_top1']:.2f} %" in text and f"n = {g['n']}" in text for g in groups]
    assert any(said) if groups else "not yet measured" in text
