"""How many images per second does a full training step of ResNet-18 do, and an epoch of them?

A step is forward pass, loss, backward pass, optimiser and schedule, on one batch that is on the
device already, of the real network at 64 x 64 pixels. The loops take turns, `--repeat` times.

    ours     `published` through `train_step`: the number format that `choose` picks, channels-last;
             from uint8 images, normalisation included
    plain    the published notebook's loop: fp32, NCHW, SGD and cross-entropy as they come, loss and
             hits fetched to the host in every step; from normalised images
    timm     timm's resnet18 with the same stem, its SGD and its label smoothing, fp32, NCHW

Then an epoch through the batched loader, augmentation included, against as many bare steps.

    python benchmarks/bench_step.py                     on a CPU 32 images per step
    python benchmarks/bench_step.py --device cuda       256
"""

import contextlib
import itertools
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import timm
import torch
import torch.nn.functional as F
import torchvision
from measuring import (
    CLASSES,
    STEPS,
    Work,
    conditions,
    evenly,
    find_data,
    make_parser,
    report,
    seconds,
    spread,
    take_turns,
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
from tinylab.recipes import published
from tinylab.run.environment import Compute, choose, fastest_convolutions
from tinylab.training.step import new_state, train_step

TARGETS = {"plain": 2.0, "epoch": 0.95}
"""Ours against the plain loop, on a CPU that computes bf16; the epoch against bare steps."""


class Sizes(NamedTuple):
    """batch: images per step. steps: in one measurement. warm_up: steps before all of them."""

    batch: int
    steps: int
    warm_up: int
    epoch_steps: int


def plain_step(recipe: Recipe, images: torch.Tensor, labels: torch.Tensor) -> Work:
    """Return the published notebook's step, on the same network as torchvision builds it."""
    model = with_small_stem(torchvision.models.resnet18(num_classes=CLASSES))
    model.to(images.device).train()
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


def timm_step(images: torch.Tensor, labels: torch.Tensor) -> Work:
    """Return timm's network, optimiser and loss, with its training script's settings for SGD."""
    model = with_small_stem(timm.create_model("resnet18", num_classes=CLASSES))
    model.to(images.device).train()
    optimizer = create_optimizer_v2(model, opt="sgd", lr=0.05, weight_decay=2e-5, momentum=0.9)
    criterion = LabelSmoothingCrossEntropy(0.1)

    def step() -> None:
        optimizer.zero_grad()
        criterion(model(images), labels).backward()
        optimizer.step()

    return step


def with_small_stem(model: nn.Module) -> nn.Module:
    """Return the network with this project's stem: 3 x 3, stride 1, no pooling."""
    model.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model


def measure_steps(batch: Batch, compute: Compute, sizes: Sizes, repeat: int) -> dict:
    """Return images/s of all loops on a batch of uint8 images (B, 64, 64, 3) on the device."""
    recipe = published()
    pixels = normalise(batch.images, recipe).contiguous()  # NCHW
    state = new_state(recipe, CLASSES, 0, STEPS, compute)
    state.model.train()
    loops = {
        "ours": lambda: train_step(state, recipe, compute, batch),
        "plain": plain_step(recipe, pixels, batch.labels),
        "timm": timm_step(pixels, batch.labels),  # its training script lets cuDNN choose, too
    }

    def rates(steps: int, repeat: int) -> dict[str, list[float]]:
        def rate(name: str) -> float:
            tuned = name != "plain"
            with fastest_convolutions(compute) if tuned else contextlib.nullcontext():
                took = seconds(lambda: [loops[name]() for _ in range(steps)], compute)
            return sizes.batch * steps / took

        return take_turns({name: partial(rate, name) for name in loops}, repeat)

    if sizes.warm_up:
        rates(sizes.warm_up, 1)
    return rates(sizes.steps, repeat)


def measure_epoch(
    dataset: Dataset, rows: np.ndarray, compute: Compute, sizes: Sizes, repeat: int
) -> dict:
    """Return images/s of epochs through the batched loader, and of as many bare steps."""
    recipe = replace(published(), augmentation="batched", batch_size=sizes.batch, drop_last=True)
    rows = np.resize(rows, sizes.epoch_steps * sizes.batch)  # repeated where there are fewer
    loader = make_loader(dataset, rows, recipe, 0, compute.device)
    state = new_state(recipe, CLASSES, 0, STEPS, compute)
    state.model.train()
    resident = next(iter(loader.epoch(1)))
    numbers = itertools.cycle(range(1, recipe.epochs))

    def rate(batches: Callable) -> float:
        def steps() -> None:
            for batch in batches():
                train_step(state, recipe, compute, batch)

        return len(rows) / seconds(steps, compute)

    with fastest_convolutions(compute):
        for _ in range(sizes.warm_up):
            train_step(state, recipe, compute, resident)
        return take_turns(
            {
                "epoch": lambda: rate(lambda: loader.epoch(next(numbers))),
                "bare": lambda: rate(lambda: itertools.repeat(resident, loader.steps)),
            },
            repeat,
        )


def main() -> None:
    parser = make_parser(__doc__, repeat=5)
    parser.add_argument("--batch", type=int, help="images per step (default: CPU 32, GPU 256)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-step-") as scratch:
        try:
            compute = choose(arguments.device)
            dataset, name = find_data(arguments.data, Path(scratch))
            rows = make_split(dataset, "merged").train
        except UserError as error:
            parser.error(str(error))
        repeat = 1 if arguments.quick else arguments.repeat
        gpu = compute.device.type == "cuda"
        size = arguments.batch or (256 if gpu else 2 if arguments.quick else 32)
        sizes = Sizes(size, 50, 30, 77_000 // size) if gpu else Sizes(size, 1, 2, 4)
        if arguments.quick:
            sizes = Sizes(size, 1, 0, 1)
        found = conditions(compute, name, **sizes._asdict(), repeat=repeat)
        found["timm"] = timm.__version__
        chosen = np.resize(evenly(rows, sizes.batch), sizes.batch)
        images = torch.from_numpy(dataset.images[chosen])
        labels = torch.from_numpy(dataset.labels[chosen].astype(np.int64))
        batch = Batch(images.to(compute.device), labels.to(compute.device))
        rates = measure_steps(batch, compute, sizes, repeat)
        epoch = measure_epoch(dataset, rows, compute, sizes, repeat)
    # Each pair's own quotient: both halves of a pair met the same machine.
    pairs = zip(epoch["epoch"], epoch["bare"], strict=True)
    share = statistics.median(whole / bare for whole, bare in pairs)
    print(f"an epoch with its loader runs at {share:.1%} of bare steps")
    spreads = {f"{name}_images_per_second": spread(values) for name, values in epoch.items()}
    report("step", rates, found, epoch_share_of_bare=round(share, 4), targets=TARGETS, **spreads)


if __name__ == "__main__":
    main()
