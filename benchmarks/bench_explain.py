"""How many images per second does Grad-CAM explain, batched and one by one?

The full-width network, random weights, 64 x 64 pixels; for every image the four stages' maps for one class. The ways
take turns, `--repeat` times, in this one process.

    ours                   `explain.gradcam`: batches of up to 32, one forward and one backward pass for all four stages
    library, one by one    pytorch-grad-cam's usual loop: a `GradCAM` per stage, called image by image
    library, batched       the same four, called with the same batches
    library, averaged      one `GradCAM` of all four stages, image by image: as few passes as ours, but it gives their
                           average only, no map of any stage

Then, how long does the box metric of 2,000 images take? That is the longest part of `tinylab explain`: for every image
the last stage's maps for the predicted and for the actual class, here of a network a quarter as wide.

    ours                   `localisation.localise`: reads, normalises, maps, scores, and makes groups and intervals
    library, batched       one `GradCAM` of the last stage, the same images, classes and batches; maps are thrown away
    library, one by one    the same, called image by image

    python benchmarks/bench_explain.py
"""

import contextlib
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from bench_loader import (
    alternate,
    conditions,
    evenly,
    find_data,
    is_steady,
    make_parser,
    print_conditions,
    spread,
)
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

from tinylab.data.augment import normalise
from tinylab.data.dataset import Dataset
from tinylab.data.split import make_split
from tinylab.exceptions import UserError
from tinylab.explain.gradcam import STAGES, gradcam
from tinylab.explain.localisation import localise
from tinylab.model import ResNet18, build_model
from tinylab.recipes import published
from tinylab.run.environment import Compute, choose

CLASSES = 200
BATCH = 32
NARROW = 16
"""Channels of the first stage, where the box metric is timed."""


def library(cams: list[GradCAM], inputs: torch.Tensor, targets: torch.Tensor, batch: int) -> None:
    """Every image through each of the library's objects, `batch` at a time; the maps are thrown away."""
    for images, classes in zip(inputs.split(batch), targets.split(batch), strict=True):
        for cam in cams:
            cam(images, [ClassifierOutputTarget(label) for label in classes.tolist()])


def measure(images: np.ndarray, compute: Compute, repeat: int, warm: int) -> dict[str, dict]:
    """Images/s of all ways on uint8 images (N, 64, 64, 3); `warm`: how many of them go through once beforehand."""
    recipe = published()
    inputs = normalise(torch.from_numpy(images).to(compute.device), recipe)
    targets = torch.arange(len(images)) % CLASSES

    def network() -> ResNet18:
        return build_model(recipe, CLASSES, seed=0).to(compute.device).eval()

    def cam(stages: Sequence[str]) -> GradCAM:
        # On a network of its own: while it lives, its hooks slow down every other use of the network.
        own = network()
        return stack.enter_context(GradCAM(own, [getattr(own, stage) for stage in stages]))

    with contextlib.ExitStack() as stack:
        model, each, together = network(), [cam([stage]) for stage in STAGES], [cam(STAGES)]
        ways: dict[str, Callable[[int], object]] = {
            "ours": lambda count: gradcam(model, inputs[:count], targets[:count], batch_size=BATCH),
            "library, one by one": lambda count: library(each, inputs[:count], targets[:count], 1),
            "library, batched": lambda count: library(each, inputs[:count], targets[:count], BATCH),
            "library, averaged": lambda count: library(
                together, inputs[:count], targets[:count], 1
            ),
        }

        return _timed(ways, len(images), compute, repeat, warm)


def measure_boxes(
    dataset: Dataset, rows: np.ndarray, compute: Compute, repeat: int, warm: int
) -> dict[str, dict]:
    """Images/s of all ways to the maps of `rows` for both classes; `warm`: how many go through once beforehand."""
    recipe = replace(published(), width=NARROW)
    labels = torch.from_numpy(dataset.labels[rows].astype(np.int64))

    def inputs_of(images: torch.Tensor) -> torch.Tensor:
        return normalise(images.to(compute.device), recipe)

    def network() -> ResNet18:
        return build_model(recipe, CLASSES, seed=0).to(compute.device).eval()

    model = network()
    with torch.inference_mode():
        parts = [
            model(inputs_of(torch.from_numpy(dataset.images[some]))).cpu()
            for some in in_batches(rows)
        ]
    logits = torch.cat(parts)
    own = network()  # the library's hooks stay on it

    def ours(count: int) -> None:
        answers = {
            "rows": rows[:count],
            "logits": logits[:count].numpy(),
            "normalise": inputs_of,
            "count": None,
        }
        localise(
            model, images=dataset.images, labels=dataset.labels, boxes=dataset.boxes, **answers
        )

    def theirs(count: int, batch: int) -> None:
        for some in in_batches(np.arange(count), batch):
            inputs = inputs_of(torch.from_numpy(dataset.images[rows[some]]))
            for classes in (logits[some].argmax(dim=1), labels[some]):
                library([cam], inputs, classes, batch)

    with GradCAM(own, [own.layer4]) as cam:
        ways: dict[str, Callable[[int], None]] = {
            "ours": ours,
            "library, batched": lambda count: theirs(count, BATCH),
            "library, one by one": lambda count: theirs(count, 1),
        }

        return _timed(ways, len(rows), compute, repeat, warm)


def _timed(
    ways: dict[str, Callable[[int], object]], count: int, compute: Compute, repeat: int, warm: int
) -> dict[str, dict]:
    """Images/s of each way, called with `count` images `repeat` times in turns; `warm`: with so many once before."""

    def rate(way: Callable[[int], object], images: int) -> float:
        compute.synchronise()
        started = time.perf_counter()
        way(images)
        compute.synchronise()
        return images / (time.perf_counter() - started)

    if warm:
        alternate({name: lambda way=way: rate(way, warm) for name, way in ways.items()}, 1)
    rates = alternate(
        {name: lambda way=way: rate(way, count) for name, way in ways.items()}, repeat
    )
    return {name: {"images_per_second": spread(values)} for name, values in rates.items()}


def in_batches(rows: np.ndarray, batch: int = BATCH) -> list[np.ndarray]:
    """The rows in pieces of `batch`, the last one perhaps shorter."""
    return np.split(rows, range(batch, len(rows), batch))


def main() -> None:
    parser = make_parser(__doc__, repeat=3)
    parser.add_argument(
        "--images", type=int, help="how many to explain (default: 16 on a CPU, 64 on a GPU)"
    )
    parser.add_argument(
        "--box-images", type=int, default=2000, help="how many for the box metric (default: 2000)"
    )
    arguments = parser.parse_args()
    repeat = 1 if arguments.quick else arguments.repeat
    with tempfile.TemporaryDirectory(prefix="bench-explain-") as scratch:
        try:
            compute = choose(arguments.device, "fp32")  # as explain does
            dataset, _, words = find_data(arguments.data, Path(scratch))
            rows = make_split(dataset, "merged").test
        except UserError as error:
            parser.error(str(error))
        found = conditions(compute, words)
        on_gpu = compute.device.type == "cuda"
        count = 1 if arguments.quick else arguments.images or (64 if on_gpu else 16)
        images = dataset.images[np.resize(evenly(rows, count), count)]
        measured = measure(
            images, compute, repeat, warm=0 if arguments.quick else count if on_gpu else 1
        )
        boxed = evenly(rows, min(len(rows), 4 if arguments.quick else arguments.box_images))
        boxes = measure_boxes(
            dataset, boxed, compute, repeat, warm=0 if arguments.quick else min(BATCH, len(boxed))
        )
    report(
        measured,
        boxes,
        len(boxed),
        {**found, "images": count, "batch": min(BATCH, count), "repeat": repeat},
    )


def report(
    rows: dict[str, dict], boxes: dict[str, dict], boxed: int, found: dict[str, object]
) -> None:
    """Prints the two tables and the JSON line."""
    print_conditions(found, found["repeat"])
    print(f"  {found['images']} images, batches of {found['batch']}; four stages, one class")
    ratios = print_table(rows)
    print(
        f"  box metric of {boxed:,} images, batches of {min(BATCH, boxed)}; width {NARROW}, last stage, both classes"
    )
    metric = {"images": boxed, "width": NARROW, "ways": boxes, "ratios": print_table(boxes)}
    metric["seconds"] = {
        name: round(boxed / row["images_per_second"]["median"], 2) for name, row in boxes.items()
    }
    print(
        "  seconds: "
        + ", ".join(f"{name} {seconds:,.1f}" for name, seconds in metric["seconds"].items())
    )
    steady = is_steady([row["images_per_second"] for row in (*rows.values(), *boxes.values())])
    line = {
        "benchmark": "explain",
        **found,
        "ways": rows,
        "ratios": ratios,
        "box_metric": metric,
        "steady": steady,
    }
    print(json.dumps(line))


def print_table(rows: dict[str, dict]) -> dict[str, float]:
    """A line for each way; returns how many times as fast as it ours is."""
    medians = {name: row["images_per_second"]["median"] for name, row in rows.items()}
    ratios = {name: round(medians["ours"] / median, 2) for name, median in medians.items()}
    print(f"  {'':24}{'images/s':>10}  {'lowest':>8}  {'highest':>8}  {'ours is':>8}")
    for name, row in rows.items():
        rate = row["images_per_second"]
        print(
            f"  {name:24}{rate['median']:>10,.2f}  {rate['min']:>8,.2f}  {rate['max']:>8,.2f}  {ratios[name]:>7.2f}x"
        )
    return ratios


if __name__ == "__main__":
    main()
