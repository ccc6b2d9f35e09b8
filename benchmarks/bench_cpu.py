"""How close does training with the recipe `cpu` come to what the processor can do?

Every speed is compared with a plain matrix product, 2048 x 2048 x 2048, in the number format that
`choose` picks. All parts take turns, `--repeat` times, in this one process; each is compared with
the products of its own round. Images are made up and lie in memory, 64 x 64 pixels.

    forward, backward  the micro-batches of one batch, one by one: resize, normalise, network, loss,
                       backward pass; no optimiser, and no gradients added up
    whole step         `train_step` on a batch from the loader: gather, augment, as many
                       micro-batches, Muon, average of the weights
    tests              forward only, as a test of the run does it

GFLOP are the network's only: `recipe.GFLOP_PER_IMAGE` in training, a third of it in tests, less by
area for smaller images.

    python benchmarks/bench_cpu.py                      two or three minutes with bf16 on two cores
    python benchmarks/bench_cpu.py --precision fp32     in a format of your choice
"""

import argparse
import gc
import itertools
import json
import statistics
from collections.abc import Iterator
from dataclasses import replace
from functools import partial, wraps
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from measuring import CLASSES, Work, conditions, is_steady, print_conditions, seconds, spread

from tinylab.data.augment import normalise, resize
from tinylab.data.loader import make_loader
from tinylab.exceptions import UserError
from tinylab.recipe import GFLOP_PER_IMAGE, SIZE, Recipe
from tinylab.recipes import named
from tinylab.run.environment import PRECISIONS, Compute, choose
from tinylab.training.evaluate import test_logits
from tinylab.training.step import TrainState, new_state, train_step

PIXELS = (32, 48, 64)
PRODUCTS = 5
"""Plain products before each part, so that they are spread over the round like the parts."""
FORWARD_BACKWARD, WHOLE_STEP = 0.85, {"bf16": 0.80, "fp32": 0.85}
"""Targets: shares of the plain product, the first at each size, the second at 64 pixels."""


class Part(NamedTuple):
    """What takes its turn. work: one measurement. gflop: the network's, per image."""

    work: Work
    images: int
    gflop: float


def clock(owner: object, method: str, compute: Compute) -> list[float]:
    """Make the method note the seconds of each call in the list that is returned."""
    call, noted = getattr(owner, method), []

    @wraps(call)  # the schedule looks for its mark on the optimiser's step
    def timed(*arguments: object) -> None:
        noted.append(seconds(partial(call, *arguments), compute))

    setattr(owner, method, timed)
    return noted


def make_parts(recipe: Recipe, compute: Compute, state: TrainState) -> Iterator[tuple[str, Part]]:
    """Give each part by its name; they share the state, which does not know about sizes."""
    rng, count = np.random.default_rng(0), 2 * recipe.batch_size
    pixels = rng.integers(0, 256, (count, SIZE, SIZE, 3), dtype=np.uint8)
    dataset = SimpleNamespace(images=pixels, labels=rng.integers(0, CLASSES, count))
    rows = np.arange(count)
    loader = make_loader(dataset, rows, recipe, 0, compute.device)
    resident, numbers = next(loader.epoch(1)), itertools.cycle(range(loader.steps))
    pieces = [each.split(recipe.micro_batch) for each in (resident.images, resident.labels)]

    def forward_backward(recipe: Recipe) -> None:
        for part, labels in zip(*pieces, strict=True):
            state.optimizer.zero_grad(set_to_none=True)
            with compute.autocast():
                logits = state.network(normalise(resize(part, recipe.resolution), recipe)).float()
            smoothing = recipe.label_smoothing
            loss = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing)
            (loss / recipe.batch_size).backward()

    def whole_step(recipe: Recipe) -> None:
        train_step(state, recipe, compute, next(loader.epoch(1, next(numbers))))

    def tests() -> None:
        watch = lambda batches, *_: batches  # noqa: E731  no bar
        test_logits(state.tested, dataset, rows, recipe, compute, watch=watch)

    gflop = GFLOP_PER_IMAGE * (recipe.width / 64) ** 2
    for name, work in (("forward, backward", forward_backward), ("whole step", whole_step)):
        for side in PIXELS:
            call = partial(work, replace(recipe, resolution=side))
            yield f"{name}, {side} px", Part(call, recipe.batch_size, gflop * (side / SIZE) ** 2)
    yield f"tests, {SIZE} px", Part(tests, count, gflop / 3)


def measure_round(parts: dict[str, Part], side: int, compute: Compute, clocks: dict) -> dict:
    """Give each part's images/s and share of the round's product, and the seconds on the clocks."""
    dtype = PRECISIONS[compute.precision]
    product = partial(torch.matmul, *(torch.randn(side, side).to(dtype) for _ in range(2)))
    product()  # the first one finds a cold processor
    products, found = [], {}
    for name, part in parts.items():
        gc.collect()
        products += [seconds(product, compute) for _ in range(PRODUCTS)]
        for each in clocks.values():
            each.clear()
        found[name] = {"images_per_second": part.images / seconds(part.work, compute)}
        found[name] |= {key: sum(each) for key, each in clocks.items() if each}
    peak = 2e-9 * side**3 / statistics.median(products)
    for name, row in found.items():
        row["gflops"] = row["images_per_second"] * parts[name].gflop
        row["share_of_product"] = row["gflops"] / peak
    return {"plain product": {"gflops": peak}} | found


def print_report(rows: dict[str, dict], found: dict[str, object]) -> None:
    """Print the table, what is met, and the JSON line."""
    print_conditions(found)
    heads = ("images/s", "lowest", "highest", "GFLOP/s", "share", "optimiser", "average")
    print(" " * 27 + "".join(f"{head:>10}" for head in heads))
    for name, row in rows.items():
        rate = row.get("images_per_second", {})
        cells = [f"{rate[key]:,.1f}" if rate else "" for key in ("median", "min", "max")]
        cells.append(f"{row['gflops']['median']:,.1f}")
        cells.append(f"{row['share_of_product']['median']:.1%}" if rate else "")
        cells += [f"{row[key]['median']:.3f} s" for key in row if key.endswith("_seconds")]
        print(f"  {name:25}" + "".join(f"{cell:>10}" for cell in cells).rstrip())
    targets = {f"forward, backward, {side} px": FORWARD_BACKWARD for side in PIXELS}
    targets[f"whole step, {SIZE} px"] = WHOLE_STEP[found["precision"]]
    reached = {name: rows[name]["share_of_product"]["median"] >= targets[name] for name in targets}
    for name, target in targets.items():
        print(f"  target {name}, {target:.0%}: {'met' if reached[name] else 'missed'}")
    steady = is_steady([row.get("images_per_second", row["gflops"]) for row in rows.values()])
    result = {"benchmark": "cpu", **found, "rows": rows, "targets": targets, "reached": reached}
    print(json.dumps(result | {"steady": steady}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--precision", default="auto", choices=("auto", *WHOLE_STEP))
    parser.add_argument("--repeat", type=int, default=5, help="rounds (default: 5)")
    parser.add_argument("--quick", action="store_true", help="seconds; the numbers mean little")
    arguments = parser.parse_args()
    try:
        compute, recipe = choose("cpu", arguments.precision), named("cpu")
    except UserError as error:
        parser.error(str(error))
    recipe = replace(recipe, ramp=(), test_resolution=SIZE)
    repeat, side = arguments.repeat, 2048
    if arguments.quick:
        recipe = replace(recipe, width=16, batch_size=4, micro_batch=2)
        repeat, side = 1, 512
    sizes = {"width": recipe.width, "batch": recipe.batch_size, "micro_batch": recipe.micro_batch}
    found = conditions(compute, "made-up images in memory", **sizes, product=side, repeat=repeat)
    state = new_state(recipe, CLASSES, 0, 1000, compute)
    state.model.train()
    clocks = {"optimizer_seconds": clock(state.optimizer, "step", compute)}
    clocks["average_seconds"] = clock(state.average, "update_parameters", compute)
    parts = dict(make_parts(recipe, compute, state))
    # The first round is not counted: it allocates memory and prepares kernels.
    rounds = [measure_round(parts, side, compute, clocks) for _ in range(repeat + 1)][1:]
    rows = {}
    for name, row in rounds[0].items():
        rows[name] = {key: spread([each[name][key] for each in rounds]) for key in row}
    print_report(rows, found | {"skipped_steps": int(state.skipped)})


if __name__ == "__main__":
    main()
