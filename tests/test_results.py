"""What is published is computed from the records: groups, rules, pairs, throughput; README and results.csv say it."""

import csv
import dataclasses
import io
import re
import shutil
import statistics
from pathlib import Path

import pytest

from tinylab.exceptions import UserError
from tinylab.recipes import RECIPES, named
from tinylab.results import (
    GROUP_NUMBERS,
    IMAGES,
    PROTOCOLS,
    THROUGHPUT,
    generated,
    group_numbers,
    measured,
    paired_part,
    publish_run,
    published_rows,
    reached,
    read_throughput,
    results_table,
    rewrite_tables,
    targets_table,
    throughput_part,
    with_group_numbers,
)
from tinylab.run.folder import Run

PARTS = ("results", "targets", "paired", "throughput", "figures", "maps")
PAGE = "".join(f"<!-- {part} -->\n<!-- /{part} -->\n" for part in PARTS)


def row(recipe: str = "accurate", seed: int = 0, top1: float = 60.0, **fields: object) -> dict:
    """A made-up row of results.csv: a run of the named recipe as it stands, on all 200 classes of its split."""
    protocol = fields.get("protocol", PROTOCOLS[recipe])
    train_images, test_images = IMAGES.get(protocol, (70_000, 7_000))
    chosen = named(recipe)
    found = {
        "run": f"{recipe}-{protocol}-s{seed}", "recipe": recipe, "protocol": protocol, "classes": 200, "seed": seed,
        "epochs": chosen.epochs, "train_images": train_images, "test_images": test_images, "test_top1": top1,
        "test_top5": 80.0, "test_correct": round(top1 * test_images / 100), "train_seconds": 360.0,
        "train_petaflop": 30.8,
        "time_to_accuracy_seconds": 363.0, "cold_time_to_accuracy_seconds": 393.0, "median_last10_top1": top1 - 0.5,
        "content_sha256": "c", "split_sha256": "s", "device": "NVIDIA H100", "precision": "fp16", "torch": "2.11",
    }  # fmt: skip
    return (
        found
        | {f"recipe.{name}": value for name, value in dataclasses.asdict(chosen).items()}
        | fields
    )


def seeds(recipe: str, *top1: float, **fields: object) -> list[dict]:
    return [row(recipe, seed, value, **fields) for seed, value in enumerate(top1)]


def lines_of(table: str) -> dict[str, str]:
    """Last cell of each line of the table of targets, by the recipe's name or what else it begins with."""
    cells = [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]
    return {re.sub(r"^`(\w+)`.*", r"\1", first): last for first, *_, last in cells}


def here(rows: list[dict], name: str) -> str:
    return lines_of(targets_table(rows, []))[name]


# --- Groups -----------------------------------------------------------------------------------------------------------


def test_only_runs_that_differ_in_seed_share_a_line() -> None:
    first, again = (
        row(top1=50.0),
        row(seed=1, top1=52.0, processes=1),
    )  # older records do not say how many
    table = results_table([first, again], [])
    (line,) = [line for line in table.splitlines() if "results/accurate" in line]
    assert "| 51.00 ± 1.41 | 80.00 ± 0.00 | 2 | 30.8 | 6.0 min | 6.0 min (6.5 min) |" in line
    assert line.endswith("| NVIDIA H100, fp16, torch 2.11 |")
    for other in (
        {"compiled": True},
        {"recipe.micro_batch": 8},
        {"processes": 2},
        {"precision": "fp32"},
        {"recipe.weight_decay": 0.0},
    ):
        assert results_table([first, again | other], []).count("results/accurate") == 2, other


def test_what_is_unusual_is_said_beside_the_device() -> None:
    table = results_table([row(compiled=True, processes=2), row(seed=1, torch="2.12")], [])
    assert "NVIDIA H100, fp16, compiled, 2 processes, torch 2.11 |" in table
    assert "torch 2.11 and 2.12 |" in results_table([row(), row(seed=1, torch="2.12")], [])


def test_the_numbers_of_a_group() -> None:
    runs = seeds("accurate", 50.0, 52.0, 57.0)
    runs[2] |= {"train_seconds": 390.0, "time_to_accuracy_seconds": 394.5}
    assert group_numbers(runs) == {
        "n": 3,
        "mean_top1": 53.0,
        "sd_top1": pytest.approx(13**0.5),  # of the sample: (9 + 1 + 16) / 2
        "mean_train_seconds": 370.0,
        "mean_time_to_accuracy_seconds": 373.5,
    }
    alone = group_numbers([row() | {"time_to_accuracy_seconds": None}])
    assert (alone["n"], alone["sd_top1"], alone["mean_time_to_accuracy_seconds"]) == (1, None, None)


def test_each_row_gets_the_numbers_of_its_own_group() -> None:
    rows = with_group_numbers([*seeds("accurate", 50.0, 52.0), row("published")])
    assert [each["n"] for each in rows] == [2, 2, 1]
    assert [each["mean_top1"] for each in rows] == [51.0, 51.0, 60.0]


def test_a_seed_that_was_run_again_counts_once() -> None:
    again = row(top1=90.0, run="accurate-merged-s0-again")
    runs = [again, *seeds("accurate", 50.0, 52.0)]
    assert group_numbers(runs)["n"] == 2
    assert group_numbers(runs)["mean_top1"] == 51.0
    assert (
        "| 51.00 ± 1.41 | 80.00 ± 0.00 | 2 (3 runs) | 30.8 | 6.0 min | 6.0 min (6.5 min) |"
        in results_table(runs, [])
    )


@pytest.mark.parametrize(
    ("fields", "shown"),
    [
        ({}, "6.5 min"),  # older records say nothing: they are of a process of their own, eager
        ({"earlier_runs": 0}, "6.5 min"),
        ({"earlier_runs": 1}, "8.0 min, n = 1"),
        ({"stops": 1}, "8.0 min, n = 1"),
        ({"compiled": True, "compile_cache": "filled"}, "8.0 min, n = 1"),
    ],
)
def test_a_cold_clock_counts_only_where_the_run_began_with_nothing(
    fields: dict, shown: str
) -> None:
    warm, cold = seeds("accurate", 50.0, 52.0, **fields)
    if fields and fields != {"earlier_runs": 0}:
        cold |= {
            "earlier_runs": 0,
            "stops": 0,
            "compile_cache": "empty",
            "cold_time_to_accuracy_seconds": 480.0,
        }
    assert f"6.0 min ({shown}) |" in results_table([warm, cold], [])
    if shown.endswith("n = 1"):
        assert "6.0 min (not recorded) |" in results_table([warm], [])


def test_what_was_not_recorded_is_not_made_up() -> None:
    line = results_table(
        [row(time_to_accuracy_seconds=None, cold_time_to_accuracy_seconds=None)], []
    )
    assert "| not recorded (not recorded) |" in line


@pytest.mark.parametrize("name", PROTOCOLS)
def test_what_is_not_measured_says_so_until_the_recipe_as_it_stands_is(name: str) -> None:
    def pending(rows: list[dict]) -> int:
        return results_table(rows, []).count(f"| `{name}` |")

    assert pending([]) == 1
    assert pending([row(name)]) == 0
    for other in (
        {"classes": 10},
        {"protocol": "select"},
        {"recipe.weight_decay": 0.1},
        {"train_images": 12},
        {"recipe.epochs": 1, "epochs": 1},
    ):
        assert pending([row(name) | other]) == 1, other


def test_the_published_run_comes_first_and_few_classes_last() -> None:
    ten = row("published", classes=10, train_images=3850, test_images=1650, run="a-ten")
    last = [{"epoch": "30", "test_accuracy_pct": "57.55"}]
    lines = results_table([ten, row("accurate")], last).splitlines()[2:]
    firsts = [line.split(" | ")[0] for line in lines]
    assert firsts == [
        "| the published run (reference)",
        "| [`accurate`](results/accurate-merged-s0)",
        "| `published`",
        "| `speedrun`",
        "| `cpu`",
        "| `official`",
        "| [`published`](results/a-ten)",
    ]
    assert {line.count("|") for line in lines} == {12}


# --- Targets ----------------------------------------------------------------------------------------------------------


def test_without_records_nothing_is_measured() -> None:
    assert set(lines_of(targets_table([], [])).values()) == {"not yet measured"}
    assert lines_of(targets_table([], [])).keys() == {*PROTOCOLS, "a full training step"}


def test_the_published_recipe_beside_its_target() -> None:
    cell = here(seeds("published", 57.0, 58.0, compiled=True), "published")
    link = "[`published-merged-s0`](results/published-merged-s0)"
    assert (
        cell
        == f"57.50 ± 0.71 (n = 2), 6.0 min of training, NVIDIA H100, fp16, compiled, torch 2.11, {link}"
    )


def test_fewer_seeds_than_accurate_asks_for_are_said() -> None:
    assert here(seeds("accurate", 64.0), "accurate").startswith("64.00 (1 of 3 seeds), ")
    assert here(seeds("accurate", 64.0, 65.0), "accurate").startswith(
        "64.50 ± 0.71 (2 of 3 seeds), "
    )
    assert here(seeds("accurate", 64.0, 65.0, 66.0), "accurate").startswith(
        "65.00 ± 1.00 (n = 3), "
    )


def test_the_rule_of_the_speedrun() -> None:
    """A mean of 57.55 or more over five seeds or more, whatever rounding says."""
    assert reached(seeds("speedrun", *[57.55] * 5))
    assert not reached(seeds("speedrun", *[57.549] * 5))
    assert not reached(seeds("speedrun", *[60.0] * 4))
    assert not reached([*seeds("speedrun", *[60.0] * 4), row("speedrun", 0, run="speedrun-again")])
    assert reached(seeds("speedrun", 56.0, 57.0, 58.0, 59.0, 60.0))
    clock = {
        "train_seconds": 48.0,
        "time_to_accuracy_seconds": 49.5,
        "cold_time_to_accuracy_seconds": 80.25,
    }
    cell = here(seeds("speedrun", *[58.0] * 5, **clock), "speedrun")
    assert cell.startswith(
        "58.00 ± 0.00 (n = 5), 48.0 s of training, to accuracy, warm (cold): 49.5 s (80.2 s), NVIDIA H100"
    )
    assert here(seeds("speedrun", *[58.0] * 4, **clock), "speedrun").startswith(
        "58.00 (4 of 5 seeds), NVIDIA"
    )
    assert here(seeds("speedrun", *[57.5] * 6, **clock), "speedrun").startswith(
        "not reached: 57.50 (n = 6), NVIDIA"
    )


def test_the_official_recipe_has_the_median_of_the_last_ten_beside() -> None:
    cell = here(seeds("official", 69.0, 70.0), "official")
    assert cell.startswith(
        "69.50 ± 0.71 (n = 2), median of the last 10 epochs 69.00, 6.0 min of training, "
    )
    assert "fewer than 10 epochs recorded" in here(
        [row("official", median_last10_top1=None)], "official"
    )


def test_of_several_groups_the_one_with_most_seeds_counts_then_the_fastest() -> None:
    slow, fast = (
        seeds("accurate", 64.0, 64.0),
        seeds("accurate", 63.0, 63.0, compiled=True, train_seconds=100.0),
    )
    many = seeds("accurate", 62.0, 62.0, 62.0, device="another", train_seconds=9000.0)
    assert here([*slow, *fast], "accurate").startswith("63.00")
    assert here([*slow, *fast, *many], "accurate").startswith(
        "62.00 ± 0.00 (n = 3), 150.0 min of training, another"
    )


@pytest.mark.parametrize(
    "other",
    [
        {"classes": 199},
        {"protocol": "select"},
        {"recipe.epochs": 31},
        {"recipe.mean": (0.5, 0.5, 0.5)},
    ],
)
def test_another_task_or_recipe_is_not_beside_the_targets(other: dict) -> None:
    assert here([row("published") | other], "published") == "not yet measured"


def test_the_published_run_s_curve_is_compared_from_epoch_ten_on() -> None:
    from tinylab.results import _largest_gap

    published = [{"test_accuracy_pct": str(float(epoch))} for epoch in range(1, 31)]
    ours = [
        {"test_top1": epoch + (40.0 if epoch < 10 else -1.25 if epoch == 10 else 0.5)}
        for epoch in range(1, 31)
    ]
    assert _largest_gap(ours, published) == 1.25
    assert _largest_gap(ours[:29], published) is None
    text = here([row("published", largest_gap_to_published=1.25)], "published")
    assert "from epoch 10 on at most 1.25 points from the published curve" in text
    assert "curve" not in here([row("accurate", largest_gap_to_published=1.25)], "accurate")


# --- Pairs ------------------------------------------------------------------------------------------------------------


def both(published: list[float], accurate: list[float], **fields: object) -> list[dict]:
    return seeds("published", *published, **fields) + seeds("accurate", *accurate, **fields)


def test_two_recipes_are_compared_seed_by_seed() -> None:
    text = paired_part(both([57.0, 58.0, 50.0], [64.0, 63.0]))
    assert (
        text.splitlines()[0]
        == "merged, 200 classes, 30 epochs, 77,000 / 33,000 images, NVIDIA H100, fp16:"
    )
    assert [line for line in text.splitlines() if re.match(r"\| \d", line)] == [
        "| 0 | [57.00 %](results/published-merged-s0) (18,810 / 33,000) "
        "| [64.00 %](results/accurate-merged-s0) (21,120 / 33,000) | +7.00 |",
        "| 1 | [58.00 %](results/published-merged-s1) (19,140 / 33,000) "
        "| [63.00 %](results/accurate-merged-s1) (20,790 / 33,000) | +5.00 |",
    ]
    assert text.splitlines()[-1] == (
        "Mean difference, `accurate` less `published`: +6.00 points (n = 2, sample standard deviation 1.41, "
        "standard error 1.00). Optimiser steps: 9,030 and 4,500. Training, mean: 6.0 and 6.0 minutes."
    )


def test_one_seed_has_no_spread() -> None:
    assert "-2.00 points (n = 1, no spread from one seed)." in paired_part(both([57.0], [55.0]))


def test_what_differs_is_not_paired() -> None:
    nothing = "Not yet measured."
    assert paired_part([]) == paired_part(seeds("published", 57.0, 58.0)) == nothing
    assert paired_part([row("published", 0), row("accurate", 1)]) == nothing
    for field, value in (
        ("split_sha256", "another"),
        ("content_sha256", "another"),
        ("device", "another"),
        ("classes", 10),
        ("epochs", 10),
        ("protocol", "select"),
        ("recipe.weight_decay", 0.1),
        ("recipe.width", 32),
    ):
        assert paired_part([row("published"), row("accurate") | {field: value}]) == nothing, field


def test_a_pair_in_two_number_formats_says_so() -> None:
    text = paired_part([row("published"), row("accurate", precision="bf16", compiled=True)])
    assert text.splitlines()[0].endswith("NVIDIA H100, fp16 and bf16, compiled:")


def test_only_the_number_of_epochs_may_differ_from_the_recipes() -> None:
    few = {
        "epochs": 10,
        "recipe.epochs": 10,
        "classes": 10,
        "train_images": 3850,
        "test_images": 1650,
    }
    text = paired_part([*both([57.0], [64.0]), *both([48.0], [58.0], **few)])
    assert [line for line in text.splitlines() if line.endswith(":")] == [
        "merged, 200 classes, 30 epochs, 77,000 / 33,000 images, NVIDIA H100, fp16:",
        "merged, first 10 classes, 10 epochs, 3,850 / 1,650 images, NVIDIA H100, fp16:",
    ]
    assert (
        "Optimiser steps: 160 and 70." in text
    )  # the last batch of 10 and of no image in each epoch


def test_of_several_groups_those_are_paired_that_share_most_seeds() -> None:
    compiled = seeds("accurate", 63.0, 63.0, compiled=True)
    text = paired_part([*both([57.0, 57.0], [64.0]), *compiled])
    assert "(n = 2," in text
    assert "64.00" not in text


# --- Throughput -------------------------------------------------------------------------------------------------------


def speed(rate: float | str = 1000.0, **fields: object) -> dict:
    found = dict(
        zip(
            THROUGHPUT,
            ("NVIDIA H100", "2.11", "abc", "2026-12-01", "bf16", "NHWC", "yes", 512, 64),
            strict=False,
        )
    )
    return (
        found
        | {"images_per_second": rate, "share_of_peak": 0.25, "peak_tflops": 640.0, "status": "ok"}
        | fields
    )


FAILED = {
    "images_per_second": "",
    "share_of_peak": "",
    "peak_tflops": "",
    "status": "out of memory",
}


def written(path: Path, rows: list[dict], columns: tuple[str, ...] = THROUGHPUT) -> Path:
    text = io.StringIO()
    csv.writer(text).writerows([columns, *([each[name] for name in columns] for each in rows)])
    path.write_text(text.getvalue())
    return path


def test_the_table_of_throughput(tmp_path: Path) -> None:
    rows = [
        speed(9000.0, date="2026-11-01", gpu="older"),
        speed(500.0, compiled="no", share_of_peak="", peak_tflops=""),
        speed(12345.6, compiled="reduce-overhead"),
        speed(30000.0, resolution=40),
        speed(20000.0, resolution=40, batch=256),
        speed(**FAILED, batch=8192),
        speed(**FAILED, batch=4096),
        speed(**FAILED | {"status": "no such format"}),
        speed(99.0, gpu="CPU (a processor)", date="2027-01-01"),
    ]
    text = throughput_part(read_throughput(written(tmp_path / "throughput.csv", rows)))
    assert text.splitlines()[0] == "NVIDIA H100, torch 2.11, commit abc, 2026-12-01:"
    assert [line for line in text.splitlines() if line.startswith("| bf16")] == [
        "| bf16 | NHWC | compiled, reduce-overhead | 512 | 64 | 12,346 | 25 % of 640 TFLOP/s |",
        "| bf16 | NHWC | eager | 512 | 64 | 500 |  |",
        "| bf16 | NHWC | compiled | 512 | 40 | 30,000 | 25 % of 640 TFLOP/s |",
    ]
    assert (
        text.splitlines()[-1]
        == "3 of 7 settings gave no number: out of memory (2), no such format (1)."
    )


def test_only_the_fastest_rows_are_shown(tmp_path: Path) -> None:
    rows = [speed(float(rate)) for rate in range(100, 130)]
    text = throughput_part(read_throughput(written(tmp_path / "throughput.csv", rows)))
    shown = [int(line.split(" | ")[5]) for line in text.splitlines() if line.startswith("| bf16")]
    assert shown == list(range(129, 117, -1))


def test_nothing_measured_on_a_gpu_says_so(tmp_path: Path) -> None:
    missing = "Not yet measured on a GPU: `python benchmarks/gpu_suite.py` measures it."
    assert read_throughput(tmp_path / "throughput.csv") == []
    for rows in ([], [speed(gpu="CPU (a processor)")], [speed(**FAILED)]):
        found = read_throughput(written(tmp_path / "throughput.csv", rows))
        assert throughput_part(found) == missing
        assert lines_of(targets_table([], found))["a full training step"] == "not yet measured"


def test_the_fastest_step_on_a_gpu_stands_beside_its_target(tmp_path: Path) -> None:
    rows = [
        speed(),
        speed(1500.0),
        speed(9e4, gpu="CPU (a processor)"),
        speed(9e4, resolution=40),
        speed(**FAILED),
    ]
    found = read_throughput(written(tmp_path / "throughput.csv", rows))
    cell = lines_of(targets_table([], found))["a full training step"]
    assert cell == "1,500 images/s, NVIDIA H100, bf16, NHWC, compiled, batch 512"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "gpu,torch\n",
        f"{','.join(reversed(THROUGHPUT))}\n",
        f"{','.join(THROUGHPUT)}\nH100,2.11\n",
        f"{','.join(THROUGHPUT)}\nH100,2.11,a,d,bf16,NHWC,yes,512,64,fast,,,ok\n",
        f"{','.join(THROUGHPUT)}\nH100,2.11,a,d,bf16,NHWC,yes,512,64,nan,,,ok\n",
        f"{','.join(THROUGHPUT)}\nH100,2.11,a,d,bf16,NHWC,yes,512,64,-1,,,ok\n",
        f"{','.join(THROUGHPUT)}\nH100,2.11,a,d,bf16,NHWC,yes,512,64,,,,ok\n",
        f"{','.join(THROUGHPUT)}\nH100,2.11,a,d,bf16,NHWC,yes,512.5,64,1,,,ok\n",
        f"{','.join(THROUGHPUT)}\nH100,2.11,a,d,bf16,NHWC,yes,512,64,,,,\n",
        f'{",".join(THROUGHPUT)}\n"H100,2.11',
        "\x00",
    ],
)
def test_a_malformed_table_of_throughput_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "throughput.csv").write_text(text)
    with pytest.raises(
        UserError, match=r"throughput\.csv is not what benchmarks/gpu_suite\.py writes: "
    ):
        read_throughput(tmp_path / "throughput.csv")
    (tmp_path / "throughput.csv").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"throughput\.csv cannot be read"):
        read_throughput(tmp_path / "throughput.csv")


def test_what_files_say_is_shown_as_text(tmp_path: Path) -> None:
    bad = "<b> | [x](http://x) `"
    fields = ("gpu", "torch", "commit", "date", "precision", "layout", "compiled")
    speeds = read_throughput(
        written(
            tmp_path / "throughput.csv",
            [speed(**dict.fromkeys(fields, bad)), speed(**FAILED | {"status": bad})],
        )
    )
    rows = both([57.0], [64.0], device=bad, precision=bad, torch=bad, run=bad)
    for text in (
        throughput_part(speeds),
        paired_part(rows),
        targets_table(rows, speeds),
        results_table(rows, []),
    ):
        assert "<b>" not in text
        assert "](http://x" not in text
        tables = [line for line in text.splitlines() if line.startswith("|")]
        assert len({line.count("|") for line in tables}) == 1


# --- Files ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A README with all its places, and results/."""
    (tmp_path / "results").mkdir()
    (tmp_path / "README.md").write_text(PAGE)
    return tmp_path


def test_a_published_run_has_its_line(home: Path, finished_run: Run) -> None:
    """results.csv keeps what it had; the group's numbers stand behind the run's own."""
    history = [finished_run.history[-1] | {"test_top1": float(top1)} for top1 in range(50, 62)]
    shutil.copytree(finished_run.folder, home / "run", ignore=shutil.ignore_patterns("*.ckpt"))
    run = Run(home / "run")
    run.write_history(history)
    publish_run(run, home / "results", home / "README.md")
    with open(home / "results" / "results.csv", newline="") as file:
        (line,) = csv.DictReader(file)
    columns, summary = list(line), run.summary
    assert columns[: 1 + len(summary)] == ["run", *summary]
    assert tuple(columns[1 + len(summary) :][: len(GROUP_NUMBERS)]) == GROUP_NUMBERS
    assert {
        "recipe.name",
        "recipe.bn_momentum",
        "split_sha256",
        "torch",
        "device",
        "commit",
    } <= set(columns)
    assert (line["n"], line["mean_top1"], line["sd_top1"]) == ("1", str(summary["test_top1"]), "")
    assert float(line["mean_time_to_accuracy_seconds"]) == pytest.approx(
        summary["time_to_accuracy_seconds"]
    )
    assert float(line["median_last10_top1"]) == statistics.median(range(52, 62))
    assert line["device"] == run.environment["device"]


def test_the_environment_does_not_speak_for_the_result(home: Path, finished_run: Run) -> None:
    shutil.copytree(
        finished_run.folder, home / "results" / "run", ignore=shutil.ignore_patterns("*.ckpt")
    )
    run = Run(home / "results" / "run")
    run.write(
        "environment.json", run.environment | {"test_top1": "100", "run": "x", "recipe.width": 1}
    )
    rewrite_tables(home / "results", home / "README.md")
    with open(home / "results" / "results.csv", newline="") as file:
        (line,) = csv.DictReader(file)
    assert line["test_top1"] == str(run.summary["test_top1"])
    assert (line["run"], line["recipe.width"], line["median_last10_top1"]) == (
        "run",
        "16",
        "",
    )  # it has two epochs


@pytest.mark.parametrize("part", PARTS)
def test_a_readme_without_a_place_is_refused_and_nothing_is_written(
    home: Path, finished_run: Run, part: str
) -> None:
    (home / "README.md").write_text(PAGE.replace(f"<!-- {part} -->", ""))
    before = {path: path.read_bytes() for path in home.rglob("*") if path.is_file()}
    with pytest.raises(
        UserError, match=rf"README\.md must hold <!-- {part} --> and <!-- /{part} --> once each"
    ):
        publish_run(finished_run, home / "results", home / "README.md")
    with pytest.raises(UserError, match="once each"):
        rewrite_tables(home / "results", home / "README.md")
    assert {path: path.read_bytes() for path in home.rglob("*") if path.is_file()} == before


def test_a_malformed_table_of_throughput_stops_everything(home: Path, finished_run: Run) -> None:
    (home / "results" / "throughput.csv").write_text("x\n")
    with pytest.raises(UserError, match=r"throughput\.csv"):
        publish_run(finished_run, home / "results", home / "README.md")
    assert (home / "README.md").read_text() == PAGE
    assert [path.name for path in (home / "results").iterdir()] == ["throughput.csv"]


def test_readme_and_results_csv_are_what_tinylab_table_makes(repository: Path) -> None:
    for path, content in generated(repository / "results", repository / "README.md").items():
        assert path.read_bytes() == content, f"{path.name} is not up to date: run `tinylab table`"


# --- What the recipes say of themselves -------------------------------------------------------------------------------


def lacks_its_result(docstring: str, rows: list[dict], name: str) -> bool:
    """Whether a recipe's docstring does not say what the records say: mean and n of one of its groups, or that there
    are none."""
    said = " ".join(docstring.split())
    numbers = [group_numbers(runs) for runs in measured(rows, name)]
    if not numbers:
        return "not yet measured" not in said
    return not any(
        f"{each['mean_top1']:.2f} %" in said and f"n = {each['n']}" in said for each in numbers
    )


@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_recipe_carries_its_result(name: str, repository: Path) -> None:
    assert not lacks_its_result(RECIPES[name].__doc__, published_rows(repository / "results"), name)


def test_a_docstring_that_lacks_its_result_is_found() -> None:
    rows = seeds("accurate", 64.0, 65.0)
    good = "Result: 64.50 % (sample sd 0.71, n =\n    2), 6.0 min."
    assert not lacks_its_result(good, rows, "accurate")
    assert lacks_its_result(good, [], "accurate")
    assert not lacks_its_result("Result: not yet\n    measured.", [], "accurate")
    assert lacks_its_result("Result: not yet measured.", rows, "accurate")
    for wrong in (good.replace("64.50", "64.51"), good.replace("2)", "3)"), "", "64.5 %, n = 2"):
        assert lacks_its_result(wrong, rows, "accurate"), wrong
    assert lacks_its_result(good, [each | {"classes": 10} for each in rows], "accurate")
    assert not lacks_its_result(good, [*rows, *seeds("accurate", 1.0, compiled=True)], "accurate")


def test_only_runs_of_all_classes_are_compared_with_the_published_curve(
    home: Path, finished_run: Run, repository: Path
) -> None:
    shutil.copytree(
        repository / "results" / "reference", home / "results" / "reference", dirs_exist_ok=True
    )
    shutil.copytree(
        finished_run.folder, home / "results" / "run", ignore=shutil.ignore_patterns("*.ckpt")
    )
    run = Run(home / "results" / "run")
    run.write_history([finished_run.history[-1] | {"test_top1": 60.0}] * 30)
    for classes, shown in ((3, None), (200, pytest.approx(60.0 - 36.06, abs=2.0))):
        run.write("run.json", run.identity | {"classes": classes})
        (row_,) = published_rows(home / "results")
        assert row_["largest_gap_to_published"] == shown
