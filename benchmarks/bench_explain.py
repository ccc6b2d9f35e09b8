"""How many images per second does Grad-CAM explain, batched and one by one?

The full-width network, random weights, 64 x 64 pixels; for every image the four stages' maps for one class. The ways
take turns, `--repeat` times, in this one process.

    ours                   `explain.gradcam`: batches of up to 32, one forward and one backward pass for all four stages
    library, one by one    pytorch-grad-cam's usual loop: a `GradCAM` per stage, called image by image
    library, batched       the same four, called with the same batches
    library, averaged      one `GradCAM` of all four stages, image by image: as few passes as ours, but it gives their
                           average only, no map of any stage

    python benchmarks/bench_explain.py
"""

import contextlib
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from bench_loader import alternate, conditions, evenly, find_data, is_steady, make_parser, print_conditions, spread
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

from tinylab.augment import normalise
from tinylab.device import Placement, choose
from tinylab.explain import STAGES, gradcam
from tinylab.model import ResNet18, build_model
from tinylab.recipe import UserError, published
from tinylab.split import make_split

CLASSES = 200
BATCH = 32


def library(cams: list[GradCAM], inputs: torch.Tensor, targets: torch.Tensor, batch: int) -> None:
    """Every image through each of the library's objects, `batch` at a time; the maps are thrown away."""
    for images, classes in zip(inputs.split(batch), targets.split(batch), strict=True):
        for cam in cams:
            cam(images, [ClassifierOutputTarget(label) for label in classes.tolist()])


def measure(images: np.ndarray, place: Placement, repeat: int, warm: int) -> dict[str, dict]:
    """Images/s of all ways on uint8 images (N, 64, 64, 3); `warm`: how many of them go through once beforehand."""
    recipe = published()
    inputs = normalise(torch.from_numpy(images).to(place.device), recipe)
    targets = torch.arange(len(images)) % CLASSES

    def network() -> ResNet18:
        return build_model(recipe, CLASSES, seed=0).to(place.device).eval()

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
            "library, averaged": lambda count: library(together, inputs[:count], targets[:count], 1),
        }

        def rate(way: Callable[[int], object], count: int) -> float:
            place.synchronise()
            started = time.perf_counter()
            way(count)
            place.synchronise()
            return count / (time.perf_counter() - started)

        if warm:
            alternate({name: lambda way=way: rate(way, warm) for name, way in ways.items()}, 1)
        rates = alternate({name: lambda way=way: rate(way, len(images)) for name, way in ways.items()}, repeat)
    return {name: {"images_per_second": spread(values)} for name, values in rates.items()}


def main() -> None:
    parser = make_parser(__doc__, repeat=3)
    parser.add_argument("--images", type=int, help="how many to explain (default: 16 on a CPU, 64 on a GPU)")
    arguments = parser.parse_args()
    repeat = 1 if arguments.quick else arguments.repeat
    with tempfile.TemporaryDirectory(prefix="bench-explain-") as scratch:
        try:
            place = choose(arguments.device, "fp32")  # as explain does
            dataset, _, words = find_data(arguments.data, Path(scratch))
            rows = make_split(dataset, "merged").test
        except UserError as error:
            parser.error(str(error))
        found = conditions(place, words)
        on_gpu = place.device.type == "cuda"
        count = 1 if arguments.quick else arguments.images or (64 if on_gpu else 16)
        images = dataset.images[np.resize(evenly(rows, count), count)]
        measured = measure(images, place, repeat, warm=0 if arguments.quick else count if on_gpu else 1)
    report(measured, {**found, "images": count, "batch": min(BATCH, count), "repeat": repeat})


def report(rows: dict[str, dict], found: dict[str, object]) -> None:
    """Prints the table and the JSON line."""
    medians = {name: row["images_per_second"]["median"] for name, row in rows.items()}
    ratios = {name: round(medians["ours"] / median, 2) for name, median in medians.items()}
    print_conditions(found, found["repeat"])
    print(f"  {found['images']} images, batches of {found['batch']}")
    print(f"  {'':24}{'images/s':>10}  {'lowest':>8}  {'highest':>8}  {'ours is':>8}")
    for name, row in rows.items():
        rate = row["images_per_second"]
        print(f"  {name:24}{rate['median']:>10,.2f}  {rate['min']:>8,.2f}  {rate['max']:>8,.2f}  {ratios[name]:>7.2f}x")
    steady = is_steady([row["images_per_second"] for row in rows.values()])
    print(json.dumps({"benchmark": "explain", **found, "ways": rows, "ratios": ratios, "steady": steady}))


if __name__ == "__main__":
    main()
