"""Which peak learning rate? A range test: a few steps of training while the learning rate grows from tiny to absurd.

Smith, "Cyclical learning rates for training neural networks", 2017; the growth by a constant factor per step is
fastai's. Nothing is kept of it: no file, and the state is as before.
"""

import contextlib
import itertools
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from tinylab.data.dataset import Dataset, interactive
from tinylab.data.loader import Batch, BatchedLoader, TrainingLoader, make_loader
from tinylab.data.split import make_split
from tinylab.exceptions import UserError
from tinylab.recipe import Recipe
from tinylab.run.environment import Compute, choose, fastest_convolutions
from tinylab.training.step import TrainState, new_state, out_of_memory, rehearsal, train_step

RECENT = 5  # losses whose mean decides when to stop
TOO_HIGH = 4  # times the best such mean
SPREAD = 0.15  # of the Gaussian that smooths the curve, in decades of the learning rate


@dataclass(frozen=True)
class RangeTest:
    """The curve of a range test, n steps, and what it suggests."""

    learning_rates: np.ndarray
    """float64 (n,), of each step, growing."""
    losses: np.ndarray
    """float64 (n,), of each step before its update: nats per image, finite."""
    smoothed: np.ndarray
    """float64 (n,), see `smooth`."""
    suggestion: float | None
    """The suggested `max_learning_rate`, see `suggest` (`muon_learning_rate` in proportion); None if the curve suggests
    none."""
    reason: str
    """One sentence: how the suggestion was found, or why there is none."""


def find_lr(
    recipe: Recipe,
    dataset: Dataset,
    *,
    split: str = "select",
    seed: int = 0,
    limit_classes: int | None = None,
    device: str = "auto",
    precision: str = "auto",
    start: float = 1e-5,
    stop: float = 10.0,
    steps: int = 100,
    workers: int | None = None,
    quiet: bool = False,
) -> RangeTest:
    """A range test of `recipe`, on the training images of the split, from the weights a run with that seed starts with.

    The arguments are those of `train.train` and `range_test`; the test images are not looked at, and no file is
    written. Raises `UserError` for what cannot be trained.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError("a range test serves a single process: start it without torchrun")
    compute = choose(device, precision)
    rows = make_split(dataset, split, limit_classes)
    if recipe.batch_size > len(rows.train):
        raise UserError(
            f"batch-size {recipe.batch_size} is more than the {len(rows.train)} training images; lower it"
        )
    loader = make_loader(dataset, rows.train, recipe, seed, compute.device, workers)
    with contextlib.closing(loader), fastest_convolutions(compute), _memory_hint(recipe, compute):
        state = new_state(recipe, rows.classes, seed, loader.steps, compute)
        bar = tqdm(
            total=steps,
            desc="range test",
            unit="step",
            leave=False,
            disable=quiet or not interactive(),
        )
        with bar, contextlib.closing(_batches(loader, recipe, bar)) as batches:
            return range_test(state, recipe, compute, batches, start, stop, steps)


def range_test(
    state: TrainState,
    recipe: Recipe,
    compute: Compute,
    batches: Iterator[Batch],
    start: float = 1e-5,
    stop: float = 10.0,
    steps: int = 100,
) -> RangeTest:
    """Trains for `steps` steps, fewer if the batches end, with a learning rate that grows from `start` to `stop` by the
    same factor each time; momentum is `base_momentum`, which the schedule has at its peak. Parameters with a peak of
    their own (Muon's) keep their proportion to it.

    Ends early once the mean of the last five losses exceeds four times the least such mean, or if a loss or ten updates
    in a row are not finite. The state is as before afterwards, to the last bit, also after an exception.
    Raises `UserError` for a range or a number of steps that cannot be.
    """
    if not (0 < start < stop < math.inf):
        raise UserError(f"the learning rate has to grow from above 0, not from {start} to {stop}")
    if not 10 <= steps <= 2000:
        raise UserError(
            f"steps must be from 10 to 2,000, not {steps}: fewer show no curve, more show no other one"
        )
    rates, losses = np.geomspace(start, stop, steps), []
    with rehearsal(state), _growing(state, recipe, rates):
        state.skips.zero_()
        for batch in itertools.islice(batches, steps):
            state.totals.zero_()
            train_step(state, recipe, compute, batch)
            total, images = state.totals[[0, 3]].tolist()
            if images == 0 or state.trouble():
                break
            losses.append(total / images)
            if _exploded(losses):
                break
    rates = rates[: len(losses)]
    smoothed = smooth(rates, np.array(losses))
    return RangeTest(rates, np.array(losses), smoothed, *suggest(rates, np.array(losses)))


def smooth(rates: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """The losses (n,) averaged over neighbouring learning rates, with the weights of a Gaussian of 0.15 decades."""
    return _weights(rates) @ losses


def suggest(rates: np.ndarray, losses: np.ndarray) -> tuple[float | None, str]:
    """The lowest learning rate whose smoothed loss is within a standard error of the least one, and a sentence about
    it; None, and why, if that is at either end of the curve, or not below the first decade's by four standard errors.

    Not where the loss falls fastest, a usual choice: on the sample data that is 0.0007 with one seed and 0.005 with the
    next, as it rests on differences of neighbouring losses, where this is 0.005 and 0.009. Nor a tenth of the rate with
    the least loss, which is for a learning rate that stays; one cycle is at its peak for a moment only.
    """
    if len(losses) == 0:
        return (
            None,
            "the loss is not finite at the lowest learning rate: look at the data and the recipe",
        )
    smoothed, first = smooth(rates, losses), rates <= 10 * rates[0]
    least = int(smoothed.argmin())
    # Neighbouring losses differ by chance, and by next to nothing else.
    noise = np.diff(losses[: least + 1]).std() / math.sqrt(2) if least else 0.0
    error = noise * math.sqrt((_weights(rates)[least] ** 2).sum())
    low = int((smoothed <= smoothed[least] + error).argmax())
    found = (
        f"the smoothed loss is down to {smoothed[low]:.2f} at a learning rate of {rates[low]:.2g}"
    )
    if first[low]:
        return (
            None,
            f"{found}, in the first decade: there is no fall; start lower, or look at the data",
        )
    level = losses[first].mean()
    if level - smoothed[least] < 4 * math.hypot(error, noise / math.sqrt(first.sum())):
        return (
            None,
            f"{found}, no more below the first decade than chance explains: take more steps",
        )
    if rates[low] * 10**SPREAD > rates[-1]:
        return None, f"{found}, and falls to the end: go on to a higher one"
    return float(rates[low]), f"{found}, from {level:.2f} in the first decade, and falls no further"


def _weights(rates: np.ndarray) -> np.ndarray:
    """Weights (n, n) of each step for the average at each, rows of sum 1."""
    decades = np.log10(rates)
    weights = np.exp(-(((decades[:, None] - decades) / SPREAD) ** 2) / 2)
    return weights / weights.sum(axis=1, keepdims=True)


def _exploded(losses: list[float]) -> bool:
    means = (
        np.convolve(losses, np.ones(RECENT) / RECENT, mode="valid")
        if len(losses) >= RECENT
        else np.array([])
    )
    return len(means) > 0 and bool(means[-1] > TOO_HIGH * means.min())


@contextlib.contextmanager
def _growing(state: TrainState, recipe: Recipe, rates: np.ndarray) -> Iterator[None]:
    """While entered, the state's schedule is the range test's."""
    schedule = state.scheduler
    state.scheduler = _Growth(state.optimizer, recipe, rates)
    try:
        yield
    finally:
        state.scheduler = schedule


class _Growth:
    """Stands in for the schedule: the next learning rate with each step."""

    def __init__(self, optimizer: torch.optim.Optimizer, recipe: Recipe, rates: np.ndarray) -> None:
        self._groups = [
            (group, group["max_lr"] / recipe.max_learning_rate) for group in optimizer.param_groups
        ]
        self._rates = iter(rates.tolist())
        for group, _ in self._groups:
            group["momentum"] = recipe.base_momentum
        self.step()

    def step(self) -> None:
        """Sets the next learning rate; after the last one it stays."""
        rate = next(self._rates, None)
        for group, proportion in self._groups if rate is not None else ():
            group["lr"] = rate * proportion


def _batches(loader: TrainingLoader | BatchedLoader, recipe: Recipe, bar: tqdm) -> Iterator[Batch]:
    """The batches of one epoch after the other, without end; after the last epoch the first one comes again."""
    for epoch in itertools.cycle(range(1, recipe.epochs + 1)):
        with contextlib.closing(loader.epoch(epoch)) as batches:
            for batch in batches:
                yield batch
                bar.update()


@contextlib.contextmanager
def _memory_hint(recipe: Recipe, compute: Compute) -> Iterator[None]:
    """Says what to do when memory runs out, in place of a traceback from the depths of a library."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        wanted = f"out of memory on {compute.device} with {recipe.batch_size} images per step"
        raise UserError(f"{wanted}: --batch-size or --width make it smaller") from error
