"""Does the cost grow in proportion to the number of images, whatever the number of classes, with flat memory?

Each size is a data set folder of its own, measured in a process of its own:

    open        opening the folder, until the first and the last image are read
    split       `make_split`, protocol `merged`
    load        one epoch of the batched loader, with the augmentation of `accurate` and normalisation
    train       one epoch of training by the same recipe, loader and step; on a CPU of a narrow network at 16 x 16
                pixels, on a GPU of the real one
    evaluate    logits and scores of all test images

The sizes are 1,600 to 110,000 images of all classes (1,200 to 77,000 of them for training), then 2 to 200 classes
with about 1,100 images in all. For each cost the slope of a straight line through (log images, log seconds) is the
exponent: 1 is proportional, 0 is constant; and a straight line through (images, seconds) gives seconds per image and
what is left for no images. Small sizes are mostly overhead, which pulls the exponent below 1. Seconds are the best of
up to ten goes, as many as fit into four seconds.

Memory: the largest resident size, and the largest part of it that is not pages of files (sampled every 10 ms, on
Linux). The images are a memory map, whose pages the system keeps while nobody else needs the memory, and then drops;
so resident size grows with the data set up to what is free, and the other part is what the project itself needs. On a
GPU its own peak stands beside them; it holds the images, 12 kB each.

    python benchmarks/bench_scaling.py
"""

import argparse
import contextlib
import json
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from bench_loader import conditions, evenly, find_data, make_parser, print_conditions

from tinylab.data.augment import normalise
from tinylab.data.dataset import FORMAT_VERSION, Dataset, open_dataset
from tinylab.data.loader import Images, evaluation_batches, make_loader
from tinylab.data.split import Split, make_split
from tinylab.exceptions import UserError
from tinylab.recipe import Recipe
from tinylab.recipes import accurate
from tinylab.run.environment import Compute, choose, fastest_convolutions
from tinylab.training.evaluate import compute_logits, score
from tinylab.training.step import inference, new_state, train_step

COSTS = ("open", "split", "load", "train", "evaluate")
PER_CLASS = (8, 32, 128, 550)
"""Images of each class, in the first series."""
CLASSES = (2, 10, 50, 200)
"""Classes, in the second series, with `SAME_IMAGES` in all."""
SAME_IMAGES = 1100


# --- A data set of a size ---------------------------------------------------------------------------------------------


def write_part(dataset: Dataset, classes: int, per_class: int, folder: Path) -> Path:
    """A data set folder with `per_class` images of each of the first `classes` classes, and its path: the data set's
    own if that is all of it."""
    by_class = [np.flatnonzero(dataset.labels == label) for label in range(classes)]
    rows = np.sort(np.concatenate([evenly(own, per_class) for own in by_class]))
    if len(rows) == len(dataset):
        return dataset.folder
    folder.mkdir()
    images = np.lib.format.open_memmap(
        folder / "images.npy", "w+", np.uint8, (len(rows), *dataset.images.shape[1:])
    )
    for first in range(0, len(rows), 1000):
        images[first : first + 1000] = dataset.images[rows[first : first + 1000]]
    images.flush()
    np.save(folder / "labels.npy", dataset.labels[rows])
    np.save(folder / "boxes.npy", dataset.boxes[rows])
    train_count = int((rows < dataset.train_count).sum())
    meta = {
        "format_version": FORMAT_VERSION,
        "content_sha256": "0" * 64,  # of no published files
        "train_count": train_count,
        "val_count": len(rows) - train_count,
        "wnids": dataset.wnids[:classes],
        "names": dataset.names[:classes],
    }
    (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    return folder


# --- One size, in a process of its own --------------------------------------------------------------------------------


class Memory:
    """While entered, a thread watches how much memory of this process is not pages of files."""

    def __init__(self) -> None:
        self.private = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Memory":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(0.01):
            self.private = max(self.private, memory_line("RssAnon"))


def memory_line(name: str) -> int:
    """Bytes of that line of Linux's status of this process; 0 where there is none."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return 0


def peak_resident() -> int:
    """Bytes. Linux's ru_maxrss counts the parent, too: a new program inherits it from the process that started it."""
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )
    return memory_line("VmHWM") or used


def seconds(work: Callable[[], object], compute: Compute) -> float:
    """Wall-clock seconds of one call, from an idle device to an idle device."""
    compute.synchronise()
    started = time.perf_counter()
    work()
    compute.synchronise()
    return time.perf_counter() - started


def best_seconds(work: Callable[[], object], compute: Compute, budget: float) -> float:
    """The least of up to ten goes, as many as fit into `budget` seconds, but at least one."""
    took = [seconds(work, compute)]
    while len(took) < 10 and sum(took) < budget:
        took.append(seconds(work, compute))
    return min(took)


def measure_size(
    folder: Path, compute: Compute, width: int, resolution: int, budget: float
) -> dict[str, object]:
    """Seconds of each cost on that data set, and the peaks of memory."""
    recipe = replace(
        accurate(), width=width, resolution=resolution, test_resolution=resolution, drop_last=False
    )
    with Memory() as memory, fastest_convolutions(compute):
        dataset = open_dataset(folder)
        split = make_split(dataset, "merged")
        recipe = replace(recipe, batch_size=min(256, len(split.train)))
        work = costs_of(folder, dataset, split, recipe, compute)
        took = {name: best_seconds(work[name], compute, budget) for name in COSTS}
    found = {
        "images": len(dataset),
        "train_images": len(split.train),
        "test_images": len(split.test),
        "classes": split.classes,
        "seconds": {name: round(value, 6) for name, value in took.items()},
        "peak_resident_bytes": peak_resident(),
        "peak_private_bytes": memory.private,
    }
    if compute.device.type == "cuda":
        found["peak_gpu_bytes"] = torch.cuda.max_memory_allocated(compute.device)
    return found


def costs_of(
    folder: Path, dataset: Dataset, split: Split, recipe: Recipe, compute: Compute
) -> dict[str, Callable[[], object]]:
    """What is measured, by its name in `COSTS`."""
    images = Images(dataset.images, dataset.labels, compute.device)
    loader = make_loader(dataset, split.train, recipe, 0, compute.device, images=images)
    state = new_state(recipe, split.classes, 0, loader.steps, compute)
    epochs = iter(range(1, recipe.epochs))

    def opening() -> None:
        opened = open_dataset(folder)
        opened.images[0].sum()
        opened.images[-1].sum()

    def load() -> None:
        for batch in loader.epoch(next(epochs)):
            normalise(batch.images, recipe)

    def train() -> None:
        state.model.train()
        for batch in loader.epoch(next(epochs)):
            train_step(state, recipe, compute, batch)

    def evaluate() -> None:
        batches = evaluation_batches(dataset, split.test, compute.device, images=images)
        score(*compute_logits(inference(state.model, recipe, compute), batches, len(split.test)))

    return dict(
        zip(
            COSTS,
            (opening, lambda: make_split(dataset, "merged"), load, train, evaluate),
            strict=True,
        )
    )


# --- All sizes --------------------------------------------------------------------------------------------------------


def measure_series(
    dataset: Dataset, sizes: list[tuple[int, int]], arguments: argparse.Namespace
) -> Iterator[dict]:
    """`measure_size` of each (classes, images per class), each in a new process."""
    for classes, per_class in sizes:
        with tempfile.TemporaryDirectory(prefix="bench-scaling-") as scratch:
            folder = write_part(dataset, classes, per_class, Path(scratch) / "part")
            command = [
                sys.executable,
                __file__,
                "--size",
                str(folder),
                "--device",
                arguments.device,
            ]
            command += ["--quick"] if arguments.quick else []
            command += ["--width", str(arguments.width), "--resolution", str(arguments.resolution)]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            found = json.loads(output.splitlines()[-1])
        print_size(found)
        yield found


def print_size(found: dict) -> None:
    """The row of one size."""
    cells = "".join(f"{found['seconds'][name]:>11.4f}" for name in COSTS)
    gpu = f"{found['peak_gpu_bytes'] / 1e6:>8.0f}" if "peak_gpu_bytes" in found else ""
    print(
        f"  {found['images']:>8,}{found['classes']:>9}{cells}{found['peak_resident_bytes'] / 1e6:>11.0f}"
        f"{found['peak_private_bytes'] / 1e6:>9.0f}{gpu}",
        flush=True,
    )


def fits(series: list[dict]) -> dict[str, dict]:
    """Exponent, seconds per image and seconds for none of each cost, over the sizes; images are those it handles."""
    handled = {"open": "images", "split": "images", "load": "train_images", "train": "train_images"}
    found = {}
    for name in COSTS:
        images = np.array(
            [size[handled.get(name, "test_images")] for size in series], dtype=np.float64
        )
        took = np.array([size["seconds"][name] for size in series])
        exponent = np.polyfit(np.log(images), np.log(took), 1)[0]
        # Weighted so that a per cent off counts alike at every size.
        slope, rest = np.polyfit(images, took, 1, w=1 / took)
        found[name] = {
            "exponent": round(float(exponent), 3),
            "seconds_per_image": float(f"{slope:.4g}"),
            "seconds_for_none": float(f"{rest:.4g}"),
        }
    return found


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument(
        "--width", type=int, help="channels of the first stage (default: 16 on a CPU, 64 on a GPU)"
    )
    parser.add_argument(
        "--resolution", type=int, help="pixels per side (default: 16 on a CPU, 64 on a GPU)"
    )
    parser.add_argument(
        "--size", type=Path, help=argparse.SUPPRESS
    )  # a process of one size: its data set folder
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-scaling-") as scratch:
        try:
            compute = choose(arguments.device)
            on_gpu = compute.device.type == "cuda"
            arguments.width = arguments.width or (64 if on_gpu else 16)
            arguments.resolution = arguments.resolution or (64 if on_gpu else 16)
            if arguments.size:
                budget = 0 if arguments.quick else 4
                print(
                    json.dumps(
                        measure_size(
                            arguments.size, compute, arguments.width, arguments.resolution, budget
                        )
                    )
                )
                return
            dataset, _, words = find_data(arguments.data, Path(scratch))
        except UserError as error:
            parser.error(str(error))
        report(dataset, arguments, conditions(compute, words), on_gpu)


def sizes_for(dataset: Dataset, quick: bool) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(classes, images per class) of both series, as far as the data set reaches."""
    classes, most = len(dataset.wnids), len(dataset) // len(dataset.wnids)
    counts = [count for count in PER_CLASS if count < most] + [most]
    numbers = [number for number in CLASSES if number < classes] + [classes]
    if quick:
        counts, numbers = [counts[0], min(counts[-1], 32)], numbers[:1]
    same = min(SAME_IMAGES, numbers[0] * most)
    return [(classes, count) for count in counts], [
        (number, max(2, same // number)) for number in numbers
    ]


def report(
    dataset: Dataset, arguments: argparse.Namespace, found: dict[str, object], on_gpu: bool
) -> None:
    """Measures, printing the table row by row, and ends with the JSON line."""
    print_conditions(found)
    print(
        f"  network of width {arguments.width} at {arguments.resolution} pixels; seconds; memory in MB"
    )
    print(f"  {'images':>8}{'classes':>9}" + "".join(f"{name:>11}" for name in COSTS), end="")
    print(f"{'resident':>11}{'private':>9}{'GPU' if on_gpu else '':>8}")
    by_images, by_classes = (
        list(measure_series(dataset, sizes, arguments))
        for sizes in sizes_for(dataset, arguments.quick)
    )
    lines = fits(by_images)
    print(f"  {'':10}" + "".join(f"{name:>11}" for name in COSTS))
    for field in ("exponent", "seconds_per_image", "seconds_for_none"):
        print(f"  {field:17}" + "".join(f"{lines[name][field]:>11.3g}" for name in COSTS))
    result = {
        "benchmark": "scaling",
        **found,
        "width": arguments.width,
        "resolution": arguments.resolution,
        "by_images": by_images,
        "by_classes": by_classes,
        "fits": lines,
        "private_memory_ratio": round(
            by_images[-1]["peak_private_bytes"] / (by_images[0]["peak_private_bytes"] or 1), 3
        ),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
