"""What the benchmarks share: options, data, taking turns, the table and the line of JSON."""

import argparse
import gc
import json
import os
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from tinylab.data.dataset import FOLDER, Dataset, available_cores, open_dataset, prepare
from tinylab.data.synthetic import write_sample
from tinylab.run.environment import PRECISIONS, Compute, device_name

CLASSES = 200
STEPS = 100_000
"""Length of the schedules; nothing here takes so many steps."""
PACKAGES = ("torch", "torchvision", "grad-cam", "albumentations")
UNSTEADY = 1.5
"""If the fastest round is so many times as fast as the slowest, something else was at work."""

Work = Callable[[], object]
Spread = dict[str, float]


def make_parser(description: str, repeat: int) -> argparse.ArgumentParser:
    """Return a command line with the options that most benchmarks have."""
    parser = argparse.ArgumentParser(description=description.partition("\n")[0])
    parser.add_argument(
        "--data", type=Path, help=f"data set (default: {FOLDER}, or made-up images)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--repeat", type=int, default=repeat, help=f"rounds (default: {repeat})")
    parser.add_argument("--quick", action="store_true", help="seconds; the numbers mean little")
    return parser


def find_data(folder: Path | None, scratch: Path) -> tuple[Dataset, str]:
    """Return the data set to measure on and its name; made-up images where none is prepared."""
    if folder is None and not (FOLDER / "meta.json").exists():
        archive = write_sample(scratch / "sample.zip")
        return prepare(archive, scratch / "sample", progress=False), "made-up images"
    dataset = open_dataset(folder or FOLDER)
    name = "Tiny ImageNet" if dataset.is_tiny_imagenet else "images that are not Tiny ImageNet"
    return dataset, name


def evenly(rows: np.ndarray, count: int) -> np.ndarray:
    """Return at most `count` of the rows, spread evenly and so over all classes."""
    return rows[np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(np.int64)]


def conditions(compute: Compute, data: str, **more: object) -> dict[str, object]:
    """Return what a reader has to know to compare numbers."""
    return {
        "device": device_name(compute.device),
        "precision": compute.precision,
        "cores": available_cores(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
        **{name: version(name) for name in PACKAGES},
        "data": data,
        **more,
    }


def seconds(work: Work, compute: Compute) -> float:
    """Measure one call, from an idle device to an idle device."""
    compute.synchronise()
    started = time.perf_counter()
    work()
    compute.synchronise()
    return time.perf_counter() - started


def take_turns(contenders: dict[str, Callable[[], float]], repeat: int) -> dict[str, list[float]]:
    """Measure one after the other, `repeat` times, so that noise hits all of them alike."""
    values: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repeat):
        for name, measure in contenders.items():
            gc.collect()  # so that one's garbage is not collected in the next one's time
            values[name].append(measure())
    return values


def spread(values: list[float]) -> Spread:
    """Return median, smallest and largest of the rounds."""
    numbers = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: round(value, 4) for name, value in numbers.items()}


def is_steady(spreads: list[Spread]) -> bool:
    """Return whether the rounds agree well enough for a comparison; print a note if not."""
    worst = max(each["max"] / each["min"] for each in spreads)
    if worst > UNSTEADY:
        print(f"note: rounds differ by a factor of {worst:.1f}: repeat this on an idle machine")
    return worst <= UNSTEADY


def matmul_peak(compute: Compute, quick: bool = False) -> float:
    """Return the median FLOP/s of large square matrix products in the step's number format."""
    side = 8192 if compute.device.type == "cuda" else 512 if quick else 2048
    dtype = PRECISIONS[compute.precision]
    left, right = (torch.randn(side, side, device=compute.device).to(dtype) for _ in range(2))
    took = [seconds(lambda: torch.matmul(left, right), compute) for _ in range(5 if quick else 25)]
    return 2 * side**3 / statistics.median(took[3:])  # the first ones find a cold device


def print_conditions(found: dict[str, object]) -> None:
    rounds = f"; median of {found['repeat']}" if "repeat" in found else ""
    print("{device}, {cores} cores, torch {torch}, {precision}; {data}{0}".format(rounds, **found))
    if found["load_average"] > 0.5:
        print(f"note: others were at work here (load average {found['load_average']})")


def report(benchmark: str, rates: dict[str, list[float]], found: dict, **more: object) -> None:
    """Print images/s of each contender, how many times as fast the first one is, and the JSON."""
    rows = {name: spread(values) for name, values in rates.items()}
    first = next(iter(rows.values()))["median"]
    ratios = {name: round(first / row["median"], 2) for name, row in rows.items()}
    print_conditions(found)
    heads = ("images/s", "lowest", "highest", "ours is")
    print(" " * 26 + "".join(f"{head:>11}" for head in heads))
    for name, row in rows.items():
        cells = [f"{row[key]:,.1f}" for key in ("median", "min", "max")] + [f"{ratios[name]:.2f}x"]
        print(f"  {name:24}" + "".join(f"{cell:>11}" for cell in cells))
    result = {"benchmark": benchmark, **found, "images_per_second": rows, "ratios": ratios, **more}
    print(json.dumps(result | {"steady": is_steady(list(rows.values()))}))
