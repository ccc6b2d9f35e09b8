"""A learning-rate range test: a few steps while the learning rate grows from tiny to absurd.

Smith, "Cyclical learning rates for training neural networks", 2017; the growth by a constant
factor per step is fastai's. No file is written, and the state is as before.
"""

import itertools
import math
import os
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import nn

from tinylab.custom import Loss, customise
from tinylab.data.dataset import Dataset
from tinylab.data.loader import Batch, make_loader
from tinylab.data.split import make_split
from tinylab.exceptions import UserError
from tinylab.recipe import Recipe
from tinylab.run.environment import Compute, choose, fastest_convolutions
from tinylab.training.progress import print_line, silent, watched
from tinylab.training.step import TrainState, new_state, require_batches, train_step
from tinylab.training.warm_up import memory_hint, rehearsal

RECENT = 5  # losses whose mean decides when to stop
TOO_HIGH = 4  # times the best such mean
SPREAD = 0.15  # of the Gaussian that smooths the curve, in decades of the learning rate


@dataclass(frozen=True)
class RangeTest:
    """The curve of a range test, float64 (steps,) each, and what it suggests."""

    learning_rates: np.ndarray
    losses: np.ndarray  # nats per image, before each update
    smoothed: np.ndarray
    suggestion: float | None  # of `max_learning_rate`
    reason: str  # why, in a sentence


def find_lr(
    recipe: Recipe, dataset: Dataset, *, split: str = "select", seed: int = 0,
    limit_classes: int | None = None, device: str = "auto", precision: str = "auto",
    start: float = 1e-5, stop: float = 10.0, steps: int = 100, workers: int | None = None,
    transform: Callable | None = None, model: Callable[[int], nn.Module] | None = None,
    loss: Loss | None = None, init: Path | None = None, quiet: bool = False,
) -> RangeTest:  # fmt: skip
    """Test `recipe` on the training images of the split, with the first weights of that seed.

    The arguments are those of `train` and `range_test`.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError("a range test serves a single process: start it without torchrun")
    compute = choose(device, precision)
    rows = make_split(dataset, split, limit_classes)
    require_batches(recipe, len(rows.train))
    custom = customise(transform, model, loss, init, rows.classes, compute.device)
    where = (seed, compute.device, workers)
    loader = make_loader(dataset, rows.train, recipe, *where, transform=custom.transform)

    def batches() -> Iterator[Batch]:
        for epoch in itertools.cycle(range(1, recipe.epochs + 1)):
            yield from loader.epoch(epoch)

    say = silent if quiet else print_line
    with closing(loader), fastest_convolutions(compute), memory_hint(recipe, compute):
        network = {"make": model, "init": custom.init}
        state = new_state(recipe, rows.classes, seed, loader.steps, compute, **network)
        with closing(watched(batches(), "range test", steps, say)) as endless:
            return range_test(state, recipe, compute, endless, start, stop, steps, loss)


def range_test(
    state: TrainState, recipe: Recipe, compute: Compute, batches: Iterator[Batch],
    start: float = 1e-5, stop: float = 10.0, steps: int = 100, loss: Loss | None = None,
) -> RangeTest:  # fmt: skip
    """Train while the learning rate grows from `start` to `stop` by the same factor each step.

    Momentum is `base_momentum`, which the schedule has at its peak; Muon's rate keeps its
    proportion. Ends early if the mean of the last five losses exceeds four times the least one, or
    if a loss is not finite. The state is as before afterwards.
    """
    if not (0 < start < stop < math.inf):
        raise UserError(f"the learning rate has to grow from above 0, not from {start} to {stop}")
    if not 10 <= steps <= 2000:
        raise UserError(f"steps must be from 10 to 2,000, not {steps}")
    rates, losses = np.geomspace(start, stop, steps), []
    shares = [group["max_lr"] / recipe.max_learning_rate for group in state.optimizer.param_groups]
    with rehearsal(state):
        for rate, batch in zip(rates.tolist(), batches, strict=False):
            state.totals.zero_()
            # The schedule's own step comes after each update, is overwritten here, and never ends.
            for group, share in zip(state.optimizer.param_groups, shares, strict=True):
                group["lr"], group["momentum"] = rate * share, recipe.base_momentum
            state.scheduler.last_epoch = 0
            train_step(state, recipe, compute, batch, loss=loss)
            total, images = state.totals[[0, 3]].tolist()
            if images == 0 or not math.isfinite(total):
                break
            losses.append(total / images)
            means = np.convolve(losses, np.ones(RECENT) / RECENT, mode="valid")
            if len(losses) >= RECENT and means[-1] > TOO_HIGH * means.min():
                break
    rates, curve = rates[: len(losses)], np.array(losses)
    return RangeTest(rates, curve, weights(rates) @ curve, *suggest(rates, curve))


def suggest(rates: np.ndarray, losses: np.ndarray) -> tuple[float | None, str]:
    """Return the lowest rate whose smoothed loss is within a standard error of the least one.

    None, and why, if that is at either end of the curve, or not below the first decade's loss by
    four standard errors. Not where the loss falls fastest, a usual choice: on the sample data that
    is 0.0007 with one seed and 0.005 with the next, where this is 0.005 and 0.009.
    """
    if len(losses) == 0:
        where = "at the lowest learning rate"
        return None, f"the loss is not finite {where}: look at the data and the recipe"
    smoothed, first = weights(rates) @ losses, rates <= 10 * rates[0]
    least = int(smoothed.argmin())
    # Neighbouring losses differ by chance, and by next to nothing else.
    noise = np.diff(losses[: least + 1]).std() / math.sqrt(2) if least else 0.0
    error = noise * math.sqrt((weights(rates)[least] ** 2).sum())
    low = int((smoothed <= smoothed[least] + error).argmax())
    down = f"the smoothed loss is down to {smoothed[low]:.2f}"
    found = f"{down} at a learning rate of {rates[low]:.2g}"
    if first[low]:
        return None, f"{found}, in the first decade: start lower, or look at the data"
    level = losses[first].mean()
    if level - smoothed[least] < 4 * math.hypot(error, noise / math.sqrt(first.sum())):
        return None, f"{found}, by no more than chance explains: take more steps"
    if rates[low] * 10**SPREAD > rates[-1]:
        return None, f"{found}, and falls to the end: go on to a higher one"
    return float(rates[low]), f"{found}, from {level:.2f} in the first decade, and falls no further"


def weights(rates: np.ndarray) -> np.ndarray:
    """Return each step's weight in the average at each step: Gaussian, (n, n), rows of sum 1."""
    decades = np.log10(rates)
    weights = np.exp(-(((decades[:, None] - decades) / SPREAD) ** 2) / 2)
    return weights / weights.sum(axis=1, keepdims=True)
