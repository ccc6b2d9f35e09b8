"""How many images per second does one full training step of ResNet-18 do, and how close is an epoch to it?

A step is forward pass, loss, backward pass, optimiser and schedule, on one batch that is on the device already, of the
real network at 64 x 64 pixels. The loops take turns, `--repeat` times, in this one process.

    ours               `published` through `step.train_step`: the number format that `device.choose` picks,
                       channels-last; from uint8 images, normalisation included
    ours, accurate     the same with what `accurate` adds: averaged weights, label smoothing, no decay of vectors
    plain              the published notebook's loop: fp32, NCHW, SGD and cross-entropy as they come, and the loss and
                       the hits fetched to the host in every step; from normalised images
    timm               timm's resnet18 with the same stem, its SGD and its label smoothing, fp32, NCHW; the same images

Then an epoch of as many steps through the batched loader, augmentation included, against the same number of bare steps,
and the share of the matrix-multiply peak that the step reaches: 13.33 GFLOP per training image (a multiplication and
an addition count as two) against the median of large `torch.matmul` in the same number format, measured here.

    python benchmarks/bench_step.py                     on a CPU 32 images per step
    python benchmarks/bench_step.py --device cuda       256; --compile: ours under torch.compile
"""

import contextlib
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import timm
import torch
import torch.nn.functional as F
import torchvision
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
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR

from tinylab.data.augment import normalise
from tinylab.data.dataset import Dataset
from tinylab.data.loader import Batch, make_loader
from tinylab.data.split import make_split
from tinylab.exceptions import UserError
from tinylab.recipe import Recipe
from tinylab.recipes import accurate, published
from tinylab.run.environment import PRECISIONS, Compute, choose, fastest_convolutions
from tinylab.training.step import new_state, train_step

CLASSES = 200
STEPS = 100_000
"""Length of the schedules; nothing here takes so many steps."""
TRAINING_FLOP = 13.33e9
"""Of one image at 64 x 64 pixels: 2.22e9 multiply-adds, two operations each, forward and twice that backward."""
TARGETS = {"plain": 2.0, "epoch": 0.95}
"""Ours against the plain loop, on a CPU that computes bf16; the epoch against bare steps, on a GPU."""

Step = Callable[[], None]


class Sizes(NamedTuple):
    """batch: images per step. steps: in one measurement. warm_up: steps before all measurements."""

    batch: int
    steps: int
    warm_up: int
    epoch_steps: int


# --- The loops --------------------------------------------------------------------------------------------------------


def our_step(recipe: Recipe, batch: Batch, compute: Compute, compiled: bool) -> Step:
    """This project's step on the resident batch."""
    state = new_state(recipe, CLASSES, 0, STEPS, compute, compiled=compiled)
    state.model.train()
    return lambda: train_step(state, recipe, compute, batch)


def plain_step(recipe: Recipe, images: torch.Tensor, labels: torch.Tensor) -> Step:
    """The published notebook's step, on the same network as torchvision builds it."""
    model = (
        with_small_stem(torchvision.models.resnet18(num_classes=CLASSES)).to(images.device).train()
    )
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=recipe.max_learning_rate,
        momentum=recipe.max_momentum,
        nesterov=recipe.nesterov,
        weight_decay=recipe.weight_decay,
    )
    scheduler = OneCycleLR(optimizer, max_lr=recipe.max_learning_rate, total_steps=STEPS)

    def step() -> None:
        optimizer.zero_grad()
        logits = model(images)
        loss = F.cross_entropy(logits, labels)
        loss.backward()
        optimizer.step()
        scheduler.step()
        loss.item()
        logits.argmax(dim=1).eq(labels).sum().item()

    return step


def timm_step(images: torch.Tensor, labels: torch.Tensor) -> Step:
    """timm's network, optimiser and loss, with the settings its training script has for SGD."""
    model = (
        with_small_stem(timm.create_model("resnet18", num_classes=CLASSES))
        .to(images.device)
        .train()
    )
    optimizer = create_optimizer_v2(model, opt="sgd", lr=0.05, weight_decay=2e-5, momentum=0.9)
    criterion = LabelSmoothingCrossEntropy(0.1)

    def step() -> None:
        optimizer.zero_grad()
        criterion(model(images), labels).backward()
        optimizer.step()

    return step


def with_small_stem(model: nn.Module) -> nn.Module:
    """The network with this project's stem: 3 x 3, stride 1, no pooling."""
    model.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model


# --- Measuring --------------------------------------------------------------------------------------------------------


def images_per_second(step: Step, compute: Compute, batch: int, steps: int) -> float:
    """Of `steps` steps, from an idle device to an idle device."""
    compute.synchronise()
    started = time.perf_counter()
    for _ in range(steps):
        step()
    compute.synchronise()
    return batch * steps / (time.perf_counter() - started)


def measure_steps(
    images: torch.Tensor,
    labels: torch.Tensor,
    compute: Compute,
    sizes: Sizes,
    compiled: bool,
    repeat: int,
) -> dict[str, dict]:
    """Images/s of all loops on uint8 images (B, 64, 64, 3) and labels int64 (B,), both on the device."""
    recipe, batch = published(), Batch(images, labels)
    pixels = normalise(images, recipe).contiguous()  # NCHW
    # Each loop is made, with its settings, where it is tried; cuDNN remembers what it found for a shape.
    loops = {
        "ours": (our_step(recipe, batch, compute, compiled), True),
        "ours, accurate": (our_step(accurate(), batch, compute, compiled), True),
        "plain": (plain_step(recipe, pixels, labels), False),
        "timm": (timm_step(pixels, labels), True),  # its training script lets cuDNN choose, too
    }

    def measurement(step: Step, tuned: bool, steps: int) -> Callable[[], float]:
        def measure() -> float:
            with fastest_convolutions(compute) if tuned else contextlib.nullcontext():
                return images_per_second(step, compute, len(images), steps)

        return measure

    alternate({name: measurement(*loop, sizes.warm_up) for name, loop in loops.items()}, 1)
    rates = alternate(
        {name: measurement(*loop, sizes.steps) for name, loop in loops.items()}, repeat
    )
    return {name: {"images_per_second": spread(values)} for name, values in rates.items()}


def measure_epoch(
    dataset: Dataset, rows: np.ndarray, compute: Compute, sizes: Sizes, compiled: bool, repeat: int
) -> dict[str, object]:
    """Images/s of epochs through the batched loader, and of as many steps on one resident batch."""
    recipe = replace(published(), augmentation="batched", batch_size=sizes.batch, drop_last=True)
    rows = np.resize(
        rows, sizes.epoch_steps * sizes.batch
    )  # as many as asked for, repeated where there are fewer
    loader = make_loader(dataset, rows, recipe, 0, compute.device)
    state = new_state(recipe, CLASSES, 0, STEPS, compute, compiled=compiled)
    state.model.train()
    resident = next(iter(loader.epoch(1)))
    numbers = itertools.cycle(range(1, recipe.epochs))

    def batches(number: int) -> Iterator[Batch]:
        return (resident for _ in range(loader.steps)) if number == 0 else loader.epoch(number)

    def rate(number: int) -> float:
        compute.synchronise()
        started = time.perf_counter()
        for batch in batches(number):
            train_step(state, recipe, compute, batch)
        compute.synchronise()
        return len(rows) / (time.perf_counter() - started)

    with fastest_convolutions(compute):
        for _ in range(sizes.warm_up):
            train_step(state, recipe, compute, resident)
        rates = alternate({"epoch": lambda: rate(next(numbers)), "bare": lambda: rate(0)}, repeat)
    # Of each pair its own quotient: both halves of a pair met the same machine.
    share = statistics.median(
        epoch / bare for epoch, bare in zip(rates["epoch"], rates["bare"], strict=True)
    )
    return {
        "steps": loader.steps,
        "epoch_images_per_second": spread(rates["epoch"]),
        "bare_images_per_second": spread(rates["bare"]),
        "epoch_share_of_bare": round(share, 4),
    }


def matmul_peak(compute: Compute, quick: bool) -> float:
    """Median operations per second of large square matrix products in the step's number format."""
    side = 8192 if compute.device.type == "cuda" else 512 if quick else 2048
    dtype = PRECISIONS[compute.precision]
    left, right = (torch.randn(side, side, device=compute.device).to(dtype) for _ in range(2))
    rates = []
    for number in range(5 if quick else 25):
        compute.synchronise()
        started = time.perf_counter()
        torch.matmul(left, right)
        compute.synchronise()
        if number >= 3:  # the first ones find a cold device
            rates.append(2 * side**3 / (time.perf_counter() - started))
    return statistics.median(rates)


def main() -> None:
    parser = make_parser(__doc__, repeat=5)
    parser.add_argument(
        "--batch", type=int, help="images per step (default: 32 on a CPU, 256 on a GPU)"
    )
    parser.add_argument("--compile", action="store_true", help="ours under torch.compile")
    arguments = parser.parse_args()
    repeat = 1 if arguments.quick else arguments.repeat
    with tempfile.TemporaryDirectory(prefix="bench-step-") as scratch:
        try:
            compute = choose(arguments.device, compiled=arguments.compile)
            dataset, _, words = find_data(arguments.data, Path(scratch))
            rows = make_split(dataset, "merged").train
        except UserError as error:
            parser.error(str(error))
        found = conditions(compute, words)
        sizes = sizes_for(compute, arguments.batch, arguments.quick)
        chosen = np.resize(evenly(rows, sizes.batch), sizes.batch)
        images = torch.from_numpy(dataset.images[chosen]).to(compute.device)
        labels = torch.from_numpy(dataset.labels[chosen].astype(np.int64)).to(compute.device)
        loops = measure_steps(images, labels, compute, sizes, arguments.compile, repeat)
        epoch = measure_epoch(dataset, rows, compute, sizes, arguments.compile, repeat)
        peak = matmul_peak(compute, arguments.quick)
    found |= {
        "compiled": arguments.compile,
        "batch": sizes.batch,
        "steps": sizes.steps,
        "repeat": repeat,
    }
    report(loops, epoch, peak, found, on_gpu=compute.device.type == "cuda")


def sizes_for(compute: Compute, batch: int | None, quick: bool) -> Sizes:
    """On a GPU an epoch is one of `merged`: 77,000 images."""
    if compute.device.type == "cuda":
        batch = batch or 256
        return Sizes(batch, 10, 10, 20) if quick else Sizes(batch, 50, 30, 77_000 // batch)
    return Sizes(batch or 2, 1, 0, 1) if quick else Sizes(batch or 32, 1, 2, 4)


def report(
    loops: dict[str, dict], epoch: dict, peak: float, found: dict[str, object], on_gpu: bool
) -> None:
    """Prints the tables and the JSON line."""
    medians = {name: row["images_per_second"]["median"] for name, row in loops.items()}
    ratios = {name: round(medians["ours"] / median, 2) for name, median in medians.items()}
    share_of_peak = medians["ours"] * TRAINING_FLOP / peak
    reached = {
        "plain": ratios["plain"] >= TARGETS["plain"],
        "epoch": epoch["epoch_share_of_bare"] >= TARGETS["epoch"],
    }
    print_conditions(found, found["repeat"])
    print(
        f"  {found['batch']} images per step, {found['precision']}{', compiled' if found['compiled'] else ''}"
    )
    print(f"  {'':24}{'images/s':>10}  {'lowest':>8}  {'highest':>8}  {'ours is':>8}")
    for name, row in loops.items():
        rate = row["images_per_second"]
        print(
            f"  {name:24}{rate['median']:>10,.1f}  {rate['min']:>8,.1f}  {rate['max']:>8,.1f}  {ratios[name]:>7.2f}x"
        )
    whole, bare = (
        epoch["epoch_images_per_second"]["median"],
        epoch["bare_images_per_second"]["median"],
    )
    print(
        f"  epoch of {epoch['steps']} steps with its loader: {whole:,.1f} images/s, bare steps {bare:,.1f}: ",
        end="",
    )
    print(f"{epoch['epoch_share_of_bare']:.1%}")
    print(
        f"  matrix products in {found['precision']}: {peak / 1e12:.3g} TFLOP/s; ours reaches {share_of_peak:.1%} of it"
    )
    applies = ["plain", "epoch"] if on_gpu else ["plain"] if found["precision"] == "bf16" else []
    for name in applies:
        print(
            f"  target against {name}: {TARGETS[name]:g}: {'reached' if reached[name] else 'missed'}"
        )
    spreads = [row["images_per_second"] for row in loops.values()]
    spreads += [epoch["epoch_images_per_second"], epoch["bare_images_per_second"]]
    result = {
        "benchmark": "step",
        **found,
        "loops": loops,
        "ratios": ratios,
        **{f"loader_{name}": value for name, value in epoch.items()},
        "matmul_tflops": round(peak / 1e12, 4),
        "share_of_peak": round(share_of_peak, 4),
        "targets": {name: TARGETS[name] for name in applies},
        "reached": {name: reached[name] for name in applies},
        "steady": is_steady(spreads),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
