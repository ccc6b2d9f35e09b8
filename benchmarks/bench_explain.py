"""How many images per second does Grad-CAM explain, batched and one by one?

The full-width network, random weights, 64 x 64 pixels; for every image the four stages' maps for
one class. The ways take turns, `--repeat` times, in this one process.

    ours                   `gradcam`: batches of up to 32, one pass for all four stages
    library, one by one    pytorch-grad-cam's usual loop: a `GradCAM` per stage, image by image
    library, batched       the same four, called with the same batches
    library, averaged      one `GradCAM` of all four stages, image by image: as few passes as ours,
                           but it gives their average only, no map of any stage

    python benchmarks/bench_explain.py
"""

import contextlib
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from measuring import (
    CLASSES,
    conditions,
    evenly,
    find_data,
    make_parser,
    report,
    seconds,
    take_turns,
)
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

from tinylab.data.augment import normalise
from tinylab.data.split import make_split
from tinylab.exceptions import UserError
from tinylab.explain.gradcam import STAGES, gradcam
from tinylab.model import build_model
from tinylab.recipes import published
from tinylab.run.environment import Compute, choose

BATCH = 32


def library(cams: list[GradCAM], inputs: torch.Tensor, targets: torch.Tensor, batch: int) -> None:
    """Send every image through each object, `batch` at a time; the maps are thrown away."""
    for images, classes in zip(inputs.split(batch), targets.split(batch), strict=True):
        for cam in cams:
            cam(images, [ClassifierOutputTarget(label) for label in classes.tolist()])


def measure(images: np.ndarray, compute: Compute, repeat: int, warm: int) -> dict:
    """Return images/s of all ways on uint8 images (N, 64, 64, 3); `warm` of them go beforehand."""
    recipe = published()
    inputs = normalise(torch.from_numpy(images).to(compute.device), recipe)
    targets = torch.arange(len(images)) % CLASSES

    def network() -> torch.nn.Module:
        return build_model(recipe, CLASSES, seed=0).to(compute.device).eval()

    with contextlib.ExitStack() as stack:

        def cam(stages: Sequence[str]) -> GradCAM:
            own = network()  # of its own: the hooks slow down every other use of it
            return stack.enter_context(GradCAM(own, [getattr(own, stage) for stage in stages]))

        model, each, together = network(), [cam([stage]) for stage in STAGES], [cam(STAGES)]
        ways = {
            "ours": lambda n: gradcam(model, inputs[:n], targets[:n], batch_size=BATCH),
            "library, one by one": lambda n: library(each, inputs[:n], targets[:n], 1),
            "library, batched": lambda n: library(each, inputs[:n], targets[:n], BATCH),
            "library, averaged": lambda n: library(together, inputs[:n], targets[:n], 1),
        }

        def rates(count: int, repeat: int) -> dict:
            def rate(name: str) -> float:
                return count / seconds(lambda: ways[name](count), compute)

            return take_turns({name: partial(rate, name) for name in ways}, repeat)

        if warm:
            rates(warm, 1)
        return rates(len(images), repeat)


def main() -> None:
    parser = make_parser(__doc__, repeat=3)
    parser.add_argument("--images", type=int, help="how many (default: 16 on a CPU, 64 on a GPU)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-explain-") as scratch:
        try:
            compute = choose(arguments.device, "fp32")  # as explain does
            dataset, name = find_data(arguments.data, Path(scratch))
            rows = make_split(dataset, "merged").test
        except UserError as error:
            parser.error(str(error))
        on_gpu, quick = compute.device.type == "cuda", arguments.quick
        count = 1 if quick else arguments.images or (64 if on_gpu else 16)
        repeat = 1 if quick else arguments.repeat
        found = conditions(compute, name, images=count, batch=min(BATCH, count), repeat=repeat)
        images = dataset.images[np.resize(evenly(rows, count), count)]
        rates = measure(images, compute, repeat, 0 if quick else count if on_gpu else 1)
    report("explain", rates, found)


if __name__ == "__main__":
    main()
